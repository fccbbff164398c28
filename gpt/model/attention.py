"""Causal self-attention."""

import torch
from torch import Tensor, nn

from gpt.model.config import ModelConfig
from gpt.model.linear import HiddenLinear, ResidualLinear, ValueGate
from gpt.model.norms import RMSNorm
from gpt.model.positions import alibi_slopes, rotate
from kernels import attention, masks


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) over one fused projection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_width
        self.heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        self.dropout = config.dropout
        window = config.window_of(layer)
        self.mask = masks.CAUSAL if window is None else masks.sliding_window(window)
        rows = tuple(n * self.head_dim for n in self.heads)
        self.c_qkv = HiddenLinear(config.n_embd, sum(rows), bias=config.bias, row_splits=rows)
        width = self.n_head * self.head_dim
        self.c_proj = ResidualLinear(width, config.n_embd, bias=config.bias, dropout=config.dropout)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        has_table = config.value_table_of(layer) is not None
        self.value_gate = ValueGate(config.n_embd, self.n_kv_head, bias=False) if has_table else None
        slopes = alibi_slopes(config.n_head) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        values: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Attend from each token of x (..., C), project, and add residual (..., C).

        values (..., H_kv D): value embeddings. rotary: cos and sin, which broadcast to (..., 1, D).
        """
        q, k, v = self.project(x, values, rotary)
        return self.c_proj(self.attend(q, k, v, segment_ids), residual=residual)

    def project(
        self, x: Tensor, values: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (..., C) to queries (..., H, D) and keys and values (..., H_kv, D), normalised and rotated."""
        qkv = self.c_qkv(x).view(*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.turn(qkv, rotary)
        if self.value_gate is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x)).unsqueeze(-1)  # (..., H_kv, 1)
            v = torch.addcmul(v, values.view(v.shape).to(v.dtype), gate)
        return q, k, v

    def turn(self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv (..., H + 2 H_kv, D), and normalise and rotate queries and keys."""
        q, k, v = qkv.split_with_sizes(self.heads, dim=-2)  # Tensor.split is slower: it is written in Python
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Attend within each row: (B, T, H D) for q (B, T, H, D). A decoder attends to its cache instead."""
        options = {"mask": self.mask, "segment_ids": segment_ids, "alibi_slopes": self.slopes}
        return attention(q, k, v, **options, dropout_p=self.dropout if self.training else 0.0).flatten(-2)

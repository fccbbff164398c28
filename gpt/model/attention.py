"""Causal self-attention."""

import torch
from torch import Tensor, nn

from gpt.model.config import ModelConfig
from gpt.model.norms import RMSNorm
from gpt.model.positions import alibi_slopes, rotate
from kernels import attention, masks


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) over one fused projection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.dropout
        window = config.window_of(layer)
        self.mask = masks.CAUSAL if window is None else masks.sliding_window(window)
        self.c_qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        # How much of the value embeddings each head takes.
        has_table = config.value_table_of(layer) is not None
        self.value_gate = nn.Linear(config.n_embd, self.n_kv_head, bias=False) if has_table else None
        slopes = alibi_slopes(config.n_head) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self,
        x: Tensor,
        values: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        B, T, _ = x.shape
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        qkv = self.c_qkv(x).view(B, T, sum(heads), self.head_dim)
        q, k, v = qkv.split(heads, dim=2)  # (B, T, H, D), (B, T, H_kv, D) twice
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.value_gate is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x)).unsqueeze(-1)  # (B, T, H_kv, 1)
            v = torch.addcmul(v, values.view(v.shape).to(v.dtype), gate)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = attention(
            q,
            k,
            v,
            mask=self.mask,
            segment_ids=segment_ids,
            alibi_slopes=self.slopes,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.c_proj(y.reshape(B, T, self.n_head * self.head_dim))  # (B, T, C)

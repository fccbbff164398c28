"""The decoder: a GPT that ModelConfig makes into GPT-2, the original Transformer's decoder, or Qwen3.

Shapes: B batch, T tokens, C = n_embd, H query heads, H_kv key and value heads, D head width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.arguments import checked, shown
from gpt.errors import require
from gpt.model.attention import CausalSelfAttention
from gpt.model.config import IGNORE_INDEX, ModelConfig
from gpt.model.inputs import check_call, check_hidden, check_targets
from gpt.model.mlp import MLP
from gpt.model.norms import make_norm
from gpt.model.positions import rotary_table, sinusoidal_table
from gpt.model.roles import EMBEDDING, HEAD, RESIDUAL_OUT, VALUE_EMBEDDING, VALUE_GATE, VECTOR, weights_of
from kernels import linear_cross_entropy
from kernels.linear_cross_entropy import workspace_bytes


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it, as in GPT-2."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.value_table = config.value_table_of(layer)
        self.attn_norm = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.redraws = config.dropout > 0
        self.checkpointing = False

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Apply the block to x (..., C). context: values, rotary and segment_ids of CausalSelfAttention.forward."""
        if self.checkpointing and torch.is_grad_enabled():
            # Keep the input only, and recompute the rest in the backward pass (Chen et al. 2016).
            return checkpoint(self.body, x, *context, use_reentrant=False, preserve_rng_state=self.redraws)
        return self.body(x, *context)

    def body(self, x: Tensor, *context: Any) -> Tensor:
        x = self.attn(self.attn_norm(x), x, *context)
        return self.mlp(self.mlp_norm(x), x)


class PostNormBlock(Block):
    """The original Transformer's block: a norm after each residual sum."""

    def body(self, x: Tensor, *context: Any) -> Tensor:
        x = self.attn_norm(self.attn(x, x, *context))
        return self.mlp_norm(self.mlp(x, x))


BLOCKS = {"pre": Block, "post": PostNormBlock}  # by ModelConfig.norm_order


class Table(nn.Embedding):
    """An embedding table with a role."""

    def __init__(self, role: str, rows: int, width: int):
        super().__init__(rows, width)
        self.role = role


class Head(nn.Linear):
    """The projection of the last hidden state to logits."""

    role = HEAD


class GPT(nn.Module):
    """Tokens in, next-token logits out.

    Raises ValueError if the config has no vocab_size, or for a call with more tokens than seq_len or, on a CPU, with a
    token outside the vocabulary (other devices do not check). Raises TypeError for arguments of another type.
    """

    @checked
    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("ModelConfig.vocab_size must be set to build a model")
        self.config = config
        self.embed = Table(EMBEDDING, config.vocab_size, config.n_embd)
        # Vaswani et al. scale embeddings up to the size of their sines and cosines.
        self.embed_scale = math.sqrt(config.n_embd) if config.position == "sinusoidal" else 1.0
        if config.position == "learned":
            self.position_embed = Table(EMBEDDING, config.seq_len, config.n_embd)
        elif config.position == "sinusoidal":
            self.register_buffer("position_table", sinusoidal_table(config.seq_len, config.n_embd), persistent=False)
        elif config.position == "rotary":
            cos, sin = rotary_table(config.seq_len, config.head_width, config.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        width = config.kv_heads * config.head_width
        self.value_embeds = nn.ModuleList(
            Table(VALUE_EMBEDDING, config.vocab_size, width) for _ in range(config.value_embeds)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BLOCKS[config.norm_order](config, layer) for layer in range(config.n_layer))
        self.norm = nn.Identity() if config.norm_order == "post" else make_norm(config, config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight, by the rule that config.init names.

        gpt2: N(0, 0.02), with projections into the residual stream scaled by 1 / sqrt(2 n_layer) (Radford et al.
        2019). xavier: uniform (Glorot & Bengio 2010), embeddings N(0, 1/C). scaled: N(0, 1 / fan_in), which keeps
        activations the same size at any width (as in muP, Yang et al. 2022), and zeros for the head and the
        projections into the residual stream, so that each block starts as the identity and the loss as ln V.
        Under every rule, value embeddings and their gates start as zeros.
        """
        C, init = self.config.n_embd, self.config.init
        table = {"gpt2": 0.02, "xavier": C**-0.5, "scaled": C**-0.5 if self.config.tied_embeddings else 1.0}[init]
        for weight, name, role, _ in weights_of(self):
            if name == "bias" or role in (VALUE_EMBEDDING, VALUE_GATE):
                weight.zero_()
            elif role == VECTOR:
                weight.fill_(1.0)
            elif role == EMBEDDING:  # also the head, when tied
                weight.normal_(std=table)
            elif init == "gpt2":
                weight.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if role == RESIDUAL_OUT else 0.02)
            elif init == "xavier":
                nn.init.xavier_uniform_(weight)
            elif role in (RESIDUAL_OUT, HEAD):
                weight.zero_()
            else:
                weight.normal_(std=weight.shape[1] ** -0.5)

    def hidden(self, idx: Tensor, *, positions: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Compute the last block's normalised output (B, T, C), the input of `logits`. Arguments as for forward."""
        if not torch.compiler.is_compiling():
            check_call(self.config, self.embed.weight, idx, positions, segment_ids)
        _, T = idx.shape
        if T > self.config.seq_len:
            raise ValueError(f"{T} tokens are more than the context of {self.config.seq_len}")
        # A slice in the common case, so that nothing is gathered.
        return self.run(idx, slice(T) if positions is None else positions, segment_ids)

    def run(self, idx: Tensor, positions: Tensor | slice, segment_ids: Tensor | None = None) -> Tensor:
        """Compute `hidden` without its checks, for idx of any shape (...). positions: rows of the position tables."""
        try:
            x, rotary = self.embed(idx), None  # (..., C)
        except IndexError:
            last = self.config.vocab_size - 1
            raise ValueError(f"idx holds a token id outside the vocabulary, 0 to {last}") from None
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        if self.config.position == "learned":
            x = x + self.position_embed.weight[positions]
        elif self.config.position == "sinusoidal":
            x = x + self.position_table[positions]
        elif self.config.position == "rotary":
            rotary = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)  # broadcast to (..., 1, D)
        x = self.dropout(x)
        tables = [table(idx) for table in self.value_embeds]  # each (..., H_kv D)
        for block in self.blocks:
            values = None if block.value_table is None else tables[block.value_table]
            x = block(x, values, rotary, segment_ids)
        return self.norm(x)

    def forward(self, idx: Tensor, *, positions: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """Compute logits (B, T, V) for idx (B, T), int64.

        positions (B, T) or (T,): each token's position in its document, by default counted from 0. They choose rows of
        the position table; ALiBi uses distances within the row instead.
        segment_ids (B, T) int32: a token attends to tokens of its own segment only.
        """
        return self.logits(self.hidden(idx, positions=positions, segment_ids=segment_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head and the softcap, if any: logits (..., V) of hidden (..., C)."""
        if not torch.compiler.is_compiling():
            check_hidden(self.head.weight, hidden)
        return self.read(hidden)

    def read(self, hidden: Tensor) -> Tensor:
        """Compute `logits` without its checks."""
        logits, cap = self.head(hidden), self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)

    def loss(
        self,
        idx: Tensor,
        targets: Tensor,
        *,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        reduction: str = "mean",
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Compute the cross entropy of targets (B, T) in nats per token, in fp32; targets of -100 do not count.

        It equals that of forward's logits, which are never all in memory. kernels.linear_cross_entropy explains z_loss
        and label_smoothing.
        """
        hidden = self.hidden(idx, positions=positions, segment_ids=segment_ids)  # (B, T, C)
        check_targets(targets, hidden)
        try:
            return linear_cross_entropy(
                hidden,
                self.head.weight,
                targets,
                softcap=self.config.logit_softcap,
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                ignore_index=IGNORE_INDEX,
                reduction=reduction,
            )
        except IndexError as error:
            raise ValueError(f"targets: {error}") from None

    def loss_workspace_bytes(self, tokens: int, device: torch.device) -> int:
        """Count the bytes of `loss`'s temporary tensors for this many tokens, under the current autocast."""
        is_cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_cast else self.head.weight.dtype
        return workspace_bytes(tokens, *self.head.weight.shape, dtype, device.type)

    @checked
    def checkpoint_activations(self, on: bool = True) -> None:
        """Choose whether each block keeps only its input for the backward pass and recomputes the rest."""
        for block in self.blocks:
            block.checkpointing = on

    @checked
    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Count weights, shared ones once. embeddings=False leaves out all tables, but not an untied head."""
        count = sum(p.numel() for p in self.parameters())
        if not embeddings:
            count -= sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return count

    @checked
    def flops_per_token(self, seq_len: int | None = None, *, training: bool = True) -> float:
        """Count floating-point operations of matrix products per token, the mean over rows of seq_len tokens.

        Forward: 2 for each weight of a linear layer, and 4 H D for each key that a query sees: (T + 1) / 2 keys on
        average, fewer under a window. (Chowdhery et al. 2022, appendix B, count all T keys.) Training costs three times
        as many. Norms, activations and look-ups do not count.
        """
        T = self.config.seq_len if seq_len is None else seq_len
        require(1 <= T < 1 << 31, f"seq_len must be at least 1 and below {1 << 31}, not {shown(T)}")
        windows = [min(self.config.window_of(layer) or T, T) for layer in range(self.config.n_layer)]
        visible_keys = sum(window * (window + 1) / 2 + (T - window) * window for window in windows) / T
        linear = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        scores = 4 * self.config.n_head * self.config.head_width * visible_keys
        return (3 if training else 1) * (2 * linear + scores)

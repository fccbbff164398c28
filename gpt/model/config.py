"""The decoder's options, and presets for three well-known decoders."""

from dataclasses import dataclass
from typing import Any, Literal

from gpt.arguments import check_fields, shown
from gpt.errors import require
from gpt.option import option

IGNORE_INDEX = -100  # a target with this value does not count in the loss


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. The defaults are Qwen3's block; PRESETS holds older ones."""

    n_layer: int = option(6, at_least=1)
    """Number of blocks."""
    n_head: int = option(6, at_least=1)
    """Query heads."""
    n_kv_head: int | None = option(None, at_least=1)
    """Key and value heads; fewer than n_head give grouped-query attention. None: n_head."""
    n_embd: int = option(384, at_least=1)
    """Width of the residual stream, C."""
    head_dim: int | None = option(None, at_least=1)
    """Width of one head, D. None: n_embd / n_head."""
    mlp_dim: int | None = option(None, at_least=1)
    """Hidden width of the MLP. None: 4 C, or for swiglu 8/3 C rounded up to a multiple of 64."""
    seq_len: int = option(256, at_least=1)
    """Context: the most tokens in a training row, or in a prompt and its continuation."""
    vocab_size: int | None = option(None, at_least=1)
    """Rows of the embedding table. None: the tokenizer's tokens. More, such as a multiple of 64, are padding."""
    position: Literal["rotary", "learned", "sinusoidal", "alibi", "none"] = "rotary"
    """Position encoding: half-split rotary, a learned or sinusoidal table, ALiBi's linear bias, or none."""
    rope_theta: float = option(10000.0, above=1, acts_with=("position", ("rotary",)))
    """Base of the rotary wavelengths."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of norm."""
    norm_eps: float = option(1e-6, above=0)
    """Added to the variance in a norm."""
    norm_order: Literal["pre", "post"] = "pre"
    """Norm before each sublayer (GPT-2 and later) or after the residual sum (the original Transformer)."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2"] = "swiglu"
    """The MLP's non-linearity."""
    bias: bool = False
    """Biases in the linear layers and in LayerNorm."""
    qk_norm: bool = True
    """RMSNorm with a weight on each head's queries and keys."""
    window: int | None = option(None, at_least=1)
    """Keys visible to a query, its own included. None: all up to its own."""
    window_pattern: str | None = None
    """Which blocks have the window, as letters repeated over the blocks, such as SSSL: S has it, L sees all.
    None: every block has it."""
    value_embeds: int = 0
    """Tables of value embeddings. Each adds a vector for the token to the values of two blocks: one of the first and
    one of the last. 0: none."""
    tied_embeddings: bool = False
    """The output head shares the embedding table's weights."""
    logit_softcap: float | None = option(None, above=0)
    """Bound on the logits: c * tanh(logits / c), as in Gemma 2 with c = 30. None: no bound."""
    dropout: float = option(0.0, at_least=0, below=1, in_recipe=True)
    """Dropout probability for embeddings, attention weights and both sublayers' outputs."""
    init: Literal["gpt2", "xavier", "scaled"] = "scaled"
    """Initial weights: GPT-2's N(0, 0.02); Xavier's uniform; or N(0, 1/sqrt(fan_in)) with zeroed output projections."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.head_dim is not None or self.n_embd % self.n_head == 0,
            f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one, or set head_dim",
        )
        grouped = self.n_head % self.kv_heads == 0
        require(grouped, f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        width = self.head_width
        require(8 <= width <= 256, f"the head width must be 8 to 256, not {width}: it is head_dim, or n_embd / n_head")
        fits = self.position != "rotary" or width % 2 == 0
        require(fits, f"rotary positions need an even head width, not {width}")
        pattern = self.window_pattern
        require(
            pattern is None or (pattern and set(pattern) <= {"S", "L"}),
            f"window_pattern must be letters S and L, such as SSSL, not {shown(pattern)}",
        )
        require(pattern is None or self.window is not None, "window_pattern needs a window for its letters S")
        require(
            0 <= 2 * self.value_embeds <= self.n_layer,
            f"value_embeds must be 0 to n_layer / 2, not {self.value_embeds}: each table serves two blocks",
        )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    def window_of(self, layer: int) -> int | None:
        """Return a block's window, or None if it sees all keys."""
        pattern = self.window_pattern or "S"
        return self.window if pattern[layer % len(pattern)] == "S" else None

    def value_table_of(self, layer: int) -> int | None:
        """Return a block's value embedding table, or None. Blocks i and n_layer - value_embeds + i share table i."""
        tables, from_end = self.value_embeds, self.n_layer - layer
        return layer if layer < tables else tables - from_end if from_end <= tables else None

    @property
    def mlp_width(self) -> int:
        default = -(-8 * self.n_embd // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * self.n_embd
        return self.mlp_dim or default


_OLDER = {"norm": "layernorm", "norm_eps": 1e-5, "bias": True, "qk_norm": False, "tied_embeddings": True}
PRESETS: dict[str, dict[str, Any]] = {
    "modern": {},
    # Radford et al. 2019, as released.
    "gpt2": _OLDER | {"position": "learned", "activation": "gelu_tanh", "init": "gpt2"},
    # Vaswani et al. 2017, the decoder without its cross-attention.
    "transformer": _OLDER | {"position": "sinusoidal", "norm_order": "post", "activation": "relu", "init": "xavier"},
}

"""Position encodings: rotary and sinusoidal tables, and ALiBi slopes."""

import math

import torch
from torch import Tensor

from gpt.model.cpu_autograd import RotateFunction, by_hand


def sinusoidal_table(seq_len: int, width: int) -> Tensor:
    """Make a table (seq_len, width) of interleaved sines and cosines (Vaswani et al. 2017, section 3.5)."""
    angles = torch.outer(torch.arange(seq_len).float(), 10000.0 ** (-torch.arange(0, width, 2).float() / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


def rotary_table(seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Make cos and sin, each (seq_len, D): the D/2 angles twice, the first half's sines negated (Su et al. 2021).

    GPT-NeoX, Llama and Qwen3 pair i and i + D/2 as well. With the signs in the table a rotation is
    x * cos + roll(x, D/2) * sin.
    """
    angles = torch.outer(torch.arange(seq_len).double(), theta ** (-torch.arange(0, head_dim, 2).double() / head_dim))
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., H, D) by its positions' rows of rotary_table, which broadcast to (..., 1, D)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return RotateFunction.apply(x, cos, sin) if by_hand(x) else rotated(x, cos, sin)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the formula of `rotate`, with tables in x's dtype."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def alibi_slopes(n_head: int) -> Tensor:
    """Make slopes (H,): a geometric sequence, interleaved as in Press et al. 2022 if H is not a power of two."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    below = 2 ** int(math.log2(n_head))
    return torch.tensor(powers(below) + powers(2 * below)[0::2][: n_head - below])

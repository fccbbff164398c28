"""Adding a bias of any finite size to the scores in plain PyTorch, with no more loss than float64 would have.

Softmax ignores what is added to a whole row. So each row subtracts its largest visible bias, the row's shift, and adds
it back to lse: in float32, -1e9 + s would drop s. float64 would round s to a multiple of 2^-52 times the shift's power
of two; s is rounded so here, and results agree with softmax(s + bias) in float64 for shifts of any size. tiles.add_bias
does the same in the kernels.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.operators import is_transformed

# Below this shift, float64's step is finer than float32's for a score.
COARSE = 2.0**29
# Up to this size, float32 may add a bias to a score directly.
SMALL = 16.0


def largest(bias: Tensor) -> float:
    """Return the largest absolute value of a finite bias; inf if reading it would wait for a GPU, or is impossible."""
    no_value = torch.compiler.is_compiling() or isinstance(bias, FakeTensor) or is_transformed(bias)
    if bias.device.type != "cpu" or no_value:
        return math.inf
    size = bias.detach().abs()
    return float(size.masked_fill_(size == math.inf, 0.0).amax()) if size.numel() else 0.0


def row_shift(bias: Tensor, visible: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Return the largest visible bias or sink of each row: (..., 1), without a gradient; 0 if there is none.

    bias, visible (bool) and sinks broadcast to (..., Tk) and (..., 1).
    """
    seen = torch.where(visible, bias.detach(), -math.inf)
    shift = seen.amax(-1, keepdim=True) if seen.shape[-1] else seen.new_full((*seen.shape[:-1], 1), -math.inf)
    if sinks is not None:
        shift = torch.maximum(shift, sinks.detach())
    return shift.masked_fill(shift == -math.inf, 0.0)


def add_bias(s: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """Return s + bias - shift, with s rounded as s + bias in float64 would round it; differentiable in s and bias."""
    rounder = _rounder(shift)
    return s + rounder - rounder + (bias - shift)


def _rounder(shift: Tensor) -> Tensor:
    """Return a number that, added and subtracted in shift's dtype, rounds to a multiple of float64's step at shift."""
    bits = 52 if shift.dtype == torch.float64 else 23
    # Division by the mantissa (0.5 to 1) leaves a power of two, twice that of shift.
    power = (shift.abs() * 2.0**-30) / shift.frexp().mantissa.abs()
    return torch.where(shift.abs() < COARSE, 0.0, power * (0.75 * 2.0 ** (30 + bits - 52)))

"""A bias of any finite size, added to the scores in plain PyTorch so that no more is lost than float64 would lose.

Softmax does not see what is added to a whole row. So the bias of each row is taken relative to its largest visible
one, the row's shift, and lse is that of what is left, plus the shift. In float32 -1e9 + s would drop s. float64 keeps
s to a step of its own, 2^-52 of the shift's power of two; s is rounded to that step, so that results agree with
softmax(s + bias) in float64 for shifts of any size. tiles.add_bias does the same in the kernels.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.operators import is_transformed

# Below it float64's step is finer than what float32 keeps of a score.
COARSE = 2.0**29
# Up to this size float32 may add a bias to a score directly.
SMALL = 16.0


def largest(bias: Tensor) -> float:
    """The largest size of a finite bias; inf where to read it would wait for a GPU, or no value is at hand."""
    no_value = torch.compiler.is_compiling() or isinstance(bias, FakeTensor) or is_transformed(bias)
    if bias.device.type != "cpu" or no_value:
        return math.inf
    size = bias.detach().abs()
    return float(size.masked_fill_(size == math.inf, 0.0).amax()) if size.numel() else 0.0


def row_shift(bias: Tensor, visible: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The largest visible bias of each row, and its sink if that is larger: (..., 1), without a gradient; 0 for none.

    bias, visible (bool) and sinks broadcast to (..., Tk) and (..., 1).
    """
    seen = torch.where(visible, bias.detach(), -math.inf)
    shift = seen.amax(-1, keepdim=True) if seen.shape[-1] else seen.new_full((*seen.shape[:-1], 1), -math.inf)
    if sinks is not None:
        shift = torch.maximum(shift, sinks.detach())
    return shift.masked_fill(shift == -math.inf, 0.0)


def add_bias(s: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """s + bias - shift, where s is rounded to what float64 would keep of s + bias; differentiable in s and bias."""
    rounder = _rounder(shift)
    return s + rounder - rounder + (bias - shift)


def _rounder(shift: Tensor) -> Tensor:
    """Added to a number of shift's dtype and subtracted, it rounds to a multiple of float64's step at shift."""
    bits = 52 if shift.dtype == torch.float64 else 23
    # Division by the mantissa (0.5 to 1) leaves a power of two, twice the one below shift.
    power = (shift.abs() * 2.0**-30) / shift.frexp().mantissa.abs()
    return torch.where(shift.abs() < COARSE, 0.0, power * (0.75 * 2.0 ** (30 + bits - 52)))

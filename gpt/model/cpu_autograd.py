"""Functions with hand-written gradients, for eager training on a CPU.

There a norm or a rotation takes a dozen small operations, and they take most of a small model's step. These functions
make fewer passes over memory and take about half the time. GPUs have fused kernels and torch.compile fuses by itself,
so both use the plain formulas (see by_hand).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def by_hand(x: Tensor) -> bool:
    """Whether to use these functions for x instead of the plain formulas: in eager training on a CPU."""
    return torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling()


class RMSNormFunction(torch.autograd.Function):
    """w * x / sqrt(mean(x^2) + eps) over the last axis; x (..., D), w (D,) (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = mean_square.add_(eps).rsqrt_()  # (..., 1)
        unit = x * rstd
        ctx.save_for_backward(unit, rstd, w)
        return unit * w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, rstd, w = ctx.saved_tensors
        products = dy * unit
        along = (products @ w).div_(-unit.shape[-1]).unsqueeze(-1)  # minus the mean of dy * w * unit
        dx = (dy * w).addcmul_(unit, along).mul_(rstd)
        return dx, products.flatten(0, -2).sum(0), None


class RotateFunction(torch.autograd.Function):
    """x * cos + swap(x) * sin for x (B, T, H, D); swap exchanges the halves of the last axis (Su et al. 2021).

    cos and sin broadcast to x and get no gradient. sin includes the signs of positions.rotary_table.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, *sin.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _rotated(dy, cos, second, first), None, None


def _rotated(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Compute x * cos plus each half of x (..., D) times the sines (..., D/2) of the other half."""
    half, y = x.shape[-1] // 2, x * cos
    y[..., :half].addcmul_(x[..., half:], first)
    y[..., half:].addcmul_(x[..., :half], second)
    return y


class ReLUSquaredFunction(torch.autograd.Function):
    """max(x, 0)^2 (So et al. 2021)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)

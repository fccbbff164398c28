"""A linear layer's weights, prepared once for products with a few rows at a time: what generating text needs.

With one row a product reads each weight once and does little with it, so the weights' layout decides its speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's names for our activations: (name, algorithm). swiglu and relu2 are not among them.
_FUSED = {"relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def activate(h: Tensor, activation: str | None) -> Tensor:
    """The MLP's non-linearity; for swiglu h is the gate's half and the other, side by side. h may be overwritten."""
    if activation is None:
        return h
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    if activation == "relu2":
        return h.relu_().square_()
    if activation == "relu":
        return h.relu_()
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


class PlainLinear:
    """activation(x W^T + b) + residual, for x (M, K), W (N, K), residual (M, N) of any dtype, in W's dtype.

    The weights are the layer's own where they have the dtype already. residual is written over and returned.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        y = activate(F.linear(x.to(self.weight.dtype), self.weight, self.bias), activation)
        return y if residual is None else residual.add_(y)


class TransposedLinear(PlainLinear):
    """W^T stored row by row, a copy: one row against a matrix with more outputs than inputs takes less time so.

    Measured on two cores: a fifth less for GPT-2's head, a few parts in a hundred for its wide layers, and where there
    are fewer outputs than inputs up to half as much again.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.t().contiguous().t(), bias)


class PackedLinear(PlainLinear):
    """Weights in the blocks that oneDNN reads, a copy; activation and sum are done while a block is at hand.

    For a few rows at once about twice as fast as the plain layout, and for bfloat16 with one row as well.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows), bias)
        self.dtype = weight.dtype

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        x, product = x.to(self.dtype), torch.ops.mkldnn._linear_pointwise
        if residual is not None and residual.dtype == self.dtype and activation is None:
            return product.binary(x, residual, self.weight, self.bias, "add")
        if activation in _FUSED:
            name, algorithm = _FUSED[activation]
            y = product(x, self.weight, self.bias, name, [], algorithm)
        else:
            y = activate(product(x, self.weight, self.bias, "none", [], ""), activation)
        return y if residual is None else residual.add_(y)


def can_pack(weight: Tensor) -> bool:
    """Whether this torch and processor have oneDNN's packed product for the weight's dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def prepare_linear(layer: nn.Linear, dtype: torch.dtype, rows: int) -> PlainLinear:
    """The layer for products with about `rows` rows.

    Which layout is taken depends on shape, dtype and rows alone, never on a timing, so that bits repeat.
    """
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    if can_pack(weight) and (rows > 1 or dtype == torch.bfloat16):
        return PackedLinear(weight, bias, rows)
    if weight.device.type == "cpu" and rows == 1 and weight.shape[0] > weight.shape[1]:
        return TransposedLinear(weight, bias)
    return PlainLinear(weight, bias)

"""Linear layers for generating text: their weights are laid out once for products with few rows.

A product with one row reads each weight once and does little with it, so the layout decides its speed.
"""

import torch
from torch import Tensor, nn

from gpt.model.linear import activate

SMALL = 600_000  # most weights of a small matrix
# oneDNN's (name, algorithm) for our activations. It has neither swiglu nor relu2.
_FUSED = {None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


class PlainLinear:
    """activation(x W^T + b) + residual, for x (M, K), W (N, K), residual (M, N) of any dtype, in W's dtype.

    Shares the weights of a layer in this dtype. The result may overwrite residual.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.matrix, self.bias, self.dtype = weight.t(), bias, weight.dtype  # (K, N), (N,)

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)  # a call of `to` costs more than the check
        if residual is not None and residual.dtype == self.dtype and activation is None:
            residual.addmm_(x, self.matrix)
            return residual if self.bias is None else residual.add_(self.bias)
        y = torch.mm(x, self.matrix) if self.bias is None else torch.addmm(self.bias, x, self.matrix)
        y = y if activation is None else activate(y, activation)
        return y if residual is None else residual.add_(y)


class TransposedLinear(PlainLinear):
    """A copy of the weights, with W^T contiguous."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.t().contiguous().t(), bias)


class PackedLinear(PlainLinear):
    """A copy of the weights in oneDNN's blocks; the product includes the activation or the sum."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias, self.dtype = bias, weight.dtype
        self.product, self.sum = (getattr(torch.ops.mkldnn._linear_pointwise, name) for name in ("default", "binary"))

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if residual is not None and residual.dtype == self.dtype and activation is None:
            return self.sum(x, residual, self.weight, self.bias, "add")
        name, algorithm = _FUSED.get(activation, _FUSED[None])
        y = self.product(x, self.weight, self.bias, name, [], algorithm)
        y = y if activation in _FUSED else activate(y, activation)
        return y if residual is None else residual.add_(y)


class MklLinear(PlainLinear):
    """A copy of the weights in MKL's blocks for products of exactly `rows` rows; others use the layer's own."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.weight, self.bias, self.dtype, self.rows = weight.contiguous(), bias, weight.dtype, rows
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        self.product = torch.ops.mkl._mkl_linear.default

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        y = self.product(x, self.packed, self.weight, self.bias, self.rows)
        y = y if activation is None else activate(y, activation)
        return y if residual is None else residual.add_(y)


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch and this processor have oneDNN's packed product for the weight's dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def prepare_linear(layer: nn.Linear, dtype: torch.dtype, rows: int) -> PlainLinear:
    """Choose a layout for products with about `rows` rows.

    It depends on shape, dtype and rows alone, never on a timing, so that bits repeat. The rules were measured on two
    cores of a Xeon with AVX-512. bfloat16: oneDNN always. float32, one row: a wide layer is transposed (a fifth less
    time for GPT-2's head). float32, two rows or more: small matrices are packed by MKL (at 384 wide and 8 rows a fifth
    less time than transposed, a third less than plain); from four rows on, large ones by oneDNN (half, at 768).
    """
    weight = layer.weight.detach().to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    if weight.device.type != "cpu" or not can_pack(weight):
        return PlainLinear(weight, bias)
    if dtype == torch.bfloat16:
        return PackedLinear(weight, bias, rows)
    is_wide, is_small = weight.shape[0] > weight.shape[1], weight.numel() <= SMALL
    if rows == 1:
        return TransposedLinear(weight, bias) if is_wide else PlainLinear(weight, bias)
    if is_small:
        return MklLinear(weight, bias, rows) if torch.backends.mkl.is_available() else TransposedLinear(weight, bias)
    return PackedLinear(weight, bias, rows) if rows >= 4 else PlainLinear(weight, bias)

"""A linear layer's weights, prepared once for products with a few rows at a time: what generating text needs.

With one row a product reads each weight once and does little with it, so the weights' layout decides its speed.
"""

import torch
from torch import Tensor, nn

from gpt.model.linear import activate

SMALL = 600_000  # weights of a matrix
# oneDNN's names for our activations: (name, algorithm). swiglu and relu2 are not among them.
_FUSED = {"relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


class PlainLinear:
    """activation(x W^T + b) + residual, for x (M, K), W (N, K), residual (M, N) of any dtype, in W's dtype.

    The weights are the layer's own where they have the dtype already. The result may take residual's memory.
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
    """W^T stored row by row, a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.t().contiguous().t(), bias)


class PackedLinear(PlainLinear):
    """Weights in the blocks that oneDNN reads, a copy; activation and sum are done while a block is at hand."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.bias, self.dtype = bias, weight.dtype
        self.product, self.sum = (getattr(torch.ops.mkldnn._linear_pointwise, name) for name in ("default", "binary"))

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if residual is not None and residual.dtype == self.dtype and activation is None:
            return self.sum(x, residual, self.weight, self.bias, "add")
        if activation in _FUSED:
            name, algorithm = _FUSED[activation]
            y = self.product(x, self.weight, self.bias, name, [], algorithm)
        else:
            y = self.product(x, self.weight, self.bias, "none", [], "")
            y = y if activation is None else activate(y, activation)
        return y if residual is None else residual.add_(y)


class MklLinear(PlainLinear):
    """Weights in the blocks that MKL reads for products of exactly `rows` rows, a copy; others take the layer's own."""

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

    Which layout is taken depends on shape, dtype and rows alone, never on a timing, so that bits repeat. Measured on
    two cores of a Xeon with AVX-512: bfloat16 packed by oneDNN, always. In float32 one row takes a wide layer
    transposed (a fifth less time for GPT-2's head) and others as they are; from two rows on, small matrices are packed
    by MKL (at 384 wide and 8 rows a fifth less time than transposed, a third less than as they are) and from four on
    large ones by oneDNN (half, at 768).
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

"""8-bit integer weights with one scale for each output channel; activations are not quantised (W8A16).

Each row of W is rounded to multiples of its largest magnitude / 127, symmetric about zero: the vector-wise scheme of
LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339), for weights only. A decoding step reads each weight
once, so it is faster because weights have a quarter of fp32's bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.inference.linear import PlainLinear
from gpt.model.linear import activate

LEVELS = 127
# torch's int8 product reads whole vectors: for other widths it reads past the end, and may crash.
VECTOR = 32
# Most rows for torch's int8 product; with more, it costs less to unpack the weights first.
FEW_ROWS = 16
BLOCK = 2048  # output channels unpacked at a time


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split a weight into int8 (N, K) and scale (N,) with weight ~ int8 * scale, to within half a scale.

    Scales are float32 values that bfloat16 can represent, so that a bfloat16 product does not round them again.
    """
    largest = weight.detach().float().abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / LEVELS, 1.0).bfloat16().float()
    scale.clamp_min_(torch.finfo(torch.float32).tiny)
    return (weight.float() / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


class Int8Linear(PlainLinear):
    """PlainLinear with int8 weights; x and the result are in `dtype`."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        weight, scale = quantize_weight(layer.weight.detach())
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.in_features = weight.shape[1]
        self.weight = F.pad(weight, (0, -self.in_features % VECTOR))  # (N, K, and zeros)
        self.bias, self.dtype, self.scale = bias, dtype, scale.to(dtype)
        self.has_product = dtype == torch.bfloat16 and weight.device.type == "cpu"

    def __call__(self, x: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if x.dtype == self.dtype else x.to(self.dtype)
        if self.has_product and 0 < x.shape[0] <= FEW_ROWS:
            if self.weight.shape[1] != self.in_features:
                x = F.pad(x, (0, self.weight.shape[1] - self.in_features))
            y = torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)
        else:
            y = self._unpacked(x)
        if self.bias is not None:
            y += self.bias
        y = y if activation is None else activate(y, activation)
        return y if residual is None else residual.add_(y)

    def _unpacked(self, x: Tensor) -> Tensor:
        """Compute x W^T block by block of channels, so that only one block is unpacked at a time."""
        weight = self.weight[:, : self.in_features]
        y = x.new_empty(x.shape[0], weight.shape[0])
        for start in range(0, weight.shape[0], BLOCK):
            block = slice(start, start + BLOCK)
            torch.mul(F.linear(x, weight[block].to(self.dtype)), self.scale[block], out=y[:, block])
        return y

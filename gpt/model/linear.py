"""Linear layers with what follows them: an activation, or dropout and the residual sum.

A decoder puts layers of its own in their place that take the same call (gpt/inference/linear.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.cpu_autograd import ReLUSquaredFunction, by_hand
from gpt.model.roles import HIDDEN, RESIDUAL_OUT, VALUE_GATE


def activate(h: Tensor, activation: str) -> Tensor:
    """GELU, ReLU, ReLU^2 (So et al. 2021) or SwiGLU (Shazeer 2020), for which h is the gate and the other half."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "relu2":
        return ReLUSquaredFunction.apply(h) if by_hand(h) else torch.relu(h).square()
    if activation == "relu":
        return torch.relu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


class HiddenLinear(nn.Linear):
    """x W^T + b within a block. row_splits: see gpt.model.roles.Weight."""

    role = HIDDEN

    def __init__(self, in_features: int, out_features: int, *, bias: bool, row_splits: tuple[int, ...] | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.row_splits = row_splits


class ActivatedLinear(HiddenLinear):
    """activation(x W^T + b)."""

    def forward(self, x: Tensor, activation: str) -> Tensor:
        return activate(super().forward(x), activation)


class ResidualLinear(nn.Linear):
    """residual + dropout(x W^T + b): the projections back into the residual stream.

    Do not read `residual` after the call: a decoder's layers put the sum in its memory.
    """

    role = RESIDUAL_OUT

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dropout: float):
        super().__init__(in_features, out_features, bias=bias)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(super().forward(x), self.dropout, self.training)


class ValueGate(nn.Linear):
    """How much of the value embeddings each head takes."""

    role = VALUE_GATE

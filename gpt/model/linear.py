"""Linear layers fused with an activation, or with dropout and the residual sum.

A decoder replaces them with layers that take the same arguments (gpt/inference/linear.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.model.cpu_autograd import ReLUSquaredFunction, by_hand
from gpt.model.roles import HIDDEN, RESIDUAL_OUT, VALUE_GATE


def activate(h: Tensor, activation: str) -> Tensor:
    """Apply GELU, ReLU, ReLU^2 (So et al. 2021) or SwiGLU (Shazeer 2020), whose gate is the first half of h."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "relu2":
        return ReLUSquaredFunction.apply(h) if by_hand(h) else torch.relu(h).square()
    if activation == "relu":
        return torch.relu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


class HiddenLinear(nn.Linear):
    """x W^T + b within a block. row_splits is explained in gpt.model.roles.Weight."""

    role = HIDDEN

    def __init__(self, in_features: int, out_features: int, *, bias: bool, row_splits: tuple[int, ...] | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.row_splits = row_splits


class ActivatedLinear(HiddenLinear):
    """activation(x W^T + b)."""

    def forward(self, x: Tensor, activation: str) -> Tensor:
        return activate(super().forward(x), activation)


class ResidualLinear(nn.Linear):
    """residual + dropout(x W^T + b): a projection into the residual stream.

    Do not read `residual` after the call: a decoder's layer may overwrite it with the sum.
    """

    role = RESIDUAL_OUT

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dropout: float):
        super().__init__(in_features, out_features, bias=bias)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(super().forward(x), self.dropout, self.training)


class ValueGate(nn.Linear):
    """The share of the value embeddings in each head's values."""

    role = VALUE_GATE

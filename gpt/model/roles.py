"""Roles of weights, for initialisation and the optimizers.

A module with a matrix has a `role`: EMBEDDING (a table of vectors), VALUE_EMBEDDING, VALUE_GATE, HIDDEN (a matrix
within a block), RESIDUAL_OUT (a projection into the residual stream) or HEAD. Biases and norm weights are VECTORs.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

EMBEDDING, VALUE_EMBEDDING, VALUE_GATE = "embedding", "value_embedding", "value_gate"
HIDDEN, RESIDUAL_OUT, HEAD, VECTOR = "hidden", "residual_out", "head", "vector"
TABLES = (EMBEDDING, VALUE_EMBEDDING)


class Weight(NamedTuple):
    """A parameter, its name in its module, its role, and how it splits.

    row_splits: the rows of each of its blocks, such as queries, keys and values; None: it is one block.
    """

    parameter: nn.Parameter
    name: str
    role: str
    row_splits: tuple[int, ...] | None


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Yield every parameter once, in the order of named_parameters. A tied head counts as its embedding table."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                role = module.role if parameter.ndim > 1 else VECTOR
                yield Weight(parameter, name, role, getattr(module, "row_splits", None))

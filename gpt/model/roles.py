"""What a weight is for, said by the module that holds it: what initialisation and the optimizers need to know.

A module with a matrix has a `role`: EMBEDDING (a table of vectors), VALUE_EMBEDDING and VALUE_GATE, HIDDEN (a matrix
within a block), RESIDUAL_OUT (one back into the residual stream) or HEAD. Biases and the weights of norms are vectors.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

EMBEDDING, VALUE_EMBEDDING, VALUE_GATE = "embedding", "value_embedding", "value_gate"
HIDDEN, RESIDUAL_OUT, HEAD, VECTOR = "hidden", "residual_out", "head", "vector"
TABLES = (EMBEDDING, VALUE_EMBEDDING)


class Weight(NamedTuple):
    """A parameter, its name in its module, and what the module says of it.

    row_splits: rows of the blocks that it is made of, as a fused projection's queries, keys and values; None: one.
    """

    parameter: nn.Parameter
    name: str
    role: str
    row_splits: tuple[int, ...] | None


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """Every parameter once, in the order of named_parameters. A tied head is its embedding table."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                role = module.role if parameter.ndim > 1 else VECTOR
                yield Weight(parameter, name, role, getattr(module, "row_splits", None))

"""How a call is prepared for the kernels."""

import pytest
import torch

from kernels.attention_arguments import Arguments
from kernels.masks import FULL
from kernels.operators import call_of
from kernels.problem import Problem, folds


def problem_with(**features) -> Problem:
    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16)
    return Problem(call_of(Arguments(q, k, k, FULL, **features)))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({}, True),
        ({"scale": 0.5, "sinks": torch.zeros(2)}, True),
        ({"scale": 0.0}, False),
        ({"scale": -1.0}, False),
        ({"softcap": 30.0}, False),
        ({"alibi_slopes": torch.zeros(2)}, False),
        ({"bias": torch.zeros(5, 5)}, False),
    ],
    ids=lambda x: "-".join(x) or "plain" if isinstance(x, dict) else "",
)
def test_the_scale_is_folded_into_the_exponent_if_the_maximum_allows_it(features, expected):
    assert folds(problem_with(**features).scoring()) is expected

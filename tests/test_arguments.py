"""kernels/arguments.py: bounds and messages."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from kernels.arguments import (
    LARGEST,
    SMALLEST,
    as_floats,
    check_choice,
    check_integer,
    check_number,
    check_real,
    check_switch,
    check_tensors,
)


def refused(error, check, *args, **options) -> str:
    with pytest.raises(error) as info:
        check(*args, **options)
    return str(info.value)


def test_numbers():
    for value in (1, 2.5, 3, np.float32(2), np.int64(1)):
        check_number("a", value, 1, 3, "a number from 1 to 3")
    for value in (0.999, 3.001, -1, float("nan"), float("inf"), 10**30):
        message = refused(ValueError, check_number, "a", value, 1, 3, "a number from 1 to 3")
        assert message == f"a must be a number from 1 to 3, not {value}"
    for value, kind in ((None, "None"), (True, "bool True"), ("2", "str '2'"), (2j, "complex 2j"), ([2], "list")):
        message = refused(TypeError, check_number, "a", value, 1, 3, "a number from 1 to 3")
        assert message == f"a must be a number from 1 to 3, not {kind}"


@pytest.mark.parametrize(
    ("bits", "shown"), [(127, str(1 << 127)), (128, "a longer integer"), (40000, "a longer integer")]
)
def test_huge_integers_are_not_written_out(bits, shown):
    """Python refuses to format integers of more than 4,300 digits."""
    assert refused(ValueError, check_number, "a", 1 << bits, 0, 1, "small") == f"a must be small, not {shown}"
    assert refused(ValueError, check_integer, "a", 1 << bits) == f"a must be an int of 64 bits, not {shown}"


def test_integers():
    for value in (0, -(2**63), 2**63 - 1, np.int32(7)):
        check_integer("a", value)
    for value in (2**63, -(2**63) - 1):
        assert refused(ValueError, check_integer, "a", value) == f"a must be an int of 64 bits, not {value}"
    for value, kind in ((True, "bool True"), (1.0, "float"), (None, "None"), (torch.ones(()), "Tensor")):
        assert refused(TypeError, check_integer, "a", value) == f"a must be an int, not {kind}"


def test_switches():
    for value in (True, False):
        check_switch("a", value)
    for value, kind in ((None, "None"), (1, "int"), ("x", "str 'x'")):
        assert refused(TypeError, check_switch, "a", value) == f"a must be True or False, not {kind}"


def test_floats():
    found = as_floats(None, 2, np.float32(0.5), Fraction(1, 4), 1e-320, -1e-39, 1e300)
    assert found == (None, 2.0, 0.5, 0.25, 0.0, 0.0, LARGEST) and all(type(x) is float for x in found[1:])
    assert as_floats(SMALLEST, -LARGEST) == (SMALLEST, -LARGEST)


def test_choices():
    check_choice("a", "x", ("x", "y"))
    assert refused(ValueError, check_choice, "a", "z", ("x", "y")) == "unknown a 'z': choose x or y"
    assert refused(ValueError, check_choice, "a", ["x"], ("x", "y")) == "unknown a of type list: choose x or y"
    assert len(refused(ValueError, check_choice, "a", "z" * 1000, ("x", "y"))) < 120


def test_tensors():
    check_tensors(a=torch.ones(2), b=torch.nn.Parameter(torch.ones(2)))
    assert refused(TypeError, check_tensors, a=torch.ones(2), b=[1.0]) == "b must be a tensor, not list"
    assert refused(TypeError, check_tensors, b="text" * 100).startswith("b must be a tensor, not str 'text")
    assert len(refused(TypeError, check_tensors, b="text" * 100)) < 80
    assert "not torch.sparse_coo" in refused(TypeError, check_tensors, a=torch.ones(2).to_sparse())
    assert "b must be a dense tensor" in refused(
        TypeError, check_tensors, b=torch.nested.nested_tensor([torch.ones(2)])
    )


def test_dtypes():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        check_real(a=torch.ones(2, dtype=dtype))
    for dtype in (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn):
        message = refused(TypeError, check_real, a=torch.ones(2), b=torch.ones(2).to(dtype))
        assert message == f"b must be float64, float32, float16 or bfloat16, not {dtype}"

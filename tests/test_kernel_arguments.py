"""Every public function of kernels refuses arguments of any type with a message, or gives a correct result."""

import inspect
import itertools
import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import kernels
from kernels import attention, attention_decode, attention_reference, masks

REFUSALS = (TypeError, ValueError, NotImplementedError)


def numbers_up_to(n: int, *shape: int) -> torch.Tensor:
    """Return eighths, whose products and sums are exact."""
    return torch.arange(math.prod(shape)).remainder(n).view(shape) / 8


def first_keys(q, k, n):
    return k < n


Q, K, CACHE = numbers_up_to(7, 1, 5, 2, 8), numbers_up_to(5, 1, 5, 1, 8), numbers_up_to(9, 1, 16, 1, 8)
IDS = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)
LENS = torch.tensor([3], dtype=torch.int32)
TABLES = torch.ones(16, 8), torch.zeros(16, 8)
# A valid call of each function, in which one argument is changed. A missing function fails a test.
CALLS = {
    attention: {"q": Q, "k": K, "v": K, "seed": 7},
    attention_reference: {"q": Q, "k": K, "v": K, "seed": 7},
    attention_decode: {
        "q": Q[:, :1], "k_cache": CACHE, "v_cache": CACHE, "cache_lens": LENS, "k_new": K[:, :1], "v_new": K[:, :1],
    },
    kernels.linear_cross_entropy: {"x": Q[0, :, 0], "weight": Q[0, :4, 1], "targets": torch.zeros(5).long()},
    kernels.linear_cross_entropy_reference: {"x": Q[0, :, 0], "weight": Q[0, :4, 1], "targets": torch.zeros(5).long()},
}  # fmt: skip
MASKS = {
    masks.Mask: {"fn": first_keys, "params": 3},
    masks.Constant: {"n": 3},
    masks.Table: {"values": [1, 2]},
    masks.sliding_window: {"window": 3},
    masks.sink_tokens: {"n": 3},
    masks.prefix: {"lengths": LENS},
    masks.global_tokens: {"positions": [1, 3]},
    masks.strided: {"stride": 3},
    masks.random_blocks: {"random": 2, "seed": 1, "block": 2},
    masks.bigbird: {"window": 2, "global_": 1, "random": 2, "seed": 1, "block": 2},
    masks.block_sparse: {"layout": torch.ones(2, 2), "block": 2},
    masks.segment_ids: {"cu_seqlens": torch.tensor([0, 2, 5]), "T": 7},
}
OTHERS = [
    None, "text", "", b"x", True, False, 1j, object(), len, torch.float32, masks.CAUSAL, np.ones(2),
    np.ones((1, 5, 2, 8)), [], [1.0], [True], [1, 3], [LENS], (), (1,), (1, 2), {}, {1: 2}, {1, 3}, Decimal("0.5"),
    range(3), "auto", "reference", masks.Band(), [masks.Band()], [masks.Band(least=0.5)], [masks.Band(exact=1)], [(1,)],
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 100, 101, 2**29, 2**29 + 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.5, 1.0, 2.5,
    0.999999999, math.nan, math.inf, -math.inf, 1e30, 1e-30, 1e31, 1e39, -1e39, 1e308, 1e-320, np.float32(0.5),
    np.int64(3), Fraction(1, 2),
]  # fmt: skip
SHAPES = [
    (), (0,), (1,), (2,), (5,), (2, 0), (5, 5), (1, 5), (4, 8), (1, 5, 2, 8), (1, 5, 1, 8), (1, 1, 2, 8), (1, 1, 1, 8),
    (1, 5, 2, 0), (1, 5, 0, 8), (1, 0, 2, 8), (0, 5, 2, 8), (1, 16, 1, 8), (1, 2, 5, 5), (2, 1, 1, 1, 1),
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.int32,
    torch.uint8, torch.bool,
]  # fmt: skip
TENSORS = [
    *map(torch.zeros, SHAPES),
    *(torch.ones(*x).to(y) for x, y in itertools.product([(1,), (2,), (5, 5), (1, 5), (1, 5, 2, 8)], DTYPES)),
    *(torch.zeros(shape, device="meta") for shape in [(2,), (5, 5), (1, 5, 2, 8), (1, 16, 1, 8)]),
    *(torch.zeros(shape, dtype=torch.int32, device="meta") for shape in [(1,), (1, 5), (2, 2)]),
    torch.zeros(5, 5).to_sparse(), Q.to_sparse(), Q.to_mkldnn(), torch.nested.nested_tensor([Q[0]]),
    torch.tensor([9, 3], dtype=torch.int32), torch.tensor([2**40]), torch.tensor([0, 5, 2]),
    torch.full((5, 5), math.nan),
]  # fmt: skip
PAIRS = [
    (IDS, IDS), (IDS,), (IDS, IDS, IDS), (IDS, None), (IDS, IDS[0]), [IDS, IDS], TABLES, list(TABLES), (TABLES[0], 1),
    (TABLES[0], TABLES[1].long()), (TABLES[0][:2], TABLES[1][:2]), (TABLES[0].to("meta"), TABLES[1]),
]  # fmt: skip
VALUES = [*OTHERS, *NUMBERS, *TENSORS, *PAIRS]


def described(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {'nested' if value.is_nested else tuple(value.shape)}"
    return f"{value!r:.60}"


def calls(function, base: dict):
    """Yield (name, value, arguments) for every parameter and value."""
    for name, value in itertools.product(inspect.signature(function).parameters, VALUES):
        yield name, value, base | {name: value}


def copied(arguments: dict) -> dict:
    """Copy the arguments, so that a call may write to caches."""
    return {name: x.clone() if name.endswith("_cache") and hasattr(x, "clone") else x for name, x in arguments.items()}


def outcome(function, arguments: dict, name: str, value):
    """Return the result of a call, or None if it is refused with a proper message."""
    try:
        return function(**copied(arguments))
    except REFUSALS as error:
        refusal = error
    except Exception as error:
        raise AssertionError(f"{name} {described(value)}") from error
    message = str(refusal)
    where = name, described(value), message
    assert message and "\n" not in message and len(message) < 300, where
    assert re.search(rf"\b{name}\b", message) or isinstance(refusal, NotImplementedError), where
    return None


def first(found):
    return found[0] if isinstance(found, tuple) else found


def assert_same(found, truth, what) -> None:
    torch.testing.assert_close(
        first(found), first(truth), rtol=2e-3, atol=2e-3, equal_nan=True, msg=lambda message: f"{what}: {message}"
    )


@pytest.mark.parametrize("impl", ["auto", "triton", "sdpa", "chunked", "reference"])
def test_attention(impl):
    taken = compared = 0
    for name, value, arguments in calls(attention, CALLS[attention] | {"impl": impl}):
        if name == "seed" and value is not None:
            arguments["dropout_p"] = 0.5
        found = outcome(attention, arguments, name, value)
        if found is None:
            continue
        taken += 1
        if name != "impl" and first(found).device.type != "meta":
            arguments.pop("impl")
            truth = attention_reference(**arguments)
            assert isinstance(found, tuple) == isinstance(truth, tuple) == (name == "return_lse" and value is True)
            assert_same(found, truth, (name, described(value)))
            compared += 1
    assert taken >= compared >= 40


@pytest.mark.parametrize("impl", ["auto", "triton", "torch", "reference"])
def test_attention_decode(impl):
    compared = 0
    for name, value, arguments in calls(attention_decode, CALLS[attention_decode] | {"impl": impl}):
        found = outcome(attention_decode, arguments, name, value)
        if found is None or name == "impl" or first(found).device.type == "meta":
            continue
        truth = attention_decode(**copied(arguments | {"impl": "reference"}))
        assert_same(found, truth, (name, described(value)))
        compared += 1
    assert compared >= 25


@pytest.mark.parametrize("function", list(CALLS)[1:], ids=lambda function: function.__name__)
def test_every_other_function(function):
    taken = sum(
        outcome(function, arguments, name, value) is not None
        for name, value, arguments in calls(function, CALLS[function])
    )
    assert taken >= 15


@pytest.mark.parametrize("function", MASKS, ids=lambda function: function.__name__)
def test_masks(function):
    taken = 0
    for name, value, arguments in calls(function, MASKS[function]):
        build = function
        if function is masks.Mask:
            build = lambda fn, params, **options: masks.Mask(fn, params, **options)
        if name == "T" and isinstance(value, int) and value == 2**29:
            continue  # right, and gigabytes
        found = outcome(build, arguments, name, value)
        taken += found is not None
        if isinstance(found, masks.Mask) and not any(row.is_meta for row in found.tensors):
            seen = found.dense(5, 5)
            assert seen.dtype == torch.bool and seen.shape[1:] == (1, 5, 5), (name, described(value))
    assert taken >= 1


def test_every_public_function_is_tested():
    public = {getattr(kernels, name) for name in kernels.__all__} - {masks}
    assert public == set(CALLS)
    own = {
        x for name, x in vars(masks).items() if inspect.isfunction(x) or inspect.isclass(x) if not name.startswith("_")
    }
    makers = {x for x in own if "q" not in inspect.signature(x).parameters and x.__module__.startswith("kernels.mask")}
    assert makers - {masks.lookup, masks.Band} == set(MASKS)

"""Decoding with a cache: agrees with the reference, and gives the same bits in any batch."""

import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kernels import attention_decode, masks
from kernels.attention_arguments import DecodeArguments
from kernels.attention_decode import _decode
from kernels.attention_decode_reference import rotated
from kernels.attention_decode_triton import SPLIT, DecodeProblem
from kernels.mask import FAR, Band
from kernels.operators import decode_call_of
from tests.decode_checks import (
    CASES,
    WINDOW,
    WINDOW_AND_SINKS,
    Case,
    Inputs,
    check,
    make_inputs,
    reference,
    run,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case, device):
    check(case, device)


def test_mask_with_a_value_for_each_row(device):
    mask = WINDOW | (masks.CAUSAL & masks.prefix(torch.tensor([0, 3, 200], dtype=torch.int32, device=device)))
    check(Case(lens=(500, 600, 700), mask=mask, page=16), device)


def test_new_keys_under_a_mask_that_hides_them(device):
    """No split with the new tokens is computed, but they are appended."""
    check(Case(lens=(300, 600), Tq=2, mask=masks.sink_tokens(7)), device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_path(case):
    """The path of "auto" on a CPU."""
    check(case, "cpu", impl="torch")


def test_torch_path_without_lse():
    inputs = make_inputs(Case(lens=(5, 5, 130), H=4, page=16), "cpu")
    out = attention_decode(inputs.q, inputs.k_cache, inputs.v_cache, inputs.cache_lens, **inputs.arguments)
    torch.testing.assert_close(out, run(reference, inputs)["out"], rtol=1e-6, atol=1e-6)


def test_reference_by_hand():
    """One query, two cached keys and a new one, with weights 1/4, 1/4 and 1/2; NaN behind them."""
    k, v = torch.full((1, 4, 1, 8), math.nan), torch.full((1, 4, 1, 8), math.nan)
    k[:, :2], v[0, 0], v[0, 1] = 0.0, 4.0, 8.0
    q = torch.ones(1, 1, 1, 8)
    k_new, v_new = torch.full((1, 1, 1, 8), math.log(2) / 8), torch.full((1, 1, 1, 8), 2.0)
    lens = torch.tensor([2], dtype=torch.int32)
    for impl in ("reference", "torch"):
        out = attention_decode(q, k, v, lens, k_new=k_new, v_new=v_new, scale=1.0, impl=impl)
        torch.testing.assert_close(out, torch.full_like(out, 4.0))
        assert torch.equal(v[0, 2], v_new[0, 0]) and torch.equal(k[0, 2], k_new[0, 0]) and v[0, 3].isnan().all()
    # The same three tokens, all in the cache.
    lens += 1
    torch.testing.assert_close(attention_decode(q, k, v, lens, scale=1.0), torch.full_like(out, 4.0))


def test_rotation_by_hand():
    """A quarter turn at position 1 turns the pair (x, y) into (-y, x)."""
    cos = torch.tensor([[1.0] * 4, [0.0] * 4])
    sin = torch.tensor([[0.0] * 4, [-1.0, -1.0, 1.0, 1.0]])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 2, 1, 4)
    turned = rotated(x, torch.tensor([[0, 1]]), (cos, sin))
    assert turned[0, :, 0].tolist() == [[1.0, 2.0, 3.0, 4.0], [-3.0, -4.0, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [(torch.float32, masks.CAUSAL), (torch.bfloat16, WINDOW_AND_SINKS)],
    ids=["fp32-causal", "bf16-window-and-sinks"],
)
def test_batch_invariance(dtype, mask, device):
    """A sequence gets the same bits alone and in a batch, in a short and a long cache, contiguous or in pages."""
    base = Case(dtype=dtype, mask=mask, features=("sinks",))
    placed = {5: make_inputs(replace(base, lens=(100,), capacity=101), device)}
    placed[2] = make_inputs(replace(base, lens=(700,), capacity=720), device)
    placed[5].arguments["sinks"] = placed[2].arguments["sinks"]
    expected = {b: run(attention_decode, alone, impl="triton") for b, alone in placed.items()}
    lens = (3, 520, 700, 0, 64, 100, 900, 255)
    for page in (0, 16):
        others = make_inputs(replace(base, lens=lens, page=page, seed=1), device)
        others.arguments["sinks"] = placed[2].arguments["sinks"]
        for b, alone in placed.items():
            put_in(others, b, alone, lens[b])
        got = run(attention_decode, others, impl="triton")
        for b, name in itertools.product(placed, ("out", "lse")):
            assert torch.equal(got[name][b], expected[b][name][0]), f"{name} of {lens[b]} tokens, pages of {page}"


def put_in(inputs: Inputs, b: int, alone: Inputs, n: int) -> None:
    """Replace sequence b by the single sequence of `alone`, n tokens long."""
    inputs.q[b] = alone.q[0]
    for name in ("k_new", "v_new"):
        inputs.arguments[name][b] = alone.arguments[name][0]
    table = inputs.arguments.get("block_table")
    for to, source in ((inputs.k_cache, alone.k_cache), (inputs.v_cache, alone.v_cache)):
        if table is None:
            to[b, :n] = source[0, :n]
        else:
            j = torch.arange(n, device=to.device)
            to[table[b].long()[j // 16], j % 16] = source[0, :n]


def test_keys_outside_a_window_are_not_read(device):
    """They hold NaN, which does not reach the output."""
    for mask, unseen in ((WINDOW, slice(0, 832)), (WINDOW_AND_SINKS, slice(64, 832))):
        inputs = make_inputs(Case(lens=(1000,), mask=mask), device)
        inputs.k_cache[0, unseen] = inputs.v_cache[0, unseen] = math.nan
        assert run(attention_decode, inputs, impl="triton")["out"].isfinite().all()


def problem(capacity: int, mask: masks.Mask, Tq: int = 1) -> DecodeProblem:
    q, cache = (torch.empty(1, T, 1, 16, device="meta") for T in (Tq, capacity))
    lens = torch.empty(1, dtype=torch.int32, device="meta")
    return DecodeProblem(decode_call_of(DecodeArguments(q, cache, cache, lens, mask=mask, scale=1.0)), "sm_90")


def test_the_mask_and_the_capacity_limit_the_splits():
    """A window has few splits, however long the cache."""
    assert problem(1 << 16, masks.CAUSAL).n_slots == (1 << 16) // SPLIT
    assert problem(SPLIT + 1, masks.FULL).n_slots == 2
    assert problem(1 << 16, masks.sliding_window(1)).n_slots == 1
    assert problem(1 << 16, masks.sliding_window(SPLIT)).n_slots == 2
    assert problem(1 << 16, masks.sliding_window(SPLIT), Tq=3).n_slots == 3
    assert problem(1 << 16, WINDOW_AND_SINKS).n_slots == 3
    assert problem(SPLIT, WINDOW_AND_SINKS).n_slots == 1
    assert problem(0, masks.CAUSAL).n_slots == 0
    rows = torch.ones(1, dtype=torch.int32, device="meta")
    by_row = masks.Mask(masks.is_prefix, rows, bands=[Band(k_end=rows)])
    assert problem(1 << 16, by_row).n_slots == (1 << 16) // SPLIT


def test_empty_batch_and_cache(device):
    check(Case(lens=(0, 0), capacity=0, new=False), device)
    empty = make_inputs(Case(lens=(), capacity=64), device)
    for impl in ("triton", "torch"):
        assert run(attention_decode, empty, impl=impl)["out"].shape == (0, 1, 2, 16)


def test_lengths_beyond_the_cache(device):
    """An unchecked wrong length does not write outside the cache: memory around it stays NaN."""
    memory = torch.full((3, 64, 1, 16), math.nan, device=device)
    cache = memory[1:2]
    cache[:] = 1.0
    new = torch.ones(1, 4, 1, 16, device=device)
    lens = torch.tensor([62], dtype=torch.int32, device=device)
    with mock.patch("kernels.attention_decode.check_lengths"):
        for n in (62, 1000, -7):
            attention_decode(new, cache, cache, lens.fill_(n), k_new=new, v_new=new, impl="triton")
    assert memory[0].isnan().all() and memory[2].isnan().all() and cache.isfinite().all()


def op_arguments(case: Case, device: str) -> tuple:
    inputs = make_inputs(case, device)
    caches = inputs.k_cache.nan_to_num(), inputs.v_cache.nan_to_num()
    arguments = DecodeArguments(inputs.q, *caches, inputs.cache_lens, **inputs.arguments, scale=0.25)
    return *decode_call_of(arguments), True


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_operator(impl, device):
    args = op_arguments(Case(lens=(20,), capacity=64, page=16 if impl == "torch" else 0), device)
    torch.library.opcheck(_decode, (*args, impl), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_compiles_as_one_graph(impl, device):
    """The graph changes caches in place while lengths grow."""
    inputs = make_inputs(Case(lens=(20, 70), capacity=128, features=("rotary",), mask=WINDOW), device)
    k, v = inputs.k_cache.clone(), inputs.v_cache.clone()

    def step(q, k, v, lens):
        return attention_decode(q, k, v, lens, **inputs.arguments, impl=impl) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = 2 * run(attention_decode, inputs, impl=impl)["out"]
        out = compiled(inputs.q, k, v, inputs.cache_lens)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        inputs.k_cache, inputs.v_cache = k.clone(), v.clone()
        inputs.cache_lens += 1


@pytest.mark.gpu
def test_cuda_graph():
    """A captured step reads the lengths on the device and waits for nothing."""
    inputs = make_inputs(Case(lens=(20, 300), D=64, dtype=torch.bfloat16, page=16, capacity=512), "cuda")
    args = inputs.q, inputs.k_cache, inputs.v_cache, inputs.cache_lens
    inputs.arguments["block_table"].copy_(torch.randperm(64, device="cuda").int().view(2, 32))
    for cache in args[1:3]:
        cache.nan_to_num_()
    attention_decode(*args, **inputs.arguments, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(*args, **inputs.arguments, impl="triton")
    for n in (21, 200):
        inputs.cache_lens.fill_(n)
        graph.replay()
        assert torch.equal(out, attention_decode(*args, **inputs.arguments, impl="triton"))


def test_has_no_gradients():
    inputs = make_inputs(Case(lens=(5,), capacity=64), "cpu")
    for impl in ("torch", "reference"):
        inputs.q = inputs.q.detach().requires_grad_()
        with pytest.raises(RuntimeError):
            run(attention_decode, inputs, impl=impl)["out"].sum().backward()


def wrong(**changes):
    """Make a valid call with some arguments replaced."""
    call = {
        "q": torch.zeros(2, 1, 4, 16),
        "k_cache": torch.zeros(2, 64, 2, 16),
        "v_cache": torch.zeros(2, 64, 2, 16),
        "cache_lens": torch.tensor([3, 64], dtype=torch.int32),
    }
    return attention_decode(**(call | changes))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "four axes", {"q": torch.zeros(2, 4, 16)}),
        (ValueError, "do not fit", {"q": torch.zeros(3, 1, 4, 16)}),
        (ValueError, "do not fit", {"v_cache": torch.zeros(2, 63, 2, 16)}),
        (ValueError, "k_cache .* do not fit", {"k_cache": torch.zeros(2, 64, 2, 24)}),
        (ValueError, "multiple of H_kv", {"q": torch.zeros(2, 1, 3, 16)}),
        (ValueError, "cache_lens must be int32", {"cache_lens": torch.tensor([3, 64])}),
        (ValueError, "do not fit a capacity of 64", {"cache_lens": torch.tensor([3, 65], dtype=torch.int32)}),
        (ValueError, "do not fit a capacity", {"k_new": torch.zeros(2, 1, 2, 16), "v_new": torch.zeros(2, 1, 2, 16)}),
        (ValueError, "must be passed together", {"k_new": torch.zeros(2, 1, 2, 16)}),
        (ValueError, "k_new must be", {"k_new": torch.zeros(2, 2, 2, 16), "v_new": torch.zeros(2, 2, 2, 16)}),
        (TypeError, "one dtype", {"k_cache": torch.zeros(2, 64, 2, 16).half()}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "sinks must have", {"sinks": torch.zeros(3)}),
        (ValueError, "rotary must be two tables", {"rotary": (torch.zeros(64, 8), torch.zeros(64, 8))}),
        (ValueError, "rotary has 63", {"rotary": (torch.zeros(63, 16), torch.zeros(63, 16))}),
        (ValueError, "each of 2 rows", {"mask": masks.prefix(torch.zeros(3, dtype=torch.int32))}),
        (ValueError, "unknown impl 'cuda'", {"impl": "cuda"}),
        (ValueError, "multiple of 16", {"block_table": torch.zeros(2, 1, dtype=torch.int32),
                                        "k_cache": torch.zeros(2, 24, 2, 16), "v_cache": torch.zeros(2, 24, 2, 16)}),
        (ValueError, "block_table must be int32", {"block_table": torch.zeros(2, 1)}),
        (ValueError, "block_table names pages", {"block_table": torch.full((2, 1), 2, dtype=torch.int32)}),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(error, message, changes):
    wrong()
    with pytest.raises(error, match=message):
        wrong(**changes)


def test_triton_refuses_an_unsupported_head_dim(device):
    tensors = {name: torch.zeros(2, T, 2, 300, device=device) for name, T in (("q", 1), ("k_cache", 8), ("v_cache", 8))}
    with pytest.raises(NotImplementedError, match="head_dim 300"):
        attention_decode(**tensors, cache_lens=torch.zeros(2, dtype=torch.int32, device=device), impl="triton")


def test_a_cache_beyond_the_largest_position_is_refused():
    q, cache = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16).expand(1, FAR, 1, 16)
    with pytest.raises(ValueError, match=f"the lengths of q and k_cache must be below {FAR}, not 1 and {FAR}"):
        attention_decode(q, cache, cache, torch.ones(1, dtype=torch.int32))

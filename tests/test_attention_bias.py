"""A bias of any finite size on every path, such as padding of -1e9 or of a dtype's least number over a whole row."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from kernels import attention, attention_decode, attention_reference, dispatch, masks
from kernels.bias import add_bias, largest, row_shift
from tests.attention_checks import (
    Case,
    Inputs,
    assert_close,
    make_inputs,
    poisoned_outputs,
    root_mean_square,
    rounded_delta_loss,
    run,
    truth_and_plain,
)
from tests.rounding import attention_deviation
from tests.test_attention_dispatch import on_cpu

LEAST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float16, torch.bfloat16)}
LEVELS = [-1e4, -1e7, -3e7, -1e9, -1e13, -1e16, -1e30, LEAST[torch.float32], 1e9, -LEAST[torch.float32]]
IMPLEMENTATIONS = ["triton", "chunked", "reference"]
WHOLE = Case(33, 40, H=2, H_kv=1, D=16, mask=masks.FULL, features=("bias",), bias_axes="q")
ALL_FEATURES = ("softcap", "alibi", "bias", "sinks", "segments", "dropout")


def with_bias(case: Case, bias: torch.Tensor, device: str) -> Inputs:
    inputs = make_inputs(case, device)
    inputs.differentiable["bias"] = bias.to(device)
    return inputs


def check(case: Case, bias: torch.Tensor, device: str, impl: str) -> None:
    """Apply the rule of attention_checks.py, and check lse and finiteness of every element."""
    inputs = with_bias(case, bias, device)
    with poisoned_outputs():
        ours = run(attention, inputs, impl=impl)
    truth, plain = truth_and_plain(inputs)
    losses = rounded_delta_loss(inputs, ours["out"].double() - truth["out"], tuple(inputs.differentiable))
    deviations = attention_deviation(inputs, case.dtype)
    torch.testing.assert_close(ours["lse"].double(), truth["lse"].double(), rtol=2e-7, atol=2e-5)
    for name in truth:
        assert name == "lse" or ours[name].isfinite().all(), name
        loss = losses.get(name) if case.dtype != torch.float32 else None
        assert_close(name, ours[name], plain[name], truth[name], case.dtype, deviations[name], loss)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_large_bias_on_whole_rows(level, impl, device):
    bias = torch.full(WHOLE.bias_shape(), level)
    bias[:, :, ::3] = torch.randn(11, 1, generator=torch.Generator().manual_seed(1))
    check(WHOLE, bias, device, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", LEAST, ids=lambda dtype: str(dtype)[6:])
def test_left_padding(dtype, impl, device):
    """The first queries see only padding, which is each dtype's least number."""
    for level in (-1e4, LEAST[dtype]):
        bias = torch.zeros(2, 1, 1, 40, dtype=dtype)
        bias[0, ..., :13], bias[1, ..., :31] = level, level
        check(Case(40, 40, B=2, H=4, H_kv=2, dtype=dtype, features=("bias",)), bias, device, impl)


def mixed(shape: tuple[int, ...], level: float) -> torch.Tensor:
    """Make rows that are all at a level, small, about a level, half at it, partly -inf, and all -inf."""
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(shape, generator=generator)
    rows, keys = shape[2:]
    kind = torch.arange(rows).remainder(6)[:, None]
    left = torch.arange(keys)[None] % 3 == 0
    bias = torch.where(kind == 0, torch.tensor(level), bias)
    bias = torch.where(kind == 2, level + 3 * bias, bias)
    bias = torch.where((kind == 3) & left, torch.tensor(level), bias)
    bias = torch.where(kind == 4, torch.where(left, torch.tensor(level), -math.inf), bias)
    return torch.where(kind == 5, -math.inf, bias)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("level", [-1e9, LEAST[torch.float32], 1e9])
def test_rows_with_different_biases(level, impl, device):
    axes = "bhqk" if level == -1e9 else "qk"
    case = Case(37, 70, B=2, D=24, Dv=40, features=("bias",), bias_axes=axes, mask=masks.sliding_window(30), scale=0.4)
    check(case, mixed(case.bias_shape(), level), device, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", LEAST, ids=lambda dtype: str(dtype)[6:])
def test_with_every_feature(dtype, impl, device):
    case = Case(40, 40, B=2, H=4, H_kv=2, dtype=dtype, mask=masks.strided(3), features=ALL_FEATURES, bias_axes="hqk")
    check(case, mixed(case.bias_shape(), -1e9), device, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("sink", [-1e9, 1e9, LEAST[torch.float32], -LEAST[torch.float32], -math.inf])
@pytest.mark.parametrize("level", [None, -1e9, 0.5])
def test_sinks_of_any_size(level, sink, impl, device):
    """A sink far below a row vanishes; one far above takes all weight and lse's gradient. Two rows see no key."""
    case = Case(22, 20, features=("sinks",) if level is None else ("sinks", "bias"), bias_axes="q")
    inputs = make_inputs(case, device)
    inputs.differentiable["sinks"] = torch.tensor([sink, 0.3], device=device)
    if level is not None:
        inputs.differentiable["bias"] = torch.full((22, 1), level, device=device)
    ours, truth = run(attention, inputs, impl=impl), run(attention_reference, inputs, torch.float64)
    for name in truth:
        torch.testing.assert_close(ours[name].double(), truth[name].double(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scores_of_minus_infinity(impl, device):
    """They hide their keys, for any bias."""
    q, k, v = (torch.ones(1, 20, 1, 16, device=device) for _ in range(3))
    k[:, :7] = -math.inf
    bias = torch.tensor([[-1e9], [0.0]], device=device).repeat(10, 1)
    out, lse = attention(q, k, v, bias=bias, return_lse=True, impl=impl)
    assert (out[:, :7] == 0).all() and (out[:, 7:] - 1).abs().max() < 1e-6
    assert (lse[..., :7] == -math.inf).all() and lse[..., 7:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("level", [0.0, -1e9])
@pytest.mark.parametrize("where", ["score", "bias"])
def test_a_nan_reaches_only_its_own_row(where, level, impl, device):
    q, k, v = (torch.ones(1, 40, 1, 16, device=device) for _ in range(3))
    bias = torch.full((40, 40), level, device=device)
    if where == "score":
        q[:, 20] = math.nan
    else:
        bias[20, 7] = math.nan
    out, lse = attention(q, k, v, bias=bias, return_lse=True, impl=impl)
    assert out[0, 20].isnan().all() and lse[0, 0, 20].isnan()
    others = torch.arange(40, device=device) != 20
    assert (out[:, others] - 1).abs().max() < 1e-6 and lse[..., others].isfinite().all()


def naive(q, k, v, bias, mask):
    """Compute softmax(s + bias) in float64, and lse."""
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)) * q.shape[3] ** -0.5
    s = (s + bias).masked_fill(~mask.dense(q.shape[1], k.shape[1]), -math.inf)
    p = torch.softmax(s, dim=-1)
    return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)), s.logsumexp(-1)


@on_cpu
@pytest.mark.parametrize("impl", ["reference", "chunked", "triton", "auto"])
@pytest.mark.parametrize("level", LEVELS)
def test_paths_agree_with_softmax_in_float64(level, impl):
    """Plain softmax, without attention_reference: float32 results are within float32's rounding of it."""
    inputs = with_bias(replace(WHOLE, mask=masks.CAUSAL, Tk=33), torch.full((33, 33), level), "cpu")
    tensors = {name: x.double().requires_grad_() for name, x in inputs.differentiable.items()}
    out, lse = naive(**tensors, mask=masks.CAUSAL)
    grads = torch.autograd.grad((out * inputs.dout).sum(), list(tensors.values()))
    dtypes = [torch.float32] if impl == "triton" else [torch.float32, torch.float64]
    for dtype in dtypes:
        leaves = {name: x.to(dtype).detach().requires_grad_() for name, x in inputs.differentiable.items()}
        found, found_lse = attention(**leaves, impl=impl, return_lse=True)
        plain = attention(**leaves, impl=impl)
        found_grads = torch.autograd.grad((plain * inputs.dout).sum(), list(leaves.values()))
        tolerance = 2e-5 if dtype == torch.float32 else 1e-8
        for ours, theirs in zip((found, plain, *found_grads), (out, out, *grads)):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found_lse.double(), lse, rtol=2e-7 if dtype == torch.float32 else 1e-15, atol=2e-5)


@on_cpu
@pytest.mark.parametrize("dtype", LEAST, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("level", [-1e4, -3e7, -1e9, -1e30, LEAST[torch.float32]])
def test_auto_on_a_cpu(level, dtype, monkeypatch, caplog):
    """torch's attention gets biases relative to their row's largest, and none that would round scores in float64."""
    monkeypatch.setattr(dispatch, "_announced", set())
    case = Case(24, 24, B=2, H=4, H_kv=2, dtype=dtype, features=("bias",), bias_axes="hqk")
    inputs = with_bias(case, mixed(case.bias_shape(), level), "cpu")
    results = []
    for fn, kind in ((attention, dtype), (attention_reference, torch.float64), (attention_reference, dtype)):
        leaves = [x.to(kind if name != "bias" else x.dtype).detach() for name, x in inputs.differentiable.items()]
        leaves = dict(zip(inputs.differentiable, (x.requires_grad_() for x in leaves)))
        if kind == torch.float64:
            leaves["bias"] = leaves["bias"].detach().double().requires_grad_()
        with caplog.at_level(logging.INFO, logger="kernels"):
            out = fn(**leaves)
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), inputs.dout.to(kind))))
    path = caplog.records[0].getMessage().split()[3].rstrip(":")
    assert path == ("sdpa" if abs(level) < 2**29 else "reference")
    for ours, truth, plain in zip(*results):
        scale = root_mean_square(truth)
        allowed = 3 * root_mean_square(plain.double() - truth) + (2e-6 if dtype == torch.float32 else 1e-2) * scale
        assert root_mean_square(ours.double() - truth) <= allowed


@on_cpu
def test_sdpa_refuses_what_it_would_lose():
    q = torch.randn(1, 5, 2, 8)
    for level in (-(2.0**29), 2.0**29, LEAST[torch.float32]):
        with pytest.raises(NotImplementedError, match="loses a bias of 536870912 or more"):
            attention(q, q, q, bias=torch.full((5, 1), level), impl="sdpa")
    for level in (-5e8, -math.inf, math.nan):
        attention(q, q, q, bias=torch.full((5, 1), level), impl="sdpa")


@pytest.mark.parametrize("impl", ["triton", "chunked", "reference", "auto"])
def test_a_large_bias_under_compile(impl, device):
    """A graph cannot read the values of the bias."""
    torch._dynamo.reset()
    inputs = with_bias(replace(WHOLE, Tk=33), mixed((1, 2, 33, 33), -1e9), device)
    leaves = [x.detach().requires_grad_() for x in inputs.differentiable.values()]

    def loss(q, k, v, bias):
        out = attention(q, k, v, bias=bias, impl=impl)
        _, lse = attention(q, k, v, bias=bias, return_lse=True, impl=impl)
        return (out * inputs.dout).sum() + lse.masked_fill(lse == -math.inf, 0.0).sum() * 1e-9

    ours, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@on_cpu
def test_under_vmap():
    """vmap cannot read the values of the bias either."""
    q, biases = torch.randn(1, 9, 2, 8), mixed((3, 1, 9, 9), -1e9)
    expected = torch.stack([attention_reference(q, q, q, bias=bias) for bias in biases])
    found = torch.func.vmap(lambda bias: attention(q, q, q, bias=bias))(biases)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sink", [-1e9, 1e9, -LEAST[torch.float32], LEAST[torch.float32]])
def test_decoding_with_sinks_of_any_size(sink, device):
    q, cache = torch.randn(1, 1, 2, 16, device=device), torch.randn(1, 32, 1, 16, device=device)
    lens = torch.tensor([20], dtype=torch.int32, device=device)
    sinks = torch.tensor([sink, 0.3], device=device)
    found = [
        attention_decode(q, cache, cache, lens, sinks=sinks, return_lse=True, impl=impl)
        for impl in ("triton", "torch", "reference")
    ]
    for out, lse in found:
        assert out.isfinite().all() and lse.isfinite().all()
        torch.testing.assert_close(out, found[-1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, found[-1][1], rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_rounded_as_float64_rounds_them(dtype):
    """To multiples of 2^-52 times the power of two, if that is coarser than float32's step."""
    s = torch.linspace(-9, 9, 31, dtype=dtype)
    for power in range(0, 128, 3):
        for size in (1.0, 1.5, 2 - 2**-20):
            step = 2.0 ** (power - 52)
            kept = s if power < 29 else ((s.double() / step).round() * step).to(dtype)
            for shift in (size * 2.0**power, -size * 2.0**power):
                shift = torch.tensor([shift], dtype=dtype)
                torch.testing.assert_close(add_bias(s, shift, shift), kept, rtol=3e-7, atol=1e-15)


def test_row_shift_is_the_largest_visible_bias():
    bias = torch.tensor([[1.0, 5.0, 3.0], [-math.inf, -math.inf, 2.0], [math.nan, 0.0, 0.0]])
    visible = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    assert row_shift(bias, visible)[:2].tolist() == [[3.0], [0.0]] and row_shift(bias, visible)[2].isnan()
    assert row_shift(bias[:2], visible[:2], torch.tensor([4.0])).tolist() == [[4.0], [4.0]]
    assert row_shift(bias[:2, :0], visible[:2, :0]).tolist() == [[0.0], [0.0]]


def test_the_largest_finite_bias():
    assert largest(torch.tensor([1.0, -3.0, math.inf, -math.inf])) == 3.0
    assert largest(torch.zeros(0)) == largest(torch.tensor([-math.inf])) == 0.0
    assert math.isnan(largest(torch.tensor([math.nan])))
    assert largest(torch.zeros(2, device="meta")) == math.inf

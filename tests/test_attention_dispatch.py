"""Which path a call takes, that each path is correct, and the reason if one is impossible."""

import logging
import subprocess
import sys
import textwrap

import pytest
import torch

from kernels import attention, attention_reference, attention_sdpa, dispatch, masks
from kernels.dispatch import INTERPRETED
from tests.attention_checks import Case, assert_close, make_inputs
from tests.rounding import attention_deviation

on_cpu = pytest.mark.skipif(not INTERPRETED, reason="what auto means on a CPU")


def qkv(Tq=7, Tk=7, H=4, H_kv=2, D=8, Dv=8, **options):
    shapes = (2, Tq, H, D), (2, Tk, H_kv, D), (2, Tk, H_kv, Dv)
    return [torch.randn(shape, requires_grad=True, **options) for shape in shapes]


def chosen(monkeypatch, caplog, **call) -> str:
    """Return the path that auto logs."""
    monkeypatch.setattr(dispatch, "_announced", set())
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        inputs = call.pop("inputs", None) or qkv()
        attention(*inputs, **call)
        attention(*inputs, **call)
    (record,) = caplog.records
    return record.getMessage().split()[3].rstrip(":")


@on_cpu
def test_the_choice_of_auto_is_logged_once(monkeypatch, caplog):
    def choice(**call):
        return chosen(monkeypatch, caplog, **call)

    assert choice() == "sdpa"
    assert choice(mask=masks.FULL) == "sdpa"
    assert choice(inputs=qkv(1, 9)) == "sdpa"
    assert choice(mask=masks.sliding_window(3) | masks.sink_tokens(1)) == "sdpa"
    assert choice(alibi_slopes=torch.rand(4), bias=torch.randn(7, 7)) == "sdpa"
    assert choice(segment_ids=torch.zeros(2, 7, dtype=torch.int32)) == "sdpa"
    assert choice(inputs=qkv(9, 7)) == "reference"
    assert choice(mask=masks.sink_tokens(0)) == "reference"
    assert choice(softcap=3.0) == "reference"
    assert choice(sinks=torch.zeros(4)) == "reference"
    assert choice(dropout_p=0.1) == "reference"
    assert choice(return_lse=True) == "reference"


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_auto_avoids_torchs_16_bit_kernel_without_avx512(dtype, monkeypatch, caplog):
    """From 64 queries on it packs keys for AVX-512, even if ATEN_CPU_CAPABILITY disables that, and fails."""
    inputs = {T: [x.detach() for x in qkv(T, T, dtype=dtype)] for T in (63, 64)}
    possible = ["reference"] if attention_sdpa.CANNOT_PACK else ["sdpa", "reference"]
    for path in possible:
        monkeypatch.setattr(attention_sdpa, "CANNOT_PACK", path == "reference")
        assert chosen(monkeypatch, caplog, inputs=inputs[63]) == "sdpa"
        assert chosen(monkeypatch, caplog, inputs=inputs[64]) == path
    assert chosen(monkeypatch, caplog, inputs=[x.float() for x in inputs[64]]) == "sdpa"
    with pytest.raises(NotImplementedError, match="ATEN_CPU_CAPABILITY disables"):
        attention(*inputs[64], impl="sdpa")


MASKS = {
    "causal": masks.CAUSAL,
    "full": masks.FULL,
    "window": masks.sliding_window(3),
    "composed": masks.CAUSAL & (masks.sliding_window(2) | masks.sink_tokens(1)),
    "sinks": masks.sink_tokens(2),
}


@on_cpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("Tq", "Tk"), [(7, 7), (1, 9), (3, 9), (9, 4)])
@pytest.mark.parametrize(("H", "H_kv"), [(4, 4), (4, 2), (3, 1)])
def test_auto_on_a_cpu_is_right(mask, Tq, Tk, H, H_kv):
    """Values and gradients, twice: the second call finds its mask in the cache."""
    inputs = qkv(Tq, Tk, H, H_kv, Dv=6, dtype=torch.float64)
    extras = ({}, {"alibi_slopes": torch.rand(H), "bias": torch.randn(H, 1, Tk, dtype=torch.float64)}, {})
    for extra in extras:
        results = []
        for fn in (attention, attention_reference):
            out = fn(*inputs, mask=mask, scale=0.7, **extra)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@on_cpu
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scale", [0, -0.6, 1e-320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_that_are_not_positive(dtype, scale, mask):
    inputs = qkv(dtype=dtype)
    results = []
    for fn in (attention, attention_reference):
        out = fn(*inputs, mask=mask, scale=scale)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    share = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps  # of the largest element
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=share * float(expected.abs().max()))


@on_cpu
def test_segments_on_a_cpu():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 1, 1, 1, 1, 1]], dtype=torch.int32)
    inputs = qkv(dtype=torch.float64)
    torch.testing.assert_close(
        attention(*inputs, segment_ids=ids), attention_reference(*inputs, segment_ids=ids), rtol=1e-6, atol=1e-6
    )
    pair = ids, torch.full_like(ids, 9)
    assert (attention(*inputs, segment_ids=pair) == 0).all()


@on_cpu
def test_bias_gets_its_gradient_on_a_cpu():
    inputs = qkv()
    bias = torch.randn(4, 7, 1, requires_grad=True)
    grads = [
        torch.autograd.grad(fn(*inputs, bias=bias).square().sum(), bias)[0] for fn in (attention, attention_reference)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@on_cpu
def test_the_cache_of_dense_masks_is_bounded():
    mask = masks.sliding_window(3) & masks.FULL
    for T in range(2, 60):
        attention(*qkv(T, T + 1), mask=mask)
    assert 0 < len(mask.dense_cache) <= 16


def first_keys(q, k, n):
    return k < n


REFUSED = [
    ({"inputs": [torch.zeros(2, 7, 4)] * 3}, ValueError, "axes"),
    ({"inputs": [torch.zeros(1, 7, 3, 8), *[torch.zeros(1, 7, 2, 8)] * 2]}, ValueError, "multiple of H_kv"),
    ({"inputs": [torch.zeros(1, 7, 2, 8), *[torch.zeros(2, 7, 2, 8)] * 2]}, ValueError, "do not fit"),
    ({"inputs": [torch.zeros(1, 7, 2, 8), torch.zeros(1, 7, 2, 9), torch.zeros(1, 7, 2, 8)]}, ValueError, "do not fit"),
    ({"inputs": [torch.zeros(1, 7, 2, 8), *[torch.zeros(1, 7, 2, 8).double()] * 2]}, TypeError, "one dtype"),
    (
        {"inputs": [torch.zeros(1, 7, 2, 8, dtype=torch.int32)] * 3},
        TypeError,
        "q must be float64, float32, float16 or bfloat16",
    ),
    ({"impl": "flash"}, ValueError, "auto, triton, sdpa, chunked or reference"),
    ({"segment_ids": torch.zeros(2, 7)}, ValueError, "int32"),
    ({"segment_ids": torch.zeros(2, 6, dtype=torch.int32)}, ValueError, "int32"),
    ({"inputs": qkv(3, 7), "segment_ids": torch.zeros(2, 7, dtype=torch.int32)}, ValueError, "pair"),
    ({"softcap": 0.0}, ValueError, "softcap"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"alibi_slopes": torch.zeros(2)}, ValueError, "each of 4 heads"),
    ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "have no gradient"),
    ({"sinks": torch.zeros(4, 1)}, ValueError, "each of 4 heads"),
    ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks must be float64"),
    ({"alibi_slopes": torch.zeros(4, dtype=torch.complex64)}, TypeError, "alibi_slopes must be float64"),
    ({"bias": torch.zeros(3, 7)}, ValueError, "broadcast"),
    ({"bias": torch.zeros(1, 1, 1, 7, 7)}, ValueError, "broadcast"),
    ({"bias": torch.zeros(7, 7, device="meta")}, ValueError, "one device"),
    ({"mask": masks.Mask(first_keys, torch.zeros(3, dtype=torch.int32))}, ValueError, "each of 2 rows"),
    ({"dropout_p": 1.0}, ValueError, "below 1"),
    ({"dropout_p": -0.1}, ValueError, "below 1"),
    ({"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "one-element int64"),
    ({"impl": "sdpa", "softcap": 1.0}, NotImplementedError, "no softcap"),
    ({"impl": "sdpa", "inputs": qkv(9, 4)}, NotImplementedError, "may see no key"),
    ({"impl": "triton", "inputs": qkv(dtype=torch.float64)}, NotImplementedError, "float64"),
    ({"impl": "triton", "inputs": qkv(D=7)}, NotImplementedError, "head_dim 7"),
    ({"impl": "triton", "inputs": qkv(Dv=257)}, NotImplementedError, "head_dim 257"),
]


@on_cpu
@pytest.mark.parametrize(("call", "error", "text"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_invalid_calls_are_refused(call, error, text):
    call = dict(call)
    inputs = call.pop("inputs", None) or qkv()
    with pytest.raises(error, match=text):
        attention(*inputs, **call)


@on_cpu
def test_triton_without_a_gpu_gives_the_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(
        NotImplementedError, match=r"cannot do this call: cpu is not a GPU from sm_80 up: .*INTERPRET=1"
    ):
        attention(*qkv(), impl="triton")


def test_without_triton():
    """All other paths work without triton, and impl="triton" gives the reason."""
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from kernels import attention, attention_reference, attention_sdpa, masks
        q = torch.randn(1, 5, 2, 8)
        mask = masks.CAUSAL & (masks.sliding_window(2) | masks.sink_tokens(1))
        assert mask.dense(3, 3)[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
        torch.testing.assert_close(attention(q, q, q, mask=mask), attention_reference(q, q, q, mask=mask))
        try:
            attention(q, q, q, impl="triton")
        except NotImplementedError as error:
            assert "does not import" in str(error) and "triton" in str(error), error
        else:
            raise AssertionError("impl='triton' ran")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


@on_cpu
@pytest.mark.parametrize("T", [1, 17, 256, 257], ids="T{}".format)
@pytest.mark.parametrize("H_kv", [4, 1], ids="Hkv{}".format)
def test_short_bfloat16_training_on_a_cpu_is_right(T, H_kv):
    """By the rule for the kernels, also under autocast, which must not change the dtypes inside."""
    for autocast in (False, True):
        check_auto(Case(T, T, H=4, H_kv=H_kv, D=24, Dv=16, dtype=torch.bfloat16), autocast)


def check_auto(case: Case, autocast: bool) -> None:
    inputs = make_inputs(case, "cpu")

    def run_plainly(fn, dtype=torch.bfloat16, **options):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs.differentiable.values()]
        out = fn(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, inputs.dout.to(dtype))]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = run_plainly(attention)
    truth = run_plainly(attention_reference, torch.float64)
    plain = run_plainly(attention_reference, upcast=False)
    inputs.dlse.zero_()
    deviations = attention_deviation(inputs, torch.bfloat16)
    for name, *tensors in zip(("out", "dq", "dk", "dv"), ours, plain, truth):
        assert tensors[0].dtype == torch.bfloat16
        assert_close(name, *tensors, torch.bfloat16, deviations[name])

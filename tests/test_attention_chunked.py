"""The chunked path: the same function as the reference, in little memory."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import attention, attention_chunked, masks
from tests.attention_checks import Case, check, make_inputs, run
from tests.test_masks import BUILT_IN, COMPOSED

FEATURES = ("softcap", "alibi", "bias", "sinks", "segments", "dropout")
CASE = Case(150, 190, B=2, H=4, H_kv=2, D=12, Dv=20)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make chunks so small that a test has several, some with gaps between their keys."""
    monkeypatch.setattr(attention_chunked, "SCORES", 4096)
    monkeypatch.setattr(attention_chunked, "TILE", 16)


@pytest.mark.parametrize("name", [*BUILT_IN, *COMPOSED])
def test_every_mask(name):
    mask = BUILT_IN.get(name) or COMPOSED[name]
    check(replace(CASE, mask=mask, B=max([1, *(len(t) for t in mask.tensors)])), "cpu", impl="chunked")


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature(feature):
    check(replace(CASE, features=(feature,), mask=masks.sliding_window(50)), "cpu", impl="chunked")


@pytest.mark.parametrize("axes", ["bhqk", "hqk", "qk", "bk", "q", ""])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_all_features_together(axes, dtype):
    mask = masks.CAUSAL & (masks.sliding_window(30) | masks.strided(41))
    case = replace(CASE, features=FEATURES, bias_axes=axes, dtype=dtype, mask=mask, seed=3)
    check(case, "cpu", impl="chunked")


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (1, 200), (200, 1), (129, 60)])
def test_different_numbers_of_queries_and_keys(Tq, Tk):
    check(Case(Tq, Tk, features=("sinks",)), "cpu", impl="chunked")
    check(Case(Tq, Tk), "cpu", impl="chunked")


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_batches_and_lengths(B, Tq, Tk):
    q, k = (torch.randn(B, T, 2, 8, requires_grad=True) for T in (Tq, Tk))
    out, lse = attention(q, k, k, return_lse=True, impl="chunked")
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


def test_the_check_finds_a_missing_key(monkeypatch):
    real = attention_chunked._keys
    monkeypatch.setattr(attention_chunked, "_keys", lambda tiles, Tk, device: real(tiles[:-1], Tk, device))
    with pytest.raises(AssertionError):
        check(CASE, "cpu", impl="chunked")


def test_auto_uses_the_chunked_path_for_large_matrices(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.attention"], "MOST_SCORES", 60 * 60)
    calls = []
    monkeypatch.setattr(
        sys.modules["kernels.attention"], "attend_chunked", lambda *call: calls.append(call) or (None, None)
    )
    small, large = (make_inputs(Case(T, T), "cpu").differentiable for T in (42, 61))
    for inputs, features, expected in (
        (small, {"softcap": 2.0}, 0),
        (large, {"softcap": 2.0}, 1),
        (large, {}, 0),
        (large, {"mask": masks.FULL}, 0),
        (large, {"mask": masks.sliding_window(9)}, 1),
        (large, {"alibi_slopes": torch.rand(2)}, 1),
        (small, {"mask": masks.sliding_window(9)}, 0),
    ):
        calls.clear()
        if torch.cuda.is_available():
            pytest.skip("what auto means on a CPU")
        attention(**inputs, **features)
        assert len(calls) == expected, features


def test_same_dropout_as_the_reference():
    inputs = make_inputs(replace(CASE, features=("dropout",)), "cpu")
    ours, theirs = (run(attention, inputs, impl=impl)["out"] for impl in ("chunked", "reference"))
    torch.testing.assert_close(ours, theirs)


MEMORY = """
import resource, sys
import torch
from kernels import attention, masks
torch.set_num_threads(2)
q, k, v = (torch.randn(1, 16384, 2, 64, requires_grad=True) for _ in range(3))
sinks = torch.zeros(2, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attention(q, k, v, mask=masks.sliding_window(512), softcap=20.0, sinks=sinks)
out.square().mean().backward()
assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_long_windows_need_little_memory():
    """T = 16k: one matrix of scores would be 2 GiB in float32; out and the gradients alone are 34 MB."""
    program = textwrap.dedent(MEMORY)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 200 * 1024, f"{int(done.stdout) >> 10} MiB more than before the call"

"""The attention benchmark with a stub timer: FLOPs, pairing, the record, and the message without a GPU."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import attention as benchmark
from benchmarks.attention import FLASH, FLEX, OURS, Setting
from kernels import attention, attention_reference

SMALL = Setting(16, 32, "causal", "forward", tokens=64, width=32)


def test_flops_are_counted_as_flash_attention_does():
    """FlashAttention's count: 4 T T D H B forward, half of it causal, 2.5 times as much backward."""
    full = Setting(128, 4096, "full", "forward")
    assert full.shape == (4, 4096, 16, 128)
    assert full.flops() == 4 * 4 * 16 * 4096**2 * 128
    assert Setting(128, 4096, "causal", "forward").flops() == full.flops() / 2
    assert Setting(128, 4096, "full", "backward").flops() == 2.5 * full.flops()
    pairs = sum(min(q + 1, 512) for q in range(4096))
    assert Setting(128, 4096, "window", "forward").flops() == pytest.approx(4 * 4 * 16 * pairs * 128, rel=1e-3)
    assert Setting(64, 256, "window", "forward").flops() == Setting(64, 256, "causal", "forward").flops()


def contenders():
    def not_here(q, k, v, mask):
        raise RuntimeError("no such back end\nand more of it")

    return {
        OURS: lambda q, k, v, mask: attention(q, k, v, mask=benchmark.MASKS[mask], impl="sdpa"),
        FLASH: lambda q, k, v, mask: attention_reference(q, k, v, mask=benchmark.MASKS[mask]),
        FLEX: not_here,
    }


class StubTimer:
    """A timer that runs the call. Ours takes 1 ms and the other 3 ms; they swap places each round."""

    def __init__(self):
        self.calls = 0

    def __call__(self, fn) -> float:
        fn()
        first, second = (1.0, 3.0) if self.calls // 2 % 2 == 1 else (3.0, 1.0)
        self.calls += 1
        return (first, second)[self.calls % 2 == 0]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_measures_medians_and_speedups(direction, mask):
    """Medians follow the contender although the order rotates; a contender that cannot run is reported, not fatal."""
    setting = Setting(16, 32, mask, direction, tokens=64, width=32)
    row = benchmark.measure(setting, contenders(), StubTimer(), rounds=4, device="cpu")
    assert row.milliseconds == {OURS: 1.0, FLASH: 3.0}
    assert row.tflops[OURS] == pytest.approx(setting.flops() / 1e-3 / 1e12)
    assert row.speedup == {FLASH: 3.0}
    assert row.missing == {FLEX: "no such back end"}


def test_contenders_must_agree():
    wrong = contenders() | {FLASH: lambda q, k, v, mask: attention_reference(q, k, v, mask=benchmark.MASKS["full"])}
    with pytest.raises(AssertionError, match="something else"):
        benchmark.measure(SMALL, wrong, StubTimer(), rounds=1, device="cpu")


def test_ours_must_run():
    broken = {OURS: contenders()[FLEX]}
    with pytest.raises(RuntimeError, match="no such back end"):
        benchmark.measure(SMALL, broken, StubTimer(), rounds=1, device="cpu")


def test_flash_is_left_out_for_windows():
    row = benchmark.measure(
        Setting(16, 32, "window", "forward", tokens=64, width=32), contenders(), lambda fn: 1.0, rounds=2, device="cpu"
    )
    assert row.missing[FLASH] == "no sliding window"


def test_results_are_written_and_printed(tmp_path, capsys):
    row = benchmark.measure(SMALL, contenders(), StubTimer(), rounds=2, device="cpu")
    assert benchmark.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    path = tmp_path / "results" / "x.json"
    assert benchmark.write_record(path, "attention", "stub", {"torch": "x"}, rows=[asdict(row)]) == path
    record = json.loads(path.read_text())
    assert record["rows"][0]["setting"]["T"] == 32 and record["rows"][0]["milliseconds"][OURS] == 1.0
    assert record["conditions_before"] == {"torch": "x"} and record["conditions_after"]["torch"] == torch.__version__
    benchmark.show([row], "stub")
    assert "stub" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_without_a_gpu_it_measures_nothing(capsys):
    assert benchmark.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1

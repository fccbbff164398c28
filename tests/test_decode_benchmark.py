"""The decode benchmark with a stub timer: bytes, pairing, shares, and the message without a GPU."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import decode as benchmark
from benchmarks.decode import Setting


def test_bytes_count_keys_and_values_once():
    """Two bytes for each number of each key and value."""
    assert Setting(2, 64, 3, 4, 16).bytes() == 2 * 64 * 3 * 16 * 4
    assert min(setting.bytes() for setting in benchmark.settings()) >= 256 << 20


class StubTimer:
    """A timer that runs the call. Ours takes 4 ms and a copy 3 ms; they swap places each round."""

    def __init__(self):
        self.calls = 0

    def __call__(self, fn) -> float:
        fn()
        # The warm-up starts with round -3; in odd rounds ours goes first.
        is_ours = self.calls % 2 == (self.calls // 2) % 2
        self.calls += 1
        return 4.0 if is_ours else 3.0


@pytest.mark.parametrize("page", [0, 16])
def test_measures_bandwidth_and_share(page):
    setting = Setting(2, 64, 2, 2, 16, page)
    row = benchmark.measure(setting, StubTimer(), rounds=4, device="cpu", impl="torch")
    assert (row.milliseconds, row.copy_milliseconds, row.share) == (4.0, 3.0, 0.75)
    assert row.gigabytes_per_second == pytest.approx(setting.bytes() / 4e-3 / 1e9)
    assert row.copy_gigabytes_per_second == pytest.approx(setting.bytes() / 3e-3 / 1e9)


def test_results_are_written_and_printed(tmp_path, capsys):
    row = benchmark.measure(Setting(1, 16, 1, 1, 16), lambda fn: 1.0, rounds=2, device="cpu", impl="torch")
    path = benchmark.write_record(tmp_path / "decode" / "x.json", "decode", "stub", {}, rows=[asdict(row)])
    record = json.loads(path.read_text())
    assert record["benchmark"] == "decode" and record["rows"][0]["setting"]["T"] == 16
    benchmark.show([row], "stub")
    assert "stub" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(benchmark, "attention_decode", lambda q, *args, **kwargs: torch.zeros_like(q))
    with pytest.raises(AssertionError, match="apart"):
        benchmark.measure(Setting(1, 16, 1, 1, 16), lambda fn: 1.0, rounds=1, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_without_a_gpu_it_measures_nothing(capsys):
    assert benchmark.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1

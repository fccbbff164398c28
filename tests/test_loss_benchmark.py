"""The loss benchmark with a stub timer: contenders, out of memory, and the message without a GPU."""

import pytest
import torch

from benchmarks import loss as benchmark
from benchmarks.loss import COMPILED, EAGER, OURS, Row


def too_large(x, weight, targets):
    raise torch.OutOfMemoryError


def measured(losses):
    return benchmark.measure(32, 16, 65, losses, lambda step: 2.0, lambda step: 0.5, rounds=2, device="cpu")


def test_a_contender_that_does_not_fit_is_reported():
    losses = {**benchmark.contenders(), COMPILED: too_large}
    rows = measured(losses)
    assert rows == [Row(32, OURS, 2.0, 0.5), Row(32, EAGER, 2.0, 0.5), Row(32, COMPILED, None, None)]
    assert rows[2].cells() == ["32", COMPILED, "does not fit", "does not fit"]


def test_contenders_must_agree():
    with pytest.raises(AssertionError, match="something else"):
        measured({OURS: benchmark.plain, EAGER: lambda x, weight, targets: 2 * benchmark.plain(x, weight, targets)})
    with pytest.raises(torch.OutOfMemoryError):
        measured({OURS: too_large})


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_without_a_gpu_it_measures_nothing(capsys):
    assert benchmark.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1

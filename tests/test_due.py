"""gpt/training/due.py: which checkpoints an evaluation leaves behind."""

from types import SimpleNamespace

import pytest
import torch

from gpt.training import due as module
from gpt.training.due import Due, validate_and_save
from gpt.training.job import Job, Rate

# the step is saved already, the run ends here, it is the best so far: the kinds of checkpoint that are written
TABLE = {
    "nothing new": (False, False, False, []),
    "the best so far": (False, False, True, ["best"]),
    "the best so far, saved already": (True, False, True, ["best"]),
    "the run ends here": (False, True, False, ["step"]),
    "the run ends here, saved already": (True, True, False, []),
    "the run ends at its best": (False, True, True, ["step", "best"]),
    "the run ends at its best, saved already": (True, True, True, ["best"]),
}


@pytest.mark.parametrize("progress_ends", [False, True], ids=["stopped", "without progress"])
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_what_an_evaluation_saves(row, progress_ends, monkeypatch):
    saved, ends, best, expected = row
    written = []
    monkeypatch.setattr(module, "save", lambda job, *kinds: written.extend(kinds) or f"{kinds[0]}_00000007")
    monkeypatch.setattr(module, "validate", lambda job: True)
    job = SimpleNamespace(
        at=SimpleNamespace(step=7, is_best=best),
        saved_step=7 if saved else 5,
        checkpoint="step_00000007" if saved else "step_00000005",
        without_progress=ends and progress_ends,
        heard=lambda: ends and not progress_ends,
    )
    validate_and_save(job, Due(evaluate=True))
    assert written == expected
    assert job.saved_step == (7 if saved or ends else 5)
    assert job.checkpoint == ("step_00000007" if saved else f"{[*expected, 'step'][0]}_0000000{7 if expected else 5}")


def test_the_rate_counts_the_tokens_since_the_last_line(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 14.0)
    job = SimpleNamespace(
        rate=Rate(step=5, since=10.0),
        at=SimpleNamespace(step=7),
        tokens_per_step=600,
        device=torch.device("cpu"),
        model=SimpleNamespace(flops_per_token=lambda: 1),
        world=SimpleNamespace(size=1),
    )
    assert Job.throughput(job) == {"tokens_per_second": 300.0}

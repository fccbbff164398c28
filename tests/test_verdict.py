"""gpt/training/verdict.py: the decision after a step, as a truth table."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt.distributed import World
from gpt.training import verdict as module
from gpt.training.due import Due
from gpt.training.guard import Reading
from gpt.training.verdict import Verdict, judge

STEP, EVALUATES, LAST = Due(log=True), Due(log=True, evaluate=True), Due(last=True, log=True, evaluate=True, save=True)
NOTHING = Due()
GO_ON, WAIT, BACK, UP = Verdict
NAN = math.nan
MOST = 3  # skipped steps in a row that are one too many

# due, saving, steps skipped in a row, a spike, float16 with a finite loss, weights finite, validation loss: verdict
TABLE = {
    "a good step": (STEP, False, 0, False, False, True, 1.0, GO_ON),
    "a good step that evaluates": (EVALUATES, False, 0, False, False, True, 1.0, GO_ON),
    "the last step": (LAST, True, 0, False, False, True, 1.0, GO_ON),
    "bad weights between evaluations are not looked for": (STEP, False, 0, False, False, False, 1.0, GO_ON),
    "bad weights at an evaluation": (EVALUATES, False, 0, False, False, False, 1.0, BACK),
    "bad weights at a save": (STEP, True, 0, False, False, False, 1.0, BACK),
    "bad weights at the end": (LAST, True, 0, False, False, False, 1.0, BACK),
    "a skipped step": (STEP, False, 1, False, False, True, 1.0, WAIT),
    "a skipped step with bad weights": (EVALUATES, False, 1, False, False, False, 1.0, WAIT),
    "a skipped spike": (STEP, False, 1, True, False, True, 1.0, GO_ON),
    "a skipped spike with bad weights": (EVALUATES, False, 1, True, False, False, 1.0, BACK),
    "an overflow of float16": (STEP, True, 2, False, True, True, 1.0, GO_ON),
    "too many skipped steps": (STEP, False, MOST, False, False, True, 1.0, BACK),
    "too many spikes": (STEP, False, MOST, True, False, True, 1.0, BACK),
    "too many, but nothing is due": (NOTHING, True, MOST, False, False, True, 1.0, WAIT),
    "the last step is skipped": (LAST, True, 1, False, False, True, 1.0, GO_ON),
    "the last step is skipped and its evaluation fails": (LAST, True, 1, False, False, True, NAN, BACK),
    "the last step is skipped and its evaluation is stopped": (LAST, True, 1, False, False, True, None, WAIT),
}


@pytest.fixture
def job(monkeypatch):
    """Build the job for a row of the table, and tell whether a rollback is left."""

    def make(row: tuple, rollback: bool) -> tuple[SimpleNamespace, Reading]:
        _, _, in_a_row, spike, overflow, finite, val_loss, _ = row
        monkeypatch.setattr(module, "all_finite", lambda weights, world: finite)
        monkeypatch.setattr(module, "evaluated", lambda job: None if val_loss is None else [{"val_loss": val_loss}])
        monkeypatch.setattr(module, "can_go_back", lambda job: rollback)
        train = SimpleNamespace(max_skipped_steps=MOST)
        made = SimpleNamespace(config=SimpleNamespace(train=train), at=SimpleNamespace(step=7), weights=[], world=None)
        made.loss_scale, made.stopping, made.listens = SimpleNamespace(enabled=overflow), True, True
        loss = 2.0 if spike or overflow or not in_a_row else NAN
        return made, Reading(loss, 1.0, in_a_row, in_a_row, stopping=False, spike=spike)

    return make


@pytest.mark.parametrize("rollback", [True, False], ids=["rollback", "none left"])
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_judge_follows_the_truth_table(job, row, rollback):
    due, saving, *_, expected = row
    made, seen = job(row, rollback)
    verdict, fault = judge(made, due, saving, seen)
    assert verdict is (UP if expected is BACK and not rollback else expected)
    assert bool(fault) == (expected is BACK)
    assert fault.startswith("step 7: the ") or not fault


def test_a_stop_waits_while_steps_are_skipped(job):
    """There is nothing to save, so micro-batches do not check for a stop."""
    made, seen = job(TABLE["a skipped step"], True)
    judge(made, STEP, True, seen)
    assert (made.stopping, made.listens) == (False, False)
    made, seen = job(TABLE["a good step"], True)
    judge(made, STEP, True, seen)
    assert (made.stopping, made.listens) == (True, True)


def test_a_stop_in_the_last_evaluation_ends_training(job):
    made, seen = job(TABLE["the last step is skipped and its evaluation is stopped"], True)
    made.stopping = False
    judge(made, LAST, True, seen)
    assert made.stopping


DUE = {1: NOTHING, 2: Due(log=True), 6: EVALUATES, 10: Due(log=True, save=True), 31: LAST}
DUE |= {30: Due(log=True, evaluate=True, save=True)}


@pytest.mark.parametrize(("step", "expected"), DUE.items(), ids=str)
def test_what_is_due(step, expected):
    train = SimpleNamespace(max_steps=31, eval_interval=3, checkpoint_interval=10)
    assert Due.at(step, SimpleNamespace(train=train, log=SimpleNamespace(log_interval=2))) == expected


def test_the_writer_ends_before_its_checkpoint_is_read(monkeypatch):
    """Otherwise a rollback would look at a checkpoint that is half written."""
    calls = []
    monkeypatch.setattr(module, "verify", lambda checkpoint: calls.append("verify"))
    job = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(max_rollbacks=1)),
        loader=SimpleNamespace(rollbacks=0),
        saver=SimpleNamespace(wait=lambda: calls.append("wait")),
        world=World(torch.device("cpu")),
        checkpoint=Path("step_00000005"),
        monitor=SimpleNamespace(say=lambda text: None),
    )
    assert module.can_go_back(job)
    assert calls == ["wait", "verify"]
    module.give_up(job, "step 7: the loss is not finite")
    assert calls == ["wait", "verify", "wait"]

"""Skipped steps, float16's loss scale, and a loop that does not wait for the device between logs."""

import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gpt
from gpt.model import GPT
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from gpt.training.guard import Guard, LossScale, Reading
from gpt.training.monitor import Monitor
from gpt.training.step import clip
from train import main

TEXT = "".join(f"{a} and {b} went up the hill, said {c}.\n" for a in "JKLM" for b in "abcdef" for c in "xyz")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(*words: str) -> int:
    fixed = "--corpus text.txt --cache-dir cache --run-dir run --device cpu --n-layer 1 --n-head 2 --n-embd 16"
    fixed += " --seq-len 16 --batch-size 4 --warmup-steps 0 --dtype float32 --log-interval 1 --sample-tokens 0"
    return main(load_config([*fixed.split(), *words]))


@pytest.fixture
def bad_at(monkeypatch):
    """Return bad_at(call, ...), which makes the loss of these training steps NaN, counted from 1."""

    def bad_at(*calls: int) -> None:
        true_loss, count = GPT.loss, iter(range(1, 10**6))

        def loss(self, *args, **options):
            value = true_loss(self, *args, **options)
            return value * math.nan if self.training and next(count) in calls else value

        monkeypatch.setattr(GPT, "loss", loss)

    return bad_at


def test_a_bad_step_is_skipped_and_training_continues(folder, capsys, bad_at):
    bad_at(3, 4)
    assert run("--max-steps", "6", "--checkpoint-interval", "3") == 0
    records = [r for r in read_metrics(folder / "run/metrics.jsonl") if "train_loss" in r]
    assert [r["step"] for r in records] == [1, 2, 5, 6]
    assert "skipped 1 of the last steps" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == ["best_00000006", "step_00000006"]
    assert all(p.isfinite().all() for p in gpt.load("run", device="cpu")[0].parameters())


def test_skipped_steps_are_counted_between_logs(folder, capsys, bad_at):
    """Including a log at a skipped step, and steps already counted at a save."""
    bad_at(2, 4, 5, 7)
    words = ["--eval-interval", "100", "--checkpoint-interval", "8"]
    assert run("--max-steps", "10", "--log-interval", "5", "--max-skipped-steps", "3", *words) == 0
    output = capsys.readouterr().out
    assert "step 5: skipped 3 of" in output and "step 8: skipped 1 of" in output
    (last,) = [r for r in read_metrics(folder / "run/metrics.jsonl") if "train_loss" in r]
    assert (last["step"], last["skipped_steps"]) == (10, 4)


@pytest.mark.parametrize("words", [[], ["--log-interval", "9", "--max-skipped-steps", "1"]], ids=["some", "too-many"])
def test_a_stop_on_a_bad_step_waits_for_a_good_one_to_save(folder, capsys, bad_at, monkeypatch, words):
    """Also if max_skipped_steps is reached: an uninterrupted run checks only at a log, and does not roll back."""
    bad_at(3, 4)
    advance = Monitor.advance
    monkeypatch.setattr(Monitor, "advance", lambda self, n: advance(self, n) or n != 3 or signal.raise_signal(15))
    assert run("--max-steps", "9", *words) == 4
    assert "stopped by SIGTERM after step 5" in capsys.readouterr().out
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize(("limit", "end"), [(3, 6), (4, 7)])
def test_training_gives_up_after_too_many_bad_steps(folder, capsys, bad_at, limit, end):
    bad_at(1, *range(4, 100))
    assert (
        run(
            "--max-steps", "50", "--max-skipped-steps", str(limit), "--checkpoint-interval", "2", "--max-rollbacks", "0"
        )
        == 3
    )
    assert f"step {end}: the loss is nan and training gives up; the checkpoint step_00000002 is valid" in (
        capsys.readouterr().out
    )
    assert [path.name for path in (folder / "run/checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "unsound"])
def test_a_last_bad_step_succeeds_only_if_the_validation_loss_is_finite(folder, capsys, bad_at, monkeypatch, sound):
    """The validation loss shows whether the weights are good."""
    bad_at(5)
    if not sound:
        monkeypatch.setattr(
            "gpt.training.due.evaluate", lambda *args: {"val_loss": math.nan, "bits_per_byte": math.nan}
        )
    assert run("--max-steps", "5") == (0 if sound else 3)
    output, records = capsys.readouterr().out, read_metrics(folder / "run/metrics.jsonl")
    if sound:
        assert "step 5: skipped 1 of" in output and "step 5: validation loss" in output
        assert [r["skipped_steps"] for r in records if "skipped_steps" in r] == [1]
        assert {path.name for path in (folder / "run/checkpoints").iterdir()} == {"step_00000005", "best_00000005"}
    else:
        assert "nothing was saved" in output
        assert not (folder / "run/checkpoints").exists()


def test_a_last_bad_step_saves_no_weights_that_are_not_finite(folder, capsys, bad_at, monkeypatch):
    """Whatever the validation loss is: it ignores tokens that the validation text does not contain."""
    bad_at(5)
    monkeypatch.setattr("gpt.training.verdict.all_finite", lambda *args: False)
    assert run("--max-steps", "5") == 3
    assert "step 5: the weights are not finite and training gives up; nothing was saved" in capsys.readouterr().out
    assert not (folder / "run/checkpoints").exists()


def test_a_last_bad_step_with_bad_weights_rolls_back(folder, capsys, bad_at, monkeypatch):
    bad_at(5)
    losses = iter([math.nan, 1.0])
    monkeypatch.setattr("gpt.training.due.evaluate", lambda *args: {"val_loss": next(losses), "bits_per_byte": 1.0})
    assert run("--max-steps", "5", "--checkpoint-interval", "3") == 0
    assert "step 5: the loss is nan; rollback 1: continuing from step 3 with other data" in capsys.readouterr().out
    assert {path.name for path in (folder / "run/checkpoints").iterdir()} >= {"step_00000005", "best_00000005"}


def test_a_validation_loss_that_is_not_finite_is_left_out_of_the_metrics(folder, capsys, monkeypatch):
    """NaN is not JSON, and is never the best loss."""
    monkeypatch.setattr("gpt.training.due.evaluate", lambda *args: {"val_loss": math.nan, "bits_per_byte": math.inf})
    assert run("--max-steps", "5") == 0
    assert "validation loss nan" in capsys.readouterr().out
    assert "NaN" not in (text := (folder / "run/metrics.jsonl").read_text()) and "Infinity" not in text
    assert not list((folder / "run/checkpoints").glob("best_*"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_loss_and_norm_must_both_be_finite(which, bad):
    guard, fine = Guard(torch.device("cpu")), torch.tensor(1.5)
    numbers = {"loss": fine, "grad_norm": fine, which: torch.tensor(bad)}
    assert guard.update(fine, fine).item() == 0
    assert guard.update(**numbers).item() == guard.update(**numbers).item() == 1
    seen = guard.read()
    assert (seen.skipped, seen.in_a_row) == (2, 2)
    assert str(bad) in seen.fault and which.removeprefix("grad_") in seen.fault
    guard.update(fine, fine)
    assert guard.read() == (type(seen))(1.5, 1.5, 0, 0, False)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("reading", "fault", "said", "record"),
    [
        (Reading(1.5, 0.5, 0, 0, False), None, None, {"train_loss": 1.5, "grad_norm": 0.5}),
        (Reading(NAN, 0.5, 2, 1, False), "loss is nan", "loss or gradient was not finite", {"grad_norm": 0.5}),
        (
            Reading(1.5, INF, 2, 1, False),
            "gradient's norm is inf",
            "loss or gradient was not finite",
            {"train_loss": 1.5},
        ),
        (
            Reading(9.12345, 0.5, 2, 1, False, spike=True, spikes_skipped=True),
            "loss is 9.1235, far above the recent ones,",
            "loss or gradient was not finite, or the loss far above the recent ones",
            {"train_loss": 9.12345, "grad_norm": 0.5},
        ),
    ],
)
def test_a_reading_reports_its_fault_and_the_skipped_steps(reading, fault, said, record):
    assert fault is None or reading.fault == fault
    assert reading.note(7) == (said and f"step 7: skipped 2 of the last steps: {said}")
    assert reading.record(0) == record
    assert reading.record(3) == record | {"skipped_steps": 3}


@pytest.mark.parametrize(("asked", "stopping"), [(None, False), (0.0, False), (1.0, True), (2.0, True)])
def test_a_reading_tells_whether_a_rank_was_told_to_stop(asked, stopping):
    guard, fine = Guard(torch.device("cpu")), torch.tensor(1.5)
    guard.update(fine, fine, None if asked is None else torch.tensor(asked))
    assert guard.read() == Reading(1.5, 1.5, 0, 0, stopping)


def test_the_loss_scale_equals_that_of_torchs_grad_scaler():
    found = [0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    ours = LossScale(torch.device("cpu"), enabled=True)
    ours.GROWTH_INTERVAL = 3
    theirs, tracker = torch.full((), 65536.0), torch.zeros((), dtype=torch.int32)
    for value in found:
        found_inf = torch.tensor(float(value))
        ours.update(found_inf)
        torch._amp_update_scale_(theirs, tracker, found_inf, 2.0, 0.5, 3)
        assert ours.state_dict() == {"scale": theirs.item(), "_growth_tracker": tracker.item()}
    other = LossScale(torch.device("cpu"), enabled=True)
    other.load_state_dict(ours.state_dict())
    assert other.state_dict() == ours.state_dict()


class Waits(TorchDispatchMode):
    """Counts torch operations that would wait for a GPU ..."""

    OPERATORS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.OPERATORS
        return func(*args, **(kwargs or {}))


class WaitsInPython(TorchFunctionMode):
    """... and calls on a tensor, which torch does not dispatch on a CPU."""

    METHODS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.waits.count += func in self.METHODS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "words",
    [
        ["--grad-clip", "1", "--ema-decay", "0.9"],
        ["--optimizer", "muon", "--grad-accum-steps", "2", "--dropout", "0.1", "--spike-threshold", "8"],
        ["--dtype", "float16", "--grad-clip", "0", "--activation-checkpointing"],
    ],
    ids=["adamw-average", "muon-spikes", "float16"],
)
def test_steps_between_logs_do_not_wait_for_the_device(folder, capsys, monkeypatch, words):
    waits, at = Waits(), []
    monkeypatch.setattr(Monitor, "advance", lambda self, step: at.append(waits.count))
    intervals = ["--log-interval", "4", "--eval-interval", "100", "--checkpoint-interval", "100", "--max-steps", "9"]
    with waits, WaitsInPython(waits):
        assert run(*intervals, *words) == 0
    assert len(at) == 9
    assert at[0] == at[1] == at[2] == at[3] < at[4] == at[5] == at[6] == at[7] < at[8] < waits.count
    assert at[4] - at[3] == 1  # all that a log needs is read at once


def test_a_restored_guard_forgets_the_steps_skipped_since():
    guard = Guard(torch.device("cpu"))
    state = guard.state_dict()
    guard.update(torch.tensor(math.nan), torch.tensor(1.0))
    guard.load_state_dict(state)
    guard.update(torch.tensor(1.0), torch.tensor(1.0))
    assert guard.read().skipped == 0


def test_clipping_undoes_the_loss_scale():
    weight = torch.nn.Parameter(torch.zeros(2))
    for most, expected in ((0.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        weight.grad = 1024 * torch.tensor([3.0, 4.0])
        job = SimpleNamespace(
            config=SimpleNamespace(optim=SimpleNamespace(grad_clip=most)),
            loss_scale=SimpleNamespace(enabled=True, scale=torch.tensor(1024.0)),
            weights=[weight],
        )
        clip(job, torch.tensor(5.0))
        torch.testing.assert_close(weight.grad, torch.tensor(expected))

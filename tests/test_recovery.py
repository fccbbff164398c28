"""Rollbacks, skipped spikes, patience, time limits and lack of memory."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from gpt.errors import run_command
from gpt.model import GPT
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from gpt.training.guard import Guard
from tests.run_checks import FLAGS, TEXT
from train import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(*words: str, run_dir: str = "run") -> int:
    fixed = [*FLAGS, "--log-interval", "1", "--warmup-steps", "0", "--run-dir", run_dir]
    return main(load_config([*fixed, *words]))


def lasting(run_dir: str = "run") -> list[dict]:
    """Read the metrics without values that depend on the clock."""
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def weights_of(run_dir: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / f"checkpoints/step_{step:08d}/model.safetensors")


def checkpoints() -> list[str]:
    return sorted(path.name for path in Path("run/checkpoints").iterdir())


def replace_loss(monkeypatch, change) -> None:
    """Replace the training loss of inputs x by change(x, loss)."""
    true_loss = GPT.loss

    def loss(self, x, *args, **options):
        value = true_loss(self, x, *args, **options)
        return change(x, value) if self.training else value

    monkeypatch.setattr(GPT, "loss", loss)


# Going back.


@pytest.fixture
def bad_rows(monkeypatch):
    """Make the loss NaN on the batches of steps 5 and 6 of an uninterrupted run; return those that occurred."""
    seen: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        replace_loss(patch, lambda x, loss: seen.append(x.clone()) or loss)
        assert run("--max-steps", "6", run_dir="undisturbed") == 0
    bad = seen[4:6]
    met = []

    def change(x, loss):
        if any(torch.equal(x, rows) for rows in bad):
            met.append(x)
            return loss * math.nan
        return loss

    replace_loss(monkeypatch, change)
    return met


BACK = ["--max-skipped-steps", "2", "--max-steps", "8", "--checkpoint-interval", "3"]


def test_a_rollback_continues_with_other_data(bad_rows, capsys):
    assert run(*BACK) == 0
    assert "step 6: the loss is nan; rollback 1: continuing from step 3 with other data" in capsys.readouterr().out
    assert len(bad_rows) == 2  # not met again
    steps = [r["step"] for r in lasting() if "train_loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    (back,) = [r for r in lasting() if "rollbacks" in r]
    assert (back["step"], back["rollbacks"]) == (3, 1)
    assert json.loads(Path("run/checkpoints/step_00000008/state.json").read_text())["loader"]["rollbacks"] == 1
    assert all(w.isfinite().all() for w in weights_of("run", 8).values())


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_resumes_exactly_after_a_rollback(bad_rows, capsys, step):
    """From a checkpoint before the rollback, which is then repeated, and from one after it."""
    assert run(*BACK, "--keep-checkpoints", "9") == 0
    whole, metrics = weights_of("run", 8), lasting()
    for path in Path("run/checkpoints").iterdir():
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    assert run(*BACK, "--keep-checkpoints", "9", "--resume") == 0
    assert lasting() == metrics
    assert all(torch.equal(w, whole[name]) for name, w in weights_of("run", 8).items())


@pytest.mark.parametrize("limit", [0, 2])
def test_a_run_gives_up_after_too_many_rollbacks(monkeypatch, capsys, limit):
    calls = []
    replace_loss(monkeypatch, lambda x, loss: calls.append(1) or (loss * math.nan if len(calls) > 2 else loss))
    words = ["--max-skipped-steps", "2", "--max-steps", "20", "--max-rollbacks", str(limit)]
    assert run(*words) == 3
    output = capsys.readouterr().out
    assert output.count("rollback ") == limit
    assert "step 4: the loss is nan and training gives up; the checkpoint step_00000002 is valid" in output
    assert len(calls) == 2 + 2 * (limit + 1)
    assert checkpoints() == ["step_00000002"]


def test_a_rollback_needs_a_checkpoint(monkeypatch, capsys):
    replace_loss(monkeypatch, lambda x, loss: loss * math.nan)
    assert run("--max-skipped-steps", "1", "--max-steps", "20") == 3
    assert "training gives up; nothing was saved" in capsys.readouterr().out


def test_a_rollback_refuses_a_damaged_checkpoint(monkeypatch, capsys):
    calls = []
    replace_loss(monkeypatch, lambda x, loss: calls.append(1) or (loss * math.nan if len(calls) > 2 else loss))
    monkeypatch.setattr("gpt.training.verdict.verify", lambda checkpoint: f"{checkpoint} is damaged")
    assert run("--max-skipped-steps", "2", "--max-steps", "20") == 3
    assert "rollback" not in capsys.readouterr().out


# Spikes.


def test_a_spike_is_far_above_the_recent_losses():
    guard, norm = Guard(torch.device("cpu"), spike_threshold=6.0), torch.tensor(1.0)
    skipped = lambda loss: bool(guard.update(torch.tensor(loss), norm))
    noisy = [3.0 + 0.1 * math.sin(7.0 * i) for i in range(15)]
    assert not any(skipped(loss) for loss in [*noisy, 30.0])  # too few to judge by
    assert not skipped(3.2) and skipped(30.0) and skipped(math.nan) and not skipped(0.1)
    kept = guard.state_dict()
    assert len(kept["losses"]) == 18 and kept["in_a_row"] == 0
    assert skipped(30.0) and skipped(4.5)  # the spikes before did not widen what is usual
    assert guard.read().spike
    other = Guard(torch.device("cpu"), spike_threshold=6.0)
    other.load_state_dict(kept)
    for loss in (30.0, 3.3, 4.5, 2.9):
        assert bool(other.update(torch.tensor(loss), norm)) == skipped(loss)
    assert other.state_dict()["losses"] == guard.state_dict()["losses"]


def test_the_window_forgets_and_a_flat_loss_has_no_spikes():
    guard, norm = Guard(torch.device("cpu"), spike_threshold=6.0), torch.tensor(1.0)
    for step in range(200):  # falls by half
        assert guard.update(torch.tensor(4.0 * 0.5 ** (step / 200)), norm) == 0
    assert guard.update(torch.tensor(4.0), norm) == 1
    for _ in range(64):
        assert guard.update(torch.tensor(2.0), norm) == 0
    assert guard.update(torch.tensor(2.05), norm) == 0 and guard.update(torch.tensor(2.2), norm) == 1


def test_a_step_with_a_spike_is_skipped(monkeypatch, capsys):
    calls = []
    replace_loss(monkeypatch, lambda x, loss: calls.append(1) or (loss * 50 if len(calls) in (19, 22) else loss))
    assert run("--max-steps", "22", "--spike-threshold", "8", "--checkpoint-interval", "18") == 0
    assert [r["step"] for r in lasting() if "skipped_steps" in r] == [19, 22]
    assert "step 19: skipped 1 of the last steps: loss or gradient was not finite, or the loss far above" in (
        capsys.readouterr().out
    )
    whole = weights_of("run", 22)
    calls[:] = [1] * 18
    for name in ("step_00000022", "best_00000022"):
        shutil.rmtree(f"run/checkpoints/{name}")
    metrics = lasting()
    assert run("--max-steps", "22", "--spike-threshold", "8", "--checkpoint-interval", "18", "--resume") == 0
    assert lasting() == metrics  # the window is in the checkpoint
    assert all(torch.equal(w, whole[name]) for name, w in weights_of("run", 22).items())


def test_without_the_option_a_spike_is_not_skipped(monkeypatch, capsys):
    calls = []
    replace_loss(monkeypatch, lambda x, loss: calls.append(1) or (loss * 50 if len(calls) == 19 else loss))
    assert run("--max-steps", "20") == 0
    assert not [r for r in lasting() if "skipped_steps" in r]


# Ending early.

WORSE = ["--eval-interval", "2", "--max-steps", "40", "--schedule", "constant", "--patience", "2"]


def test_patience_ends_training_when_the_validation_loss_stops_falling(capsys):
    assert run(*WORSE, "--max-steps", "2") == 0
    assert run(*WORSE, "--resume", "--learning-rate", "2.0") == 0
    losses = {r["step"]: r["val_loss"] for r in lasting() if "val_loss" in r}
    best = min(losses, key=losses.get)
    last = max(losses)
    assert last == best + 4 < 40
    assert f"step {last}: 2 evaluations gave no lower validation loss than {losses[best]:.4f} of step {best}, and" in (
        capsys.readouterr().out
    )
    assert {f"best_{best:08d}", f"step_{last:08d}"} <= set(checkpoints())
    before = lasting()
    assert run(*WORSE, "--resume", "--learning-rate", "2.0") == 0
    assert lasting() == before and "and training ends" in capsys.readouterr().out


def test_patience_is_in_the_checkpoint(capsys):
    """A run stopped between two evaluations without progress ends at the same step as an uninterrupted one."""
    assert run(*WORSE, "--max-steps", "2") == 0
    words = [*WORSE, "--resume", "--learning-rate", "2.0", "--keep-checkpoints", "30"]
    assert run(*words) == 0
    metrics = lasting()
    last = metrics[-1]["step"]
    shutil.rmtree(f"run/checkpoints/step_{last:08d}")
    assert run(*words) == 0
    assert lasting() == metrics


# Time and memory.


@pytest.mark.parametrize(("seconds", "end"), [(89.9, 3), (90.1, 1)])
def test_the_time_limit_counts_minutes_from_the_start_of_the_process(capsys, monkeypatch, seconds, end):
    monkeypatch.setattr("gpt.stop.process_seconds", lambda: seconds)
    assert run("--max-steps", "3", "--max-minutes", "1.5") == (0 if end == 3 else 4)
    assert ("stopped by its limit of 1.5 minutes after step 1" in capsys.readouterr().out) == (end == 1)
    assert f"step_{end:08d}" in checkpoints()


def test_a_time_limit_saves_and_the_run_resumes(capsys, monkeypatch):
    """The limit of 100 minutes ends within the second step."""
    clock = [5999.0]
    monkeypatch.setattr("gpt.stop.process_seconds", lambda: clock[0])
    replace_loss(monkeypatch, lambda x, loss: clock.append(clock.pop() + 0.6) or loss)
    assert run("--max-steps", "4", "--max-minutes", "100") == 4
    assert "stopped by its limit of 100 minutes after step 2; continue with --resume" in capsys.readouterr().out
    assert checkpoints() == ["step_00000002"]
    clock[:] = [0.0]
    assert run("--max-steps", "4", "--max-minutes", "100", "--resume") == 0
    assert run("--max-steps", "4", run_dir="plain") == 0
    assert all(torch.equal(w, weights_of("plain", 4)[name]) for name, w in weights_of("run", 4).items())


def test_an_exceeded_time_limit_leaves_one_step(capsys):
    """Otherwise a job restarted again and again would make no progress. The test process is older than 6 ms."""
    assert run("--max-steps", "4", "--max-minutes", "0.0001") == 4
    assert "stopped by its limit of 0.0001 minutes after step 1; continue with --resume" in capsys.readouterr().out
    assert checkpoints() == ["step_00000001"]


@pytest.fixture
def room_for(monkeypatch):
    """Return room_for(rows), which makes training with more rows at once run out of memory."""

    def room_for(rows: int) -> None:
        def change(x, loss):
            if len(x) > rows and not isinstance(x, FakeTensor):  # the plan needs no memory
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss

        replace_loss(monkeypatch, change)

    return room_for


def test_out_of_memory_only_halves_the_micro_batch(room_for, capsys):
    assert run("--max-steps", "4", "--batch-size", "12", run_dir="plain") == 0
    room_for(4)
    assert run("--max-steps", "4", "--batch-size", "12") == 0
    output = capsys.readouterr().out
    assert "have 6 rows from now on instead of 12\n" in output and "have 3 rows from now on instead of 6\n" in output
    assert output.count("out of memory") == 2
    for one, other in zip(lasting("plain"), lasting(), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    states = [json.loads(Path(f"{d}/checkpoints/step_00000004/state.json").read_text()) for d in ("plain", "run")]
    assert states[0]["loader"] == states[1]["loader"] and states[0]["recipe"] == states[1]["recipe"]


def test_out_of_memory_with_one_row_lists_what_needs_memory(room_for, capsys):
    room_for(0)
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: run("--max-steps", "4"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "with micro-batches of 1 x 16, which need about weights" in line and "--activation-checkpointing" in line
    assert not Path("run/checkpoints").exists()

"""Resume, overwrite, stop and give up a training."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gpt
from gpt.model import GPT
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from gpt.training.monitor import Monitor
from gpt.training.resume import differences, recipe
from tests.train_checks import flags, lasting, names_in, refused, run, weights_of
from train import main

ROOT = Path(__file__).parent.parent


# Going on.


@pytest.mark.parametrize(
    ("interval", "options"),
    [
        (7, {"dropout": 0.2, "grad_accum_steps": 2, "batch_size": 4}),
        (19, {"optimizer": "muon", "learning_rate": 0.02, "ema_decay": 0.9}),
        (20, {"dtype": "bfloat16"}),
        (20, {"dtype": "float16", "dropout": 0.2}),
    ],
    ids=["adamw-dropout-accumulation", "muon-average", "bfloat16", "float16"],
)
def test_a_run_resumed_at_any_step_equals_an_uninterrupted_one(folder, capsys, interval, options):
    """The first epoch of 153 windows ends within step 20 of 8 rows."""
    options = {"max_steps": 22, "n_layer": 1, "eval_interval": 6} | options
    run(run_dir="plain", checkpoint_interval=100, **options)
    metrics, whole = lasting("plain"), weights_of("plain", 22)
    run(run_dir="often", checkpoint_interval=interval, keep_checkpoints=24, **options)
    assert lasting("often") == metrics  # saving changes nothing
    for step in range(interval, 22, interval):
        torch.manual_seed(99)
        run("--overwrite", "--resume-from", f"often/checkpoints/step_{step:08d}", run_dir="other", **options)
        assert lasting("other") == [r for r in metrics if r["step"] > step]
        resumed = weights_of("other", 22)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_continues_in_the_same_directory(folder, capsys):
    run(max_steps=20, eval_interval=5)
    whole, metrics = weights_of("run", 20), lasting("run")
    for name in ("step_00000020", "best_00000020"):
        shutil.rmtree(f"run/checkpoints/{name}")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "event": "of a course that was left"}\n{"step": 21, "cut sh')
    assert run("--resume", max_steps=20, eval_interval=5) == 0
    assert lasting("run") == metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), weights_of("run", 20).values(), strict=True))
    output = capsys.readouterr().out
    assert "this run differs" not in output


def test_resume_reports_changed_options_in_one_line(folder, capsys):
    threads = torch.get_num_threads()
    run(max_steps=4, checkpoint_interval=2, schedule="constant")
    try:
        torch.set_num_threads(threads + 1)
        run("--resume", max_steps=6, batch_size=4, schedule="constant")
    finally:
        torch.set_num_threads(threads)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
    assert line == (
        f"from step 4 on, this run differs from an uninterrupted one: threads is {threads + 1}, was {threads} "
        "(CPU sums are rounded in another order); batch_size is 4, was 8 (a step sees other text)"
    )
    assert [r["tokens"] for r in lasting("run") if "train_loss" in r] == [128, 256, 384, 512, 576, 640]


@pytest.mark.parametrize(
    ("batch_size", "accumulated", "processes", "dropout", "reason"),
    [
        (8, 1, 2, 0.0, "sums are rounded in another order"),
        (2, 8, 1, 0.1, "sums are rounded in another order, dropout is drawn anew"),
        (8, 2, 2, 0.0, "a step sees other text"),
        (4, 2, 1, 0.0, "a step sees other text"),
    ],
)
def test_resume_tells_other_text_from_another_rounding(batch_size, accumulated, processes, dropout, reason):
    """The checkpoint was written with two micro-batches of 8 rows and one process."""
    before = recipe(load_config(flags(batch_size=8, grad_accum_steps=2, dropout=dropout)))
    now = recipe(load_config(flags(batch_size=batch_size, grad_accum_steps=accumulated, dropout=dropout)), processes)
    line = differences(before, now, 4)
    changed = (batch_size != 8) + (accumulated != 2) + (processes != 1)
    assert line.count(f"({reason})") == line.count("(") == changed


def test_the_order_in_a_saved_recipe_does_not_matter():
    """A checkpoint of an earlier version lists the same values in another order."""
    now = recipe(load_config(["--corpus-weights", "1", "2.5", "--dropout", "0.1"]))
    saved = json.loads(json.dumps(dict(reversed(now.items()))))
    assert [*saved] != [*now] and differences(saved, now, 4) is None


def test_the_best_checkpoint_is_kept_separately_and_can_be_loaded(folder, capsys):
    """From step 4 on the rate is far too high, so the validation loss has its minimum early."""
    run(max_steps=4, eval_interval=2, checkpoint_interval=2)
    raised = {"learning_rate": 0.5, "warmup_steps": 0, "schedule": "constant"}
    run("--resume", max_steps=12, eval_interval=2, checkpoint_interval=2, **raised)
    losses = {r["step"]: r["val_loss"] for r in lasting("run") if "val_loss" in r}
    assert min(losses, key=losses.get) == 4
    assert names_in("run/checkpoints") == ["best_00000004", "step_00000010", "step_00000012"]
    state = json.loads(Path("run/checkpoints/step_00000012/state.json").read_text())
    assert state["best"] == {"step": 4, "val_loss": losses[4]}
    loaded = {which: gpt.load("run", "cpu", which=which)[0] for which in ("newest", "best")}
    loaded["path"] = gpt.load("run", "cpu", which="run/checkpoints/step_00000010")[0]
    for which, name in {"newest": "step_00000012", "best": "best_00000004", "path": "step_00000010"}.items():
        saved = load_file(f"run/checkpoints/{name}/model.safetensors")
        assert all(torch.equal(p, saved[key]) for key, p in loaded[which].named_parameters())
    with pytest.raises(gpt.UserError, match=r"step_00000011/manifest\.json cannot be read"):
        gpt.load("run", "cpu", which="run/checkpoints/step_00000011")


@pytest.mark.parametrize("max_steps", [4, 6], ids=["at-the-end", "on-the-way"])
def test_resume_writes_a_best_checkpoint_that_a_kill_prevented(folder, capsys, max_steps):
    """A step of both kinds is saved twice; the kill came between. The next evaluation is not better."""
    run(max_steps=4, eval_interval=2, checkpoint_interval=4)
    name = "run/checkpoints/best_00000004"
    shutil.move(name, "whole")
    assert run("--resume", max_steps=max_steps, eval_interval=6, learning_rate=0.5, schedule="constant") == 0
    assert names_in("run/checkpoints")[0] == "best_00000004"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert Path(name, file).read_bytes() == Path("whole", file).read_bytes()


def test_resume_prunes_after_a_kill(folder, capsys):
    """The kill came between the last save and the deletion of older checkpoints."""
    run(max_steps=8, eval_interval=2, checkpoint_interval=2, keep_checkpoints=9)
    shutil.copytree("run/checkpoints/step_00000006", "run/checkpoints/best_00000006")
    kept = ["best_00000008", "step_00000006", "step_00000008"]
    assert len(names_in("run/checkpoints")) == 6
    assert run("--resume", max_steps=8, eval_interval=2, keep_checkpoints=2) == 0
    assert names_in("run/checkpoints") == kept


def test_resuming_from_an_earlier_step_removes_the_later_ones(folder, capsys):
    """Otherwise a later --resume would use the abandoned step 20."""
    run(checkpoint_interval=5, keep_checkpoints=4)
    run("--resume-from", "run/checkpoints/step_00000005", max_steps=7, learning_rate=1e-4, eval_interval=100)
    assert names_in("run/checkpoints") == ["best_00000007", "step_00000005", "step_00000007"]
    assert [r["step"] for r in lasting("run") if "train_loss" in r] == [*range(1, 8)]


def test_resume_starts_a_run_that_does_not_exist(folder, capsys):
    assert run("--resume", max_steps=2) == 0
    assert (folder / "run/checkpoints/step_00000002").is_dir()


def test_resume_skips_a_damaged_checkpoint_and_reports_it(folder, capsys):
    run()
    shutil.rmtree("run/checkpoints/best_00000020")
    newest = folder / "run/checkpoints/step_00000020/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert run("--resume", max_steps=21) == 0
    assert re.search(r"passing over step_00000020: .*model.safetensors", capsys.readouterr().out)


def test_resume_from_a_checkpoint_of_another_run(folder, capsys):
    run(run_dir="first")
    run("--resume-from", "first/checkpoints/step_00000010", run_dir="second")
    assert all(torch.equal(a, b) for a, b in zip(weights_of("first", 20).values(), weights_of("second", 20).values()))


@pytest.mark.parametrize(
    "words", [["--resume-from", "run/checkpoints/step_00000002"], ["--init-from", "run"]], ids=["resume", "init"]
)
def test_overwrite_does_not_delete_what_the_run_starts_from(folder, capsys, words):
    run(max_steps=2)
    before = names_in("run/checkpoints")
    line = refused(capsys, *words, *flags(max_steps=3), "--overwrite")
    assert "overwrite would delete run, which this run starts from" in line
    assert names_in("run/checkpoints") == before


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"eval_tokens": 20}], ids=["", "average", "tokens"])
def test_eval_only_prints_the_loss_and_writes_nothing(folder, capsys, changes):
    run(**changes)
    loss = [r for r in read_metrics(folder / "run/metrics.jsonl") if "val_loss" in r][-1]["val_loss"]
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "run").rglob("*"))
    capsys.readouterr()
    assert main(load_config(["--run-dir", "run", "--eval-only"])) == 0
    assert f"validation loss {loss:.4f}" in capsys.readouterr().out
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (folder / "run").rglob("*"))


def test_overwrite_deletes_the_run_and_nothing_else(folder, capsys):
    run(max_steps=4, checkpoint_interval=2)
    (folder / "run/notes.txt").write_text("mine")
    assert run("--overwrite", max_steps=1) == 0
    assert (folder / "run/notes.txt").read_text() == "mine"
    assert names_in("run/checkpoints") == ["best_00000001", "step_00000001"]


# Giving up and stopping.


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(folder, capsys):
    assert run(max_steps=20) == 0
    assert run("--resume", max_steps=40, learning_rate=1e38, grad_clip=0, checkpoint_interval=1) == 3
    assert "training gives up" in capsys.readouterr().out
    for path in (folder / "run/checkpoints").iterdir():
        assert all(torch.isfinite(w).all() for w in load_file(path / "model.safetensors").values())
    assert (folder / "run/checkpoints/step_00000020").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_saves_and_the_run_resumes(folder, number):
    command = [sys.executable, str(ROOT / "train.py"), *flags(max_steps=100_000, eval_interval=100_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_metrics(folder / "run/metrics.jsonl")) >= 3, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert errors == ""
    stopped = int(re.search(rf"stopped by {number.name} after step (\d+)", output)[1])
    assert run("--resume", max_steps=stopped + 1, eval_interval=100_000) == 0
    assert [r["step"] for r in lasting("run")] == [*range(1, stopped + 2), stopped + 1]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not(first):
    """Under torchrun a process gets SIGTERM twice: from whoever ends the job, and from torchrun."""
    code = "import signal, sys; from gpt.stop import StopRequest; stop = StopRequest(); raised = signal.raise_signal\n"
    code += f"raised({first:d}); raised(signal.SIGTERM); print(stop.reason, flush=True); raised(signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{first.name}\n", -signal.SIGINT)


def test_a_stop_between_logs_does_not_change_the_metrics(folder, capsys, monkeypatch):
    """Step 2 is skipped, which the line of step 4 reports; the run is stopped in between."""
    options = {"max_steps": 12, "log_interval": 4, "eval_interval": 5}
    true_loss, advance, count, stops = GPT.loss, Monitor.advance, iter(range(1, 100)), {3: signal.SIGINT, 7: 15}

    def loss(self, *args, **kwargs):
        return true_loss(self, *args, **kwargs) * (math.nan if self.training and next(count) == 2 else 1.0)

    monkeypatch.setattr(GPT, "loss", loss)
    assert run(run_dir="plain", **options) == 0
    count = iter(range(1, 100))
    stop = lambda self, step: advance(self, step) or signal.raise_signal(stops.get(step, signal.SIGCONT))
    monkeypatch.setattr(Monitor, "advance", stop)
    assert [run("--resume", **options) for _ in range(3)] == [4, 4, 0]
    assert lasting("run") == lasting("plain") and lasting("run")[0]["skipped_steps"] == 1
    whole = weights_of("plain", 12)
    assert all(torch.equal(w, whole[name]) for name, w in weights_of("run", 12).items())


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        os.sched_yield()


def test_a_finished_run_says_how_to_continue(folder, capsys):
    run(max_steps=2)
    capsys.readouterr()
    said = "the run is already at step 2: raise --max-steps to continue it"
    for max_steps, is_said in ((2, True), (3, False)):
        run(max_steps=max_steps, resume=True)
        assert (said in capsys.readouterr().out) == is_said

"""Evaluations and samples of a training: stopped, killed and repeated; the text they read, and their precision."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpt.config import ModelConfig
from gpt.data.tokenizers import ByteTokenizer
from gpt.distributed import World
from gpt.model import GPT
from gpt.training import validation
from gpt.training.command import load_config
from gpt.training.monitor import Ticker
from gpt.training.parallel import Parallel
from gpt.training.saver import Saver
from gpt.training.validation import recover_evaluation
from tests.train_checks import SHORT, TEXT, flags, lasting, names_in, run

pytestmark = pytest.mark.numeric  # an evaluation that is made again gives the same number on any processor


@pytest.fixture
def long_text(folder) -> Path:
    """Validation text of two batches."""
    (folder / "text.txt").write_text(TEXT * 64)
    return folder


def patch_evaluation(monkeypatch, at: int, act) -> list[int]:
    """Call act() in batch number `at` of all evaluations, from 1; return a list with an entry for each batch."""
    calls, eval_loss = [], Parallel.eval_loss

    def counted(self, *args, **options):
        calls.append(1)
        if len(calls) == at:
            act()
        return eval_loss(self, *args, **options)

    monkeypatch.setattr(Parallel, "eval_loss", counted)
    return calls


def files_of(run_dir: str) -> dict[str, object]:
    """Read all checkpoints without values that depend on the clock."""
    found: dict[str, object] = {}
    for path in Path(run_dir, "checkpoints").rglob("*.*"):
        name = str(path.relative_to(run_dir))
        if path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "metrics_bytes"}
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    ("batch", "step", "whole"), [(1, 2, False), (2, 2, True), (3, 4, False), (4, 4, True), (5, 6, False)]
)
def test_a_signal_in_an_evaluation_saves_at_once(long_text, capsys, monkeypatch, batch, step, whole):
    """In a saved step, an unsaved step and the last step. An unfinished evaluation is repeated."""
    run(run_dir="plain", **SHORT)
    with monkeypatch.context() as patch:
        calls = patch_evaluation(patch, batch, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(**SHORT) == 4
    assert len(calls) == batch
    output = capsys.readouterr().out
    assert f"stopped by SIGTERM after step {step}; continue with --resume" in output
    assert ("with the evaluation of that step" in output) != whole
    assert f"step_{step:08d}" in names_in("run/checkpoints")
    assert [r["step"] for r in lasting("run") if "val_loss" in r] == list(range(2, step + whole, 2))
    assert run("--resume", **SHORT) == 0
    assert lasting("run") == lasting("plain")
    plain, again = files_of("plain"), files_of("run")
    assert all(again[name] == plain[name] for name in plain if name in again)
    assert {name for name in plain if "00006" in name or "best" in name} <= set(again)


def test_a_signal_in_the_very_last_batch_changes_nothing(long_text, capsys, monkeypatch):
    run(run_dir="plain", **SHORT)
    patch_evaluation(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(**SHORT) == 0
    assert lasting("run") == lasting("plain") and files_of("run") == files_of("plain")


def test_a_step_is_saved_before_its_evaluation(long_text, capsys, monkeypatch):
    run(run_dir="plain", **SHORT)

    def die():
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch_evaluation(patch, 6, die)
        with pytest.raises(ZeroDivisionError):
            run(**SHORT)
    assert "step_00000006" in names_in("run/checkpoints")
    assert run("--resume", **SHORT) == 0
    assert lasting("run") == lasting("plain")
    assert files_of("run") == files_of("plain")


def test_a_finished_evaluation_is_not_repeated(long_text, capsys, monkeypatch):
    """Killed between its line in metrics.jsonl and the best checkpoint, and again after the end."""
    run(run_dir="plain", **SHORT)
    save = Saver.save

    def die_at_the_best(self, tensors, state, *, kinds):
        if kinds == ("best",) and state["step"] == 6:
            raise ZeroDivisionError
        save(self, tensors, state, kinds=kinds)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", die_at_the_best)
        with pytest.raises(ZeroDivisionError):
            run(**SHORT)
    assert "best_00000006" not in names_in("run/checkpoints")
    calls = patch_evaluation(monkeypatch, 0, None)
    for _ in range(2):
        assert run("--resume", **SHORT) == 0
        assert lasting("run") == lasting("plain")
        assert files_of("run") == files_of("plain")
    assert calls == []


def test_resuming_in_another_directory_finds_the_evaluation(long_text, capsys):
    """With --resume-from another run its best loss counts, and is kept in the new run's checkpoints."""
    options = SHORT | {"eval_interval": 3}
    run(run_dir="first", **options)
    val_loss = next(r["val_loss"] for r in lasting("first") if "val_loss" in r)
    high = {"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0}
    run("--resume-from", "first/checkpoints/step_00000003", **(options | high))
    state = json.loads(Path("run/checkpoints/step_00000006/state.json").read_text())
    assert state["best"] == {"step": 3, "val_loss": val_loss} and state["evaluation_due"] is True
    assert names_in("run/checkpoints") == ["step_00000006"]
    assert [r["step"] for r in lasting("run")] == [4, 5, 6, 6]


@pytest.fixture
def bounded(folder, monkeypatch) -> Path:
    """Make evaluations read by default 100 of the 244 validation tokens."""
    monkeypatch.setattr(validation, "DEFAULT_TOKENS", 100)
    return folder


def val_losses(run_dir: str) -> list[tuple[int, float]]:
    return [(r["step"], r["val_loss"]) for r in lasting(run_dir) if "val_loss" in r]


def test_by_default_evaluations_are_bounded_and_the_last_reads_all(bounded, capsys):
    run(**SHORT)
    output = capsys.readouterr().out
    assert "evaluations read the first 100 of 244 validation tokens, the last one reads all; --eval-tokens" in output
    assert "bits per byte on all 244 tokens" in output
    run(run_dir="some", eval_tokens=100, **SHORT)
    run(run_dir="all", eval_tokens=244, **SHORT)
    assert "evaluations read" not in capsys.readouterr().out
    bounded_losses, some, whole = map(val_losses, ("run", "some", "all"))
    assert bounded_losses == [*some, whole[-1]] and some != whole
    best = min(some, key=lambda pair: pair[1])
    state = json.loads(next(Path("run/checkpoints").glob("best_*/state.json")).read_text())
    assert state["best"] == dict(zip(("step", "val_loss"), best, strict=True))  # of equal texts
    assert run("--resume", **SHORT) == 0
    assert val_losses("run") == bounded_losses


def test_patience_ends_with_a_full_evaluation(bounded, capsys):
    run(run_dir="some", **(SHORT | {"max_steps": 2}))
    high = {"learning_rate": 2.0, "schedule": "constant", "warmup_steps": 0, "patience": 1, "max_steps": 40}
    words = ["--resume-from", "some/checkpoints/step_00000002"]
    run(*words, **(SHORT | high))
    (*_, before, last), steps = val_losses("run"), [r["step"] for r in lasting("run")]
    assert before[0] == last[0] == steps[-1] < 40 and before[1] != last[1]


def test_a_signal_in_the_last_evaluation_repeats_both(bounded, capsys, monkeypatch):
    run(run_dir="plain", **SHORT)
    with monkeypatch.context() as patch:
        patch_evaluation(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))  # the bounded one of step 6
        assert run(**SHORT) == 4
    assert [step for step, _ in val_losses("run")] == [2, 4]
    assert run("--resume", **SHORT) == 0
    assert lasting("run") == lasting("plain")


@pytest.mark.parametrize(("eval_dtype", "dtype"), [(None, "bfloat16"), ("float32", None), ("bfloat16", "bfloat16")])
def test_eval_dtype_sets_the_precision_of_evaluations(folder, capsys, monkeypatch, eval_dtype, dtype):
    seen, eval_loss = [], Parallel.eval_loss

    def look(self, *args, **options):
        seen.append(str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else "torch.None")
        return eval_loss(self, *args, **options)

    monkeypatch.setattr(Parallel, "eval_loss", look)
    train_dtype = "bfloat16" if eval_dtype is None else "float32" if eval_dtype == "bfloat16" else "bfloat16"
    run(max_steps=1, eval_dtype=eval_dtype, dtype=train_dtype)
    assert seen == [f"torch.{dtype}"]


def test_an_evaluation_reports_its_progress():
    said, clock = [], iter([0.0, 0.0, 9.0, 10.0, 10.0, 15.0, 21.0, 21.0])
    ticker = Ticker(said.append, lambda: next(clock))
    for done in (0, 10, 20, 30, 1000):
        ticker(done, 1000)
    assert said == ["evaluating: 2% of 1,000 tokens", "evaluating: 100% of 1,000 tokens"]


def test_eval_only_is_stopped_by_a_signal_and_by_a_limit(long_text, capsys, monkeypatch):
    run(**SHORT)
    before = files_of("run")
    with monkeypatch.context() as patch:
        calls = patch_evaluation(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert run("--eval-only", **SHORT) == 4
        assert calls == [1]
    assert "stopped by SIGTERM before training began" in capsys.readouterr().err
    calls = patch_evaluation(monkeypatch, 0, None)
    assert run("--eval-only", max_minutes=1e-6, **SHORT) == 4
    assert calls == [] and files_of("run") == before


def test_a_stop_ends_the_sample(folder, capsys, monkeypatch):
    model, tokenizer = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, seq_len=8, vocab_size=257)), ByteTokenizer()
    config = load_config(flags(sample_tokens=50, sample_prompt="x"))
    parallel, asked = Parallel(model, World(torch.device("cpu")), "none"), []
    stopped = lambda: asked.append(1) or len(asked) == 3
    text = validation.sample_text(parallel, tokenizer, config, stopped)
    assert text.startswith("  | x") and len(asked) <= 5
    assert len(validation.sample_text(parallel, tokenizer, config, lambda: False)) > len(text)


def test_watch_is_called_with_the_progress_before_each_batch():
    config = load_config(["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--seq-len", "8", "--vocab-size", "256"])
    model, world, heard = GPT(config.model), World(torch.device("cpu")), []
    tokens = [torch.randint(256, (9000,), generator=torch.Generator().manual_seed(n)).numpy() for n in (0, 1)]
    config = replace(config, data=replace(config.data, corpus=("a", "b"), corpus_weights=(1.0, 1.0)))
    watch = lambda done, total: heard.append((done, total))
    validation.evaluate(Parallel(model, world, "none"), tokens, ByteTokenizer(), config, None, watch)
    assert heard == [(done, 17998) for done in (0, 8192, 8999, 17191)]


def test_what_an_interrupted_evaluation_had_written(tmp_path):
    """Whole lines of this step alone, from where the checkpoint's metrics end."""
    metrics = tmp_path / "metrics.jsonl"
    first, loss = b'{"step": 4, "val_loss": 9.0}\n', b'{"step": 5, "val_loss": 1.5}\n'
    other = b'{"step": 6, "val_loss": 2}\n'
    for written, expected in (
        (b"", ([], 0)),
        (loss, ([1.5], len(loss))),
        (loss + loss, ([1.5, 1.5], 2 * len(loss))),
        (loss + other + loss, ([1.5], len(loss))),
        (loss + loss[:-1], ([1.5], len(loss))),
        (loss + b"{\n", ([1.5], len(loss))),
        (b'{"step": 5}\n', ([], 0)),
    ):
        metrics.write_bytes(first + written)
        assert validation._losses_written(metrics, 5, len(first)) == expected
    assert validation._losses_written(tmp_path / "none", 5, 0) == ([], 0)


def test_ranks_other_than_0_add_nothing_to_a_recovered_evaluation(tmp_path):
    sums = []
    world = SimpleNamespace(main=False, sum=lambda *values: sums.append(values) or values)
    at = SimpleNamespace(evaluation_due=True, step=3)
    recover_evaluation(at, tmp_path / "checkpoints" / "step_00000003", {}, None, [], world)
    assert sums == [(0.0, 0, 0)]

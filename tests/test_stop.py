"""A signal or a time limit is heard by whatever takes long, and costs nothing that was done."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch

from gpt import tokenize_corpus, validation
from gpt.command_line import load_config
from gpt.config import ModelConfig
from gpt.distributed import Parallel, World
from gpt.errors import run_command
from gpt.evaluate import Arguments
from gpt.evaluate import main as evaluate_command
from gpt.model import GPT
from gpt.monitor import CorpusProgress, Ticker
from gpt.saver import Saver
from gpt.stop import Stopped, StopRequest, aside, process_seconds
from gpt.tokenizer import ByteTokenizer
from tests.train_checks import TEXT, flags, lasting, names_in, run, weights_of


@pytest.fixture
def long_text(folder) -> Path:
    """Validation text of two batches."""
    (folder / "text.txt").write_text(TEXT * 64)
    return folder


def patch_evaluation(monkeypatch, at: int, act) -> list[int]:
    """act() in the at-th batch of all evaluations, counted from 1; a list with an entry for each batch."""
    calls, eval_loss = [], Parallel.eval_loss

    def counted(self, *args, **options):
        calls.append(1)
        if len(calls) == at:
            act()
        return eval_loss(self, *args, **options)

    monkeypatch.setattr(Parallel, "eval_loss", counted)
    return calls


OPTIONS = {"max_steps": 6, "n_layer": 1, "eval_interval": 2, "checkpoint_interval": 3, "ema_decay": 0.5}


def files_of(run_dir: str) -> dict[str, object]:
    """Every checkpoint's content, without what depends on the clock."""
    found: dict[str, object] = {}
    for path in Path(run_dir, "checkpoints").rglob("*.*"):
        name = str(path.relative_to(run_dir))
        if path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "metrics_bytes"}
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


# Evaluations.


@pytest.mark.parametrize(
    ("batch", "step", "whole"), [(1, 2, False), (2, 2, True), (3, 4, False), (4, 4, True), (5, 6, False)]
)
def test_a_signal_in_an_evaluation_saves_at_once(long_text, capsys, monkeypatch, batch, step, whole):
    """Of a step that is saved, or is not, or is the last. One that was not finished is made again."""
    run(run_dir="plain", **OPTIONS)
    with monkeypatch.context() as patch:
        calls = patch_evaluation(patch, batch, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(**OPTIONS) == 4
    assert len(calls) == batch
    output = capsys.readouterr().out
    assert f"stopped by SIGTERM after step {step}; --resume goes on from there" in output
    assert ("with the evaluation of that step" in output) != whole
    assert f"step_{step:08d}" in names_in("run/checkpoints")
    assert [r["step"] for r in lasting("run") if "val_loss" in r] == list(range(2, step + whole, 2))
    assert run("--resume", **OPTIONS) == 0
    assert lasting("run") == lasting("plain")
    plain, again = files_of("plain"), files_of("run")
    assert all(again[name] == plain[name] for name in plain if name in again)
    assert {name for name in plain if "00006" in name or "best" in name} <= set(again)


def test_a_signal_in_the_last_batch_of_all_ends_a_run_as_it_would_have_ended(long_text, capsys, monkeypatch):
    run(run_dir="plain", **OPTIONS)
    patch_evaluation(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(**OPTIONS) == 0
    assert lasting("run") == lasting("plain") and files_of("run") == files_of("plain")


def test_what_a_kill_in_an_evaluation_leaves_was_saved_before_it(long_text, capsys, monkeypatch):
    run(run_dir="plain", **OPTIONS)

    def die():
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch_evaluation(patch, 6, die)
        with pytest.raises(ZeroDivisionError):
            run(**OPTIONS)
    assert "step_00000006" in names_in("run/checkpoints")
    assert run("--resume", **OPTIONS) == 0
    assert lasting("run") == lasting("plain")
    assert files_of("run") == files_of("plain")


def test_an_evaluation_that_was_made_is_not_made_again(long_text, capsys, monkeypatch):
    """The kill came after its line in metrics.jsonl and before the best checkpoint; and once more, after the end."""
    run(run_dir="plain", **OPTIONS)
    save = Saver.save

    def die_at_the_best(self, tensors, state, *, kinds):
        if kinds == ("best",) and state["step"] == 6:
            raise ZeroDivisionError
        save(self, tensors, state, kinds=kinds)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", die_at_the_best)
        with pytest.raises(ZeroDivisionError):
            run(**OPTIONS)
    assert "best_00000006" not in names_in("run/checkpoints")
    calls = patch_evaluation(monkeypatch, 0, None)
    for _ in range(2):
        assert run("--resume", **OPTIONS) == 0
        assert lasting("run") == lasting("plain")
        assert files_of("run") == files_of("plain")
    assert calls == []


def test_a_run_that_is_continued_elsewhere_knows_the_evaluation_of_its_step(long_text, capsys):
    """--resume-from another run: its best loss counts, and is in the new run's checkpoints."""
    options = OPTIONS | {"eval_interval": 3}
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
    """By default an evaluation reads 100 of the 244 validation tokens that can be predicted."""
    monkeypatch.setattr(validation, "DEFAULT_TOKENS", 100)
    return folder


def val_losses(run_dir: str) -> list[tuple[int, float]]:
    return [(r["step"], r["val_loss"]) for r in lasting(run_dir) if "val_loss" in r]


def test_by_default_evaluations_are_bounded_and_the_last_reads_all(bounded, capsys):
    run(**OPTIONS)
    output = capsys.readouterr().out
    assert (
        "evaluations read the first 100 validation tokens, not all 244, and the last one all; --eval-tokens" in output
    )
    assert "bits per byte on all 244 tokens" in output
    run(run_dir="some", eval_tokens=100, **OPTIONS)
    run(run_dir="all", eval_tokens=244, **OPTIONS)
    assert "evaluations read" not in capsys.readouterr().out
    bounded_losses, some, whole = map(val_losses, ("run", "some", "all"))
    assert bounded_losses == [*some, whole[-1]] and some != whole
    best = min(some, key=lambda pair: pair[1])
    state = json.loads(next(Path("run/checkpoints").glob("best_*/state.json")).read_text())
    assert state["best"] == dict(zip(("step", "val_loss"), best, strict=True))  # of equal texts
    assert run("--resume", **OPTIONS) == 0
    assert val_losses("run") == bounded_losses


def test_a_run_that_patience_ends_reads_all_at_its_end(bounded, capsys):
    run(run_dir="some", **(OPTIONS | {"max_steps": 2}))
    high = {"learning_rate": 2.0, "schedule": "constant", "warmup_steps": 0, "patience": 1, "max_steps": 40}
    words = ["--resume-from", "some/checkpoints/step_00000002"]
    run(*words, **(OPTIONS | high))
    (*_, before, last), steps = val_losses("run"), [r["step"] for r in lasting("run")]
    assert before[0] == last[0] == steps[-1] < 40 and before[1] != last[1]


def test_a_signal_in_the_last_evaluation_of_all_makes_both_again(bounded, capsys, monkeypatch):
    run(run_dir="plain", **OPTIONS)
    with monkeypatch.context() as patch:
        patch_evaluation(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))  # the bounded one of step 6
        assert run(**OPTIONS) == 4
    assert [step for step, _ in val_losses("run")] == [2, 4]
    assert run("--resume", **OPTIONS) == 0
    assert lasting("run") == lasting("plain")


@pytest.mark.parametrize(("eval_dtype", "dtype"), [(None, "bfloat16"), ("float32", None), ("bfloat16", "bfloat16")])
def test_evaluations_have_their_own_precision(folder, capsys, monkeypatch, eval_dtype, dtype):
    seen, eval_loss = [], Parallel.eval_loss

    def look(self, *args, **options):
        seen.append(str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else "torch.None")
        return eval_loss(self, *args, **options)

    monkeypatch.setattr(Parallel, "eval_loss", look)
    train_dtype = "bfloat16" if eval_dtype is None else "float32" if eval_dtype == "bfloat16" else "bfloat16"
    run(max_steps=1, eval_dtype=eval_dtype, dtype=train_dtype)
    assert seen == [f"torch.{dtype}"]


@pytest.mark.parametrize("told", ["", "1 (python) R", "1 (python) R" + " x" * 30])
def test_a_process_that_cannot_know_its_start_counts_from_the_import(monkeypatch, told):
    monkeypatch.setattr("gpt.stop.Path.read_text", lambda path: told)
    monkeypatch.setattr("gpt.stop._IMPORTED", 90.0)
    monkeypatch.setattr("gpt.stop.time.monotonic", lambda: 100.0)
    assert process_seconds() == 10.0


def test_an_evaluation_says_how_far_it_is():
    said, clock = [], iter([0.0, 0.0, 9.0, 10.0, 10.0, 15.0, 21.0, 21.0])
    ticker = Ticker(said.append, lambda: next(clock))
    for done in (0, 10, 20, 30, 1000):
        ticker(done, 1000)
    assert said == ["evaluating: 2% of 1,000 tokens", "evaluating: 100% of 1,000 tokens"]


def test_eval_only_is_stopped_by_a_signal_and_by_a_limit(long_text, capsys, monkeypatch):
    run(**OPTIONS)
    before = files_of("run")
    with monkeypatch.context() as patch:
        calls = patch_evaluation(patch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert run("--eval-only", **OPTIONS) == 4
        assert calls == [1]
    assert "stopped by SIGTERM before training began" in capsys.readouterr().err
    calls = patch_evaluation(monkeypatch, 0, None)
    assert run("--eval-only", max_minutes=1e-6, **OPTIONS) == 4
    assert calls == [] and files_of("run") == before


def test_the_command_that_scores_hears_sigterm(tiny_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    true_forward = GPT.forward

    def forward(self, *args, **options):
        signal.raise_signal(signal.SIGTERM)
        return true_forward(self, *args, **options)

    monkeypatch.setattr(GPT, "forward", forward)
    arguments = Arguments(str(tiny_run), corpus=(str(tmp_path / "text.txt"),), device="cpu")
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: evaluate_command(arguments))
    assert stop.value.code == 4
    assert "interrupted" in capsys.readouterr().err


# The rest of a training.


def test_a_sample_ends_where_a_stop_is_heard(folder, capsys, monkeypatch):
    model, tokenizer = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, seq_len=8, vocab_size=257)), ByteTokenizer()
    config, world = load_config(flags(sample_tokens=50, sample_prompt="x")), World(torch.device("cpu"))
    asked = []
    stopped = lambda: asked.append(1) or len(asked) == 3
    text = validation.sample_text(model, Parallel(model, world, "none"), world, tokenizer, config, stopped)
    assert text.startswith("  | x") and len(asked) <= 5
    assert len(validation.sample_text(model, Parallel(model, world, "none"), world, tokenizer, config)) > len(text)


@pytest.mark.parametrize("micro_batch", [10, 11, 12])
def test_a_signal_between_micro_batches_gives_up_the_step(folder, capsys, monkeypatch, micro_batch):
    """Of the third step of four micro-batches; before its first there is none to give up."""
    options = OPTIONS | {"batch_size": 2, "grad_accum_steps": 4, "dropout": 0.1}
    run(run_dir="plain", **options)
    calls, true_loss = [], GPT.loss

    def loss(self, *args, **kwargs):
        if self.training:
            calls.append(1)
            if len(calls) == micro_batch:
                signal.raise_signal(signal.SIGTERM)
        return true_loss(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "loss", loss)
        assert run(**options) == 4
    abandoned = micro_batch < 12
    assert len(calls) == micro_batch
    assert f"after step {2 if abandoned else 3};" in capsys.readouterr().out
    assert names_in("run/checkpoints")[-1] == f"step_0000000{2 if abandoned else 3}"
    assert run("--resume", **options) == 0
    assert lasting("run") == lasting("plain")
    whole = weights_of("plain", 6)
    assert all(torch.equal(w, whole[name]) for name, w in weights_of("run", 6).items())


def test_a_signal_in_the_first_step_saves_nothing_and_loses_nothing(folder, capsys, monkeypatch):
    true_loss = GPT.loss
    options = OPTIONS | {"batch_size": 4, "grad_accum_steps": 2}
    with monkeypatch.context() as patch:
        told = lambda self, *args, **words: signal.raise_signal(15) or true_loss(self, *args, **words)
        patch.setattr(GPT, "loss", told)
        assert run(**options) == 4
    assert not Path("run/checkpoints").exists()
    assert run("--resume", **options) == 0


@pytest.mark.parametrize("stage", ["reading", "tokenizing"])
def test_a_signal_while_the_corpus_is_prepared(folder, capsys, monkeypatch, stage):
    call = CorpusProgress.__call__

    def told(self, what, done, total):
        call(self, what, done, total)
        if what == stage:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(CorpusProgress, "__call__", told)
        assert run(max_steps=1, cache_dir="cache") == 4
    assert capsys.readouterr().err == "stopped by SIGTERM before training began; the same command begins again\n"
    assert not Path("run").exists()
    assert run(max_steps=1, cache_dir="cache") == 0


def test_what_was_tokenized_before_a_signal_is_kept(folder, capsys, monkeypatch):
    (folder / "text.txt").write_text(TEXT * 4)
    monkeypatch.setattr(tokenize_corpus, "GROUP", 500)
    monkeypatch.setattr(tokenize_corpus, "WORTH_KEEPING", 2000)
    monkeypatch.setattr("gpt.readers._CHUNK", 500)
    encode, characters, append, calls = tokenize_corpus._encode, [], tokenize_corpus._append, []
    counted = lambda group, tokenizer: characters.extend(len(p.text) for p in group) or encode(group, tokenizer)
    monkeypatch.setattr(tokenize_corpus, "_encode", counted)

    def told(writers, *rest):
        calls.append(1)
        if len(calls) == 12:
            writers["train"].append(torch.zeros(7, dtype=torch.uint16).numpy())  # half of a group
            signal.raise_signal(signal.SIGTERM)
        append(writers, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_corpus, "_append", told)
        assert run(max_steps=1, cache_dir="cache") == 4
    characters.clear()
    assert run(max_steps=1, cache_dir="cache") == 0
    assert sum(characters) == len(TEXT) * 4 - 11 * 500
    run(max_steps=1, run_dir="other", cache_dir="fresh")
    tokens = [next(Path(cache).rglob("train.tokens")).read_bytes() for cache in ("cache", "fresh")]
    assert tokens[0] == tokens[1]


# The request itself.


def test_a_signal_is_heard_beside_a_long_call():
    """As in the training of a BPE, which is one call; the other thread is left alone."""
    never, main_thread = threading.Event(), threading.main_thread().ident

    def work():
        signal.pthread_kill(main_thread, signal.SIGTERM)
        never.wait()

    with StopRequest() as stop:
        with pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
            aside(work)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("a signal that was heard before is heard at the block's start")
    never.set()
    assert aside(lambda: 3) == 3
    with pytest.raises(KeyError):
        aside(lambda: {}[0])


def test_a_time_limit_that_ends_within_a_block_is_raised_there():
    with StopRequest((process_seconds() + 0.05) / 60) as stop:
        with pytest.raises(Stopped, match="its limit of"), stop.at_once():
            threading.Event().wait(60)
        with stop.at_once():  # over already
            assert stop.reason.startswith("its limit of")


def test_an_alarm_is_set_for_what_is_left_and_does_not_outlive_its_block():
    timers = lambda: {thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)}
    before = timers()
    with StopRequest(1000) as stop, stop.at_once():
        (alarm,) = timers() - before
        assert alarm.interval == pytest.approx(60_000 - process_seconds(), abs=30)
        assert alarm.daemon and not alarm.finished.is_set()
    assert alarm.finished.is_set()
    with StopRequest() as stop, stop.at_once():
        assert timers() <= {*before, alarm}


def test_a_signal_is_raised_once_and_only_within_a_block():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    cleaned = []

    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # torchrun's second one does not disturb what cleans up
            cleaned.append(1)

    with StopRequest() as stop, pytest.raises(Stopped), stop.at_once():
        work()
    assert cleaned and signal.getsignal(signal.SIGTERM) == before

"""Signals and time limits interrupt long work without losing results."""

import signal
import threading
from pathlib import Path

import pytest
import torch

from gpt.data import tokenize_corpus
from gpt.data.progress_bar import CorpusProgress
from gpt.errors import run_command
from gpt.evaluation.command import Arguments
from gpt.evaluation.command import main as evaluate_command
from gpt.model import GPT
from gpt.stop import Stopped, StopRequest, aside, process_seconds
from tests.train_checks import SHORT, TEXT, lasting, names_in, run, weights_of

# A training.


@pytest.mark.parametrize("micro_batch", [10, 11, 12])
def test_a_signal_between_micro_batches_abandons_the_step(folder, capsys, monkeypatch, micro_batch):
    """Step 3 has micro-batches 9 to 12; a signal in the last one is too late to abandon the step."""
    options = SHORT | {"batch_size": 2, "grad_accum_steps": 4, "dropout": 0.1}
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


def test_a_signal_in_the_first_step_saves_nothing(folder, capsys, monkeypatch):
    true_loss = GPT.loss
    options = SHORT | {"batch_size": 4, "grad_accum_steps": 2}
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
    assert capsys.readouterr().err == "stopped by SIGTERM before training began; run the same command again\n"
    assert not Path("run").exists()
    assert run(max_steps=1, cache_dir="cache") == 0


def test_what_was_tokenized_before_a_signal_is_kept(folder, capsys, monkeypatch):
    (folder / "text.txt").write_text(TEXT * 4)
    monkeypatch.setattr(tokenize_corpus, "GROUP", 500)
    monkeypatch.setattr(tokenize_corpus, "WORTH_KEEPING", 2000)
    monkeypatch.setattr("gpt.data.readers._CHUNK", 500)
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


# The command that scores.


def test_evaluate_stops_on_sigterm(tiny_run, tmp_path, capsys, monkeypatch):
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


# The request itself.


@pytest.mark.parametrize("told", ["", "1 (python) R", "1 (python) R" + " x" * 30])
def test_without_proc_the_time_counts_from_the_import(monkeypatch, told):
    monkeypatch.setattr("gpt.stop.Path.read_text", lambda path: told)
    monkeypatch.setattr("gpt.stop._IMPORTED", 90.0)
    monkeypatch.setattr("gpt.stop.time.monotonic", lambda: 100.0)
    assert process_seconds() == 10.0


def test_a_signal_interrupts_a_long_library_call():
    """Such as the training of a BPE, which is one call; the other thread continues."""
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


def test_a_time_limit_is_raised_within_a_block():
    with StopRequest((process_seconds() + 0.05) / 60) as stop:
        with pytest.raises(Stopped, match="its limit of"), stop.at_once():
            threading.Event().wait(60)
        with stop.at_once():  # over already
            assert stop.reason.startswith("its limit of")


def test_the_alarm_ends_with_its_block():
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

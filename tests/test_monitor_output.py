"""The output of a training: lines on a pipe, a bar on a terminal, and the list of written files."""

import builtins
import io
import json
import logging
import math
import os
import sys
import types

import pytest

from gpt.data.progress_bar import CorpusProgress
from gpt.errors import UserError
from gpt.run.metrics import metrics_lines, read_metrics
from gpt.training import monitor as monitor_module
from gpt.training.command import load_config
from gpt.training.monitor import Monitor, SilentMonitor
from gpt.training.wandb_run import start_wandb, title_of


def monitor_in(folder, *words: str, **options) -> Monitor:
    return Monitor(load_config(["--run-dir", str(folder), "--max-steps", "100", *words]), **options)


def train_record(step: int, loss: float = 1.25, rate: float = 12_345.0) -> dict:
    return {"step": step, "train_loss": loss, "tokens_per_second": rate}


@pytest.fixture
def on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("rich._console", None)  # an earlier test's console is not a terminal


def test_a_pipe_gets_a_line_for_each_twentieth_of_the_run(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    for step in range(1, 18):
        monitor.log(train_record(step))
    monitor.close()
    assert capsys.readouterr().out.splitlines() == [
        f"step {n}/100: loss 1.2500  12.3k tokens/s" for n in (1, 6, 11, 16)
    ]


def test_the_first_step_after_a_rollback_has_a_line_and_the_records_of_the_later_ones_are_gone(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    for step in (1, 5, 7):
        monitor.log(train_record(step))
    monitor.rewind(5)
    monitor.log(train_record(6, 2.0))
    monitor.close()
    assert [line[:10] for line in capsys.readouterr().out.splitlines()] == ["step 1/100", "step 7/100", "step 6/100"]
    assert [(r["step"], r["train_loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.25),
        (5, 1.25),
        (6, 2.0),
    ]
    assert [point[0] for point in monitor.losses.train.points] == [1, 5, 6]


def test_a_validation_loss_is_shown_with_its_tokens_and_the_runs_seconds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monitor_module, "process_seconds", lambda: 61.23456)
    monitor = monitor_in(tmp_path)
    monitor.log({"step": 9, "val_loss": 1.5, "bits_per_byte": 2.0})
    monitor.log({"step": 9, "val_loss": math.nan, "bits_per_byte": math.inf, "val_tokens": 12_345})
    monitor.log({"step": 9, "event": "none that is shown"})
    monitor.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 9: validation loss 1.5000 nats per token, 2.0000 bits per byte, 61.2 s",
        "step 9: validation loss nan nats per token, inf bits per byte on all 12,345 tokens, 61.2 s",
    ]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == [
        {"step": 9, "val_loss": 1.5, "bits_per_byte": 2.0, "seconds": 61.235},
        {"step": 9, "val_tokens": 12_345, "seconds": 61.235},
        {"step": 9, "event": "none that is shown", "seconds": 61.235},
    ]


def test_a_terminal_gets_a_bar_instead_of_lines(tmp_path, capsys, on_a_terminal):
    monitor = monitor_in(tmp_path, start_step=3)
    (task,) = monitor.progress.tasks
    assert (task.completed, task.total, task.fields["status"]) == (3, 100, "")
    monitor.log(train_record(7))
    assert (task.completed, task.fields["status"]) == (7, "loss 1.2500  12.3k tokens/s")
    monitor.advance(8)
    assert (task.completed, task.fields["status"]) == (8, "loss 1.2500  12.3k tokens/s")
    monitor.evaluating(250, 1000)
    assert (task.completed, task.fields["status"]) == (8, "evaluating: 25% of 1,000 tokens")
    monitor.rewind(5)
    assert task.completed == 5
    assert monitor.progress.live.is_started
    monitor.close()
    assert not monitor.progress.live.is_started
    output = capsys.readouterr().out
    assert "step" in output and "5/100" in output and "step 7/100: " not in output


def test_a_long_evaluation_is_reported_on_a_pipe(tmp_path, capsys, monkeypatch):
    monitor = monitor_in(tmp_path)
    seconds = iter([0.0, 0.0, 10.0, 10.0])
    monkeypatch.setattr(monitor.ticker, "_clock", lambda: next(seconds))
    monitor.evaluating(0, 1000)
    monitor.evaluating(250, 1000)
    assert capsys.readouterr().out == ""
    monitor.evaluating(500, 1000)
    monitor.close()
    assert capsys.readouterr().out == "evaluating: 50% of 1,000 tokens\n"


def test_nothing_to_say_prints_nothing_and_a_long_line_is_not_broken(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    monitor.say(None)
    monitor.say("word " * 60)
    monitor.close()
    assert capsys.readouterr().out == "word " * 60 + "\n"


@pytest.mark.parametrize("name", ["kernels.attention", "gpt.corpus"])
def test_log_messages_are_printed_above_the_bar(tmp_path, capsys, name):
    monitor = monitor_in(tmp_path)
    logging.getLogger(name).info("%d [tables]", 3)
    logging.getLogger(name).debug("a detail")
    monitor.close()
    logging.getLogger(name).info("after the end")
    assert capsys.readouterr().out == "3 [tables]\n"


def test_a_half_written_line_means_a_full_disk(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    monitor.file.close()
    monitor.file = types.SimpleNamespace(write=lambda line: len(line) - 1, close=lambda: None)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device; the checkpoints are"):
        monitor.log(train_record(1))
    monitor.close()


@pytest.mark.parametrize("line", ['{"step": 2', "[2]", '{"step": 2.0}', '{"step": true}', "{}", "[" * 100_000])
def test_records_end_at_the_first_line_that_is_invalid(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    assert list(metrics_lines(path)) == [({"step": 1}, 12)]
    assert list(metrics_lines(tmp_path / "none")) == []


def test_written_files_are_listed(tmp_path, capsys):
    """The newest and the best checkpoint, and the trace files that exist."""
    monitor = monitor_in(tmp_path)
    always = ["config.toml", "tokenizer.json", "corpus.json", "run.json", "metrics.jsonl", "loss.png"]
    assert monitor.written() == always
    for name in ("step_00000002", "step_00000010", "best_00000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    (tmp_path / "profile.txt").write_text("")
    monitor.wandb = types.SimpleNamespace(finish=lambda: None)
    newest = ["checkpoints/step_00000010", "checkpoints/best_00000002"]
    assert monitor.written() == [*always, *newest, "profile.txt", "wandb"]
    monitor.close()


def test_a_failed_plot_is_reported(tmp_path, capsys, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor_module, "plot_losses", refuse)
    monitor_in(tmp_path).close()
    assert capsys.readouterr().out == "loss.png was not drawn: No space left on device\n"


def test_the_picture_has_the_runs_name_and_losses(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(monitor_module, "plot_losses", lambda *arguments: drawn.append(arguments))
    folder = tmp_path / "first"
    folder.mkdir()
    monitor = monitor_in(folder)
    monitor.close()
    assert monitor.file.closed
    assert drawn == [(monitor.losses, folder / "loss.png", "first")]


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path, monkeypatch):
    assert title_of(tmp_path / "a\udcff\u00e9") == "a\ufffd\u00e9"
    monkeypatch.chdir(tmp_path)
    assert title_of(type(tmp_path)(".")) == tmp_path.name


def test_other_ranks_report_nothing(capsys):
    silent = SilentMonitor()
    silent.say("text"), silent.advance(1), silent.log({"step": 1}), silent.rewind(0), silent.close()
    assert silent.state() == {} and capsys.readouterr().out == ""


class FakeWandb(types.SimpleNamespace):
    """The parts of wandb that a monitor uses. `started`: options of each start; `logged`: records of each run."""

    class Error(Exception):
        pass

    def __init__(self, failure: str = ""):
        self.started, self.logged, self.finished, self.failure = [], [], 0, failure

    def init(self, **options):
        if self.failure:
            raise self.Error(self.failure)
        self.started.append(options)
        return types.SimpleNamespace(id="id7", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.logged.append((values, step))

    def finish(self):
        self.finished += 1

    def Settings(self, **options):
        return options


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_options_and_every_number(tmp_path, capsys, monkeypatch, wandb):
    monkeypatch.setattr(monitor_module, "process_seconds", lambda: 2.0)
    monitor = monitor_in(tmp_path, "--wandb", "offline", "--wandb-project", "words", wandb_id="old1")
    monitor.log({"step": 4, "train_loss": math.inf, "tokens_per_second": 1.0})
    assert monitor.written()[-1] == "wandb"
    monitor.close()
    (options,) = wandb.started
    config = options.pop("config")
    assert (config["train"]["max_steps"], config["log"]["wandb"]) == (100, "offline")
    assert config["train"]["run_dir"] == str(tmp_path)
    assert options == {
        "project": "words",
        "name": tmp_path.name,
        "dir": tmp_path,
        "mode": "offline",
        "id": "old1",
        "resume": None,
        "settings": {"silent": True, "console": "off"},
    }
    assert wandb.logged == [({"train_loss": math.inf, "tokens_per_second": 1.0, "seconds": 2.0}, 4)]
    assert wandb.finished == 1


def test_a_failed_wandb_start_says_what_to_do(tmp_path, monkeypatch, wandb):
    config = load_config(["--run-dir", str(tmp_path), "--wandb", "online"])
    wandb.failure = "no network"
    with pytest.raises(UserError, match=r"wandb online could not start \(no network\): try --wandb offline, or off"):
        start_wandb(config, None)
    imported = builtins.__import__

    def without(name, *rest, **options):
        if name == "wandb":
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb, or leave --wandb off"):
        start_wandb(config, None)


def test_wandb_refuses_a_folder_and_takes_a_corpus_that_is_not_utf8(tmp_path, wandb):
    odd = os.fsdecode(b"a\xffb")
    with pytest.raises(UserError, match=r"wandb cannot use .*, which is not UTF-8 here: give another --run-dir"):
        start_wandb(load_config(["--run-dir", str(tmp_path / odd), "--wandb", "offline"]), None)
    assert not wandb.started
    start_wandb(load_config(["--run-dir", str(tmp_path), "--corpus", odd, "--wandb", "offline"]), None)
    assert wandb.started[0]["config"]["data"]["corpus"] == ["a?b"]


@pytest.mark.parametrize("terminal", [False, True])
def test_reading_a_corpus_has_a_bar_for_each_stage_on_a_terminal(monkeypatch, on_a_terminal, terminal):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", screen)
    with CorpusProgress() as progress:
        progress("reading", 1_000_000, 4_000_000)
        progress("reading", 2_000_000, 5_000_000)
        progress("writing", 0, 7_000_000)
        tasks = [(task.description, task.completed, task.total) for task in progress.progress.tasks]
        assert tasks == [("reading", 2_000_000, 5_000_000), ("writing", 0, 7_000_000)]
        assert progress.progress.live.is_started is terminal
    assert not progress.progress.live.is_started
    assert ("reading" in screen.getvalue()) is terminal
    assert ("2.0/5.0 MB" in screen.getvalue()) is terminal


def test_without_reading_a_corpus_no_bar_is_imported():
    with CorpusProgress() as progress:
        pass
    assert progress.progress is None

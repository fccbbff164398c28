"""The sampling command as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt.command_line import load_config, parse_flags
from gpt.errors import run_command
from sample import Arguments
from sample import main as sample
from train import main as train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    (folder / "text.txt").write_text("all work and no play makes jack a dull boy\n" * 20)
    words = [
        "--corpus",
        str(folder / "text.txt"),
        "--run-dir",
        str(folder / "run"),
        "--cache-dir",
        str(folder / "cache"),
    ]
    sizes = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--seq-len", "32", "--max-steps", "3"]
    assert train(load_config([*words, *sizes, "--sample-tokens", "0", "--device", "cpu"])) == 0
    return folder / "run"


def status_of(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: sample(parse_flags(Arguments, words, prog="sample.py")))
    return stop.value.code


def test_prompt_and_continuation_are_printed(run_dir, capsys):
    assert status_of(str(run_dir), "--prompt", "all work", "--max-new-tokens", "10", "--top-k", "5") == 0
    output = capsys.readouterr().out
    assert output.startswith("all work")
    assert len(output) == len("all work") + 10 + 1


def test_the_whole_command_streams_to_a_pipe(run_dir):
    command = [sys.executable, str(ROOT / "sample.py"), str(run_dir), "--prompt=jack", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) == 32 + 1


def test_rolling_goes_past_the_context(run_dir, capsys):
    assert status_of(str(run_dir), "--prompt", "all", "--max-new-tokens", "100", "--rolling") == 0
    assert len(capsys.readouterr().out) == 104


def test_an_empty_prompt_is_no_error(run_dir, capsys):
    assert status_of(str(run_dir), "--max-new-tokens", "5") == 0
    assert len(capsys.readouterr().out) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Ünicode"], "Ü"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--max-new-tokens", "100"], "more than the model's context of 32"),
        (["--temprature", "1"], "did you mean '--temperature'"),
        (["--device", "tpu"], "device 'tpu' cannot be used here"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_bad_input_is_one_sentence_and_prints_nothing_else(run_dir, capsys, words, message):
    assert status_of(str(run_dir), *words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert len(output.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "no such directory"),
        (lambda d: d.mkdir(), "it has no config.toml"),
        (lambda d: (d.mkdir(), (d / "config.toml").write_text("")), "has no checkpoint yet"),
    ],
    ids=["missing", "empty", "no-checkpoint"],
)
def test_a_directory_that_holds_no_run_is_refused(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "run")
    assert status_of(str(tmp_path / "run")) == 2
    assert message in capsys.readouterr().err

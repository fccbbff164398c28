"""The sampling command as a user runs it."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.command_line import parse_flags
from gpt.errors import run_command
from gpt.training.command import load_config
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
    draft = [*words[:-4], "--run-dir", str(folder / "draft"), "--cache-dir", str(folder / "cache")]
    assert train(load_config([*draft, *sizes, "--sample-tokens", "0", "--device", "cpu", "--seed", "2"])) == 0
    byte = [*words[:-4], "--run-dir", str(folder / "byte"), "--cache-dir", str(folder / "cache"), "--tokenizer", "byte"]
    assert train(load_config([*byte, *sizes, "--sample-tokens", "0", "--device", "cpu"])) == 0
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


def test_an_empty_prompt_is_allowed(run_dir, capsys):
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
        (["--top-k", "0"], "top_k must be at least 1"),
        (["--min-p", "2"], "min_p must be at least 0 and at most 1"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["--logit-bias", "a"], "logit_bias must be TOKEN=NUMBER, not 'a'"),
        (["--logit-bias", "all=3"], "logit_bias: 'all' is 3 tokens, not one"),
        (["--stop", ""], "stop must not be an empty string"),
        (["--stop-tokens", "999"], "stop_tokens: 999 is not a token id"),
        (["--num-samples", "0"], "num_samples must be at least 1"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--dtype", "int4"], "int4"),
        (["--quantize", "int4"], "int4"),
        (["--speculate", "magic"], "magic"),
        (["--draft-tokens", "3"], "--draft-tokens needs --draft or --speculate"),
        (["--speculate", "ngram", "--draft", "x"], "--draft and --speculate contradict each other"),
        (["--draft", "nowhere"], "nowhere is not a run directory"),
        (["--prompt", "a", "--prompt-file", "x"], "--prompt and --prompt-file contradict each other"),
        (["--jsonl", "--output", "x"], "--output and --jsonl contradict each other"),
        (["--interactive", "--prompt", "a"], "--interactive and --prompt contradict each other"),
        (["--interactive", "--jsonl"], "--interactive and --jsonl contradict each other"),
        (["--interactive", "--num-samples", "2"], "--interactive and --num-samples contradict each other"),
        (["--prompt-file", "/nowhere.txt"], "cannot read the prompt file /nowhere.txt"),
        (["--output", "/nowhere/x.jsonl"], "cannot write /nowhere/x.jsonl"),
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
        (lambda d: None, "it does not exist"),
        (lambda d: d.mkdir(), "it has no config.toml"),
        (lambda d: (d.mkdir(), (d / "config.toml").write_text("")), "has no checkpoint yet"),
    ],
    ids=["missing", "empty", "no-checkpoint"],
)
def test_a_directory_without_a_run_is_refused(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "run")
    assert status_of(str(tmp_path / "run")) == 2
    assert message in capsys.readouterr().err


# Prompts in files, samples as JSON.


def test_several_samples_are_printed_one_after_the_other(run_dir, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("all work\n\nno play\n")
    words = ["--prompt-file", str(tmp_path / "prompts.txt"), "--num-samples", "2", "--max-new-tokens", "5"]
    assert status_of(str(run_dir), *words) == 0
    lines = re.split(r"--- prompt (\d), sample (\d) ---\n", capsys.readouterr().out)
    assert lines[1::3] == list("0011") and lines[2::3] == list("0101")
    assert [len(text) for text in lines[3::3]] == [14, 14, 13, 13]
    assert all(text.startswith(prompt) for text, prompt in zip(lines[3::3], ["all work"] * 2 + ["no play"] * 2))


@pytest.mark.parametrize("where", ["stdout", "file"])
def test_samples_as_json(run_dir, tmp_path, capsys, where):
    (tmp_path / "prompts.jsonl").write_text('{"id": 7, "prompt": "all work"}\n{"prompt": "", "note": ["é"]}\n')
    target = ["--jsonl"] if where == "stdout" else ["--output", str(tmp_path / "out.jsonl")]
    words = ["--prompt-file", str(tmp_path / "prompts.jsonl"), "--num-samples", "3", "--max-new-tokens", "5", *target]
    assert status_of(str(run_dir), *words, "--seed", "3", "--batch-size", "2") == 0
    output = capsys.readouterr().out
    if where == "file":
        assert output == ""
        output = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    records = sorted(map(json.loads, output.splitlines()), key=lambda r: (r["prompt_index"], r["sample_index"]))
    assert [(r["prompt_index"], r["sample_index"]) for r in records] == [(i, j) for i in range(2) for j in range(3)]
    assert [r.get("id") for r in records] == [7] * 3 + [None] * 3
    assert [r.get("note") for r in records] == [None] * 3 + [["é"]] * 3
    for record in records:
        assert len(record["text"]) == len(record["tokens"]) == len(record["logprobs"]) == 5
        assert record["finish_reason"] == "length" and max(record["logprobs"]) < 0
    # The reported seed generates the sample alone.
    last = records[-2]
    assert status_of(str(run_dir), "--jsonl", "--max-new-tokens", "5", "--seed", str(last["seed"])) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == last["tokens"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "has no prompts"),
        ("a.jsonl", "", "has no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n\nall\n', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", '{"text": "a"}', 'line 1 must be an object {"prompt": "text"}'),
        ("a.jsonl", '{"prompt": "a", "tokens": 1}', "line 1: the output sets the field 'tokens' itself"),
        ("a.txt", "all\nÜ", "prompt 1: the tokenizer lacks the character 'Ü'"),
        ("a.txt", b"\xff", "is not UTF-8"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:12],
)
def test_bad_prompt_files_are_refused_in_one_sentence(run_dir, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert status_of(str(run_dir), "--prompt-file", str(tmp_path / name), "--jsonl") == 2
    output = capsys.readouterr()
    assert message in output.err and len(output.err.strip().splitlines()) == 1
    assert output.out == ""


def test_a_prompt_from_standard_input(run_dir, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("all\nwork\n"))
    assert status_of(str(run_dir), "--prompt", "-", "--max-new-tokens", "3") == 0
    output = capsys.readouterr().out
    assert output.startswith("all\nwork") and len(output) == 8 + 3 + 1


@pytest.mark.parametrize("words", [("--prompt", "-"), ("--interactive",)], ids=["prompt", "interactive"])
def test_stdin_that_is_not_utf8_is_refused_in_one_sentence(run_dir, words):
    command = [sys.executable, "sample.py", str(run_dir), "--device", "cpu", "--max-new-tokens", "3", *words]
    done = subprocess.run(
        command, input=b"all\xff\nall", capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"}, check=False
    )
    *_, last = done.stderr.decode().strip().splitlines()
    assert last.startswith("error: the text holds the lone surrogate U+DCFF at position 3")
    interactive = words[0] == "--interactive"  # a session goes on
    assert done.returncode == (0 if interactive else 2)
    assert len(done.stdout.decode().rstrip("\n")) == (3 if interactive else 0)


@pytest.mark.parametrize("words", [["--prompt", "-"], ["--interactive"]], ids=str)
def test_closed_stdin_is_refused_in_one_sentence(run_dir, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert status_of(str(run_dir), *words) == 2
    assert capsys.readouterr().err.startswith("error: standard input is closed")


def test_json_escapes_characters_that_the_output_cannot_encode(run_dir, tmp_path, capsys, monkeypatch):
    prompts, output = tmp_path / "p.JSONL", tmp_path / "o.jsonl"
    prompts.write_text('{"prompt": "all", "id": "\\ud800é"}\n', encoding="utf-8")
    words = [str(run_dir), "--prompt-file", str(prompts), "--max-new-tokens", "3"]
    assert status_of(*words, "--output", str(output)) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["id"] == "\ud800é"
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    assert status_of(*words, "--jsonl") == 0
    assert json.loads(stdout.buffer.getvalue())["id"] == "\ud800é"


# The effect of options.


def run_of(run_dir, capsys, *words: str) -> dict:
    assert status_of(str(run_dir), "--jsonl", "--prompt", "all ", "--max-new-tokens", "12", *words) == 0
    return json.loads(capsys.readouterr().out.splitlines()[0])


def test_every_sampling_flag_reaches_the_sampler(run_dir, capsys):
    from gpt.run import load

    tokenizer = load(run_dir, "cpu")[1]
    a = tokenizer.encode("a")[0]
    plain = run_of(run_dir, capsys)
    assert plain["text"] == run_of(run_dir, capsys)["text"]
    assert run_of(run_dir, capsys, "--logit-bias", "a=100")["text"] == "a" * 12
    assert run_of(run_dir, capsys, "--logit-bias", f"{a}=100", "--logit-bias", "b=200")["text"] == "b" * 12
    forced = run_of(run_dir, capsys, "--logit-bias", "a=100", "--stop", "x", "--stop", "aaa")
    assert (forced["text"], forced["finish_reason"], forced["tokens"]) == ("", "stop", [a] * 3)
    ended = run_of(run_dir, capsys, "--logit-bias", "a=100", "--stop-tokens", "b", "--stop-tokens", str(a))
    assert (ended["text"], ended["finish_reason"], ended["tokens"]) == ("", "stop", [])
    greedy = run_of(run_dir, capsys, "--temperature", "0")
    for words in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"], ["--temperature", "1e-6"]):
        assert run_of(run_dir, capsys, *words)["text"] == greedy["text"] != plain["text"]
    assert run_of(run_dir, capsys, "--seed", "8")["text"] != plain["text"]
    penalised = run_of(run_dir, capsys, "--temperature", "0", "--repetition-penalty", "1000")
    assert penalised["text"] != greedy["text"]
    assert run_of(run_dir, capsys, "--batch-invariant")["tokens"] == plain["tokens"]


def test_a_draft_and_lookup_keep_the_greedy_text_and_are_reported(run_dir, capsys):
    words = [str(run_dir), "--prompt", "all work and", "--temperature", "0", "--max-new-tokens", "15"]
    assert status_of(*words) == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    for extra in (["--draft", str(run_dir.parent / "draft"), "--draft-tokens", "2"], ["--speculate", "ngram"]):
        assert status_of(*words, *extra) == 0
        output = capsys.readouterr()
        assert output.out == plain.out
        assert re.fullmatch(r"\d+ of \d+ proposed tokens accepted \(\d+%\)\n", output.err) or "ngram" in extra


def test_a_draft_with_another_tokenizer_is_refused(run_dir, capsys):
    assert status_of(str(run_dir), "--draft", str(run_dir.parent / "byte")) == 2
    assert re.search(r"^error: the draft .*byte has another tokenizer than .*run", capsys.readouterr().err)


def test_int8_reports_its_loss_and_the_text_it_was_measured_on(run_dir, capsys):
    """On the validation text, or on the model's own text if the cache is gone."""
    words = [str(run_dir), "--prompt", "all", "--max-new-tokens", "3", "--quantize", "int8", "--dtype", "float32"]
    number = r"int8 weights: [+-]0\.\d{4} nats per token, on \d+ tokens of "
    assert status_of(*words) == 0
    assert re.fullmatch(number + "the run's validation text\n", capsys.readouterr().err)
    (run_dir.parent / "cache").rename(run_dir.parent / "away")
    try:
        assert status_of(*words) == 0
        assert re.fullmatch(number + "text that the model generated\n", capsys.readouterr().err)
    finally:
        (run_dir.parent / "away").rename(run_dir.parent / "cache")


# Interruption, pipes, sessions.


def command(run_dir, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), str(run_dir), *words]


def test_ctrl_c_keeps_finished_and_partial_samples(run_dir, tmp_path):
    """The status is 4."""
    (tmp_path / "prompts.txt").write_text("all\nwork\n")
    words = ["--prompt-file", str(tmp_path / "prompts.txt"), "--jsonl", "--rolling", "--max-new-tokens", "1000000"]
    # Among many samples some end at once, others never.
    words += ["--num-samples", "8", "--stop", "all", "--temperature", "1"]
    process = subprocess.Popen(command(run_dir, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (4, "interrupted\n")
    records = [json.loads(line) for line in [first, *rest.splitlines()]]
    assert records[0]["finish_reason"] == "stop"
    assert len(records) == 16
    assert "interrupted" in {r["finish_reason"] for r in records}
    assert all(len(r["tokens"]) > 0 for r in records)


def test_a_closed_pipe_is_not_an_error(run_dir):
    words = command(run_dir, "--rolling", "--max-new-tokens", "1000000")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


class Terminal:
    """A command in its own terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's children are born deaf to Ctrl-C
            os.execv(words[0], words)
        self.shown = ""

    def until(self, pattern: str) -> str:
        """Read the terminal up to a pattern."""
        while not (found := re.search(pattern, self.shown)):
            assert select.select([self.end], [], [], 60)[0], self.shown
            self.shown += os.read(self.end, 1000).decode("utf-8", "replace")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_session_at_the_terminal(run_dir):
    """Two answers, a refused prompt, an answer stopped by Ctrl-C, Ctrl-C at the prompt, and Ctrl-D."""
    terminal = Terminal(*command(run_dir, "--interactive", "--rolling", "--max-new-tokens", "1000000", "--stop", "d"))
    terminal.until("an empty line or Ctrl-D ends.*> ".replace(".*", r"[\s\S]*"))
    terminal.type("all work\n")
    terminal.until("all work\r\n[\\s\\S]*?\r\n> ")
    terminal.type("Ünicode\n")
    terminal.until("error: the tokenizer lacks the character 'Ü'[\\s\\S]*?> ")
    terminal.type("\x03")
    terminal.until("> ")
    terminal.type("no play\n")
    terminal.until("no play\r\n[\\s\\S]*?\r\n> ")
    terminal.type("\x04")
    assert terminal.status() == 0


def test_ctrl_c_stops_an_answer_and_not_the_session(run_dir):
    terminal = Terminal(*command(run_dir, "--interactive", "--rolling", "--max-new-tokens", "1000000"))
    terminal.until("> ")
    terminal.type("all work\n")
    terminal.until("all work\r\n[\\s\\S]{50}")  # the answer is on its way, and has no end of its own
    terminal.type("\x03")
    terminal.until("\r\n> ")
    terminal.type("\n")
    assert terminal.status() == 0

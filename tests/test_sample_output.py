"""sample.py --output: samples are not lost, and a command resumes after a kill."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.command_line import parse_flags
from gpt.errors import UserError, run_command
from gpt.inference.sample_output import Records, SampleFile
from gpt.inference.sampling import SamplingConfig
from sample import Arguments, main

ROOT = Path(__file__).parents[1]
WORDS = ["--num-samples", "3", "--max-new-tokens", "6", "--device", "cpu", "--batch-size", "2"]


@pytest.fixture
def place(tiny_run, tmp_path, monkeypatch) -> Path:
    """A working directory with `run`, a file of two prompts, and `whole.jsonl` of an uninterrupted command."""
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(tiny_run)
    Path("prompts.jsonl").write_text('{"prompt": "all ", "id": 1.5, "note": ["\\ud800", null]}\n{"prompt": "no"}\n')
    assert status_of("--output", "whole.jsonl") == 0
    return tmp_path


def status_of(*words: str, run: str = "run", prompts: str = "prompts.jsonl") -> int:
    words = [run, "--prompt-file", prompts, *WORDS, *words]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(parse_flags(Arguments, words, prog="sample.py")))
    return stop.value.code


def refused(capsys, *words: str, **options) -> str:
    """Run a command that must fail without changing a file; returns its message."""
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert status_of(*words, **options) == 2
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def samples(path: str) -> dict[tuple[int, int], dict]:
    """Read a file's samples by key, each once, with log-probabilities rounded, since batches differ."""
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    found = {(r["prompt_index"], r["sample_index"]): r for r in records}
    assert len(found) == len(records)
    return {key: r | {"logprobs": [round(x, 3) for x in r["logprobs"]]} for key, r in found.items()}


# Refusals.


def test_an_existing_file_is_refused_unless_overwrite_is_given(place, capsys):
    whole = samples("whole.jsonl")
    assert "whole.jsonl exists: add --resume" in refused(capsys, "--output", "whole.jsonl")
    shutil.copy("whole.jsonl", "other.jsonl")
    with open("other.jsonl", "a") as file:
        file.write("mine\n" * 1000)
    assert status_of("--output", "other.jsonl", "--overwrite") == 0
    assert samples("other.jsonl") == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x", "--resume", "--overwrite"], "--resume and --overwrite contradict each other"),
        (["--resume"], "--resume goes with --output"),
        (["--overwrite"], "--overwrite goes with --output"),
        (["--output", "prompts.jsonl", "--overwrite"], "prompts.jsonl is an input of this command"),
        (["--output", "prompts.jsonl", "--resume"], "prompts.jsonl is an input of this command"),
        (["--output", "run/config.toml", "--overwrite"], "run/config.toml is an input of this command"),
        (["--output", "run/run.json", "--overwrite"], "run/run.json is an input of this command"),
        (["--output", ".", "--overwrite"], "cannot write .: Is a directory"),
        (["--output", "", "--overwrite"], "--output is empty"),
        (["--output", " "], "--output is empty"),
        (["--output=", "--overwrite"], "--output is empty"),
        (["--output", "no/where"], "cannot write no/where: No such file"),
        (["--output", "/dev/null", "--resume"], "/dev/null is not a regular file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_outputs_that_must_not_be_written_are_refused(place, capsys, words, message):
    assert message in refused(capsys, *words)


@pytest.mark.parametrize(("run", "words"), [("copy", []), ("run", ["--draft", "copy"])], ids=["run", "draft"])
def test_files_of_a_run_that_the_command_loads_are_not_overwritten(place, tiny_run, capsys, run, words):
    shutil.copytree(tiny_run, "copy")
    for path in [Path("copy/tokenizer.json"), *Path("copy/checkpoints").glob("*/model.safetensors")]:
        before = path.read_bytes()
        message = refused(capsys, "--output", str(path), "--overwrite", *words, run=run)
        assert message == f"error: {path} is an input of this command: give another --output"
        assert path.read_bytes() == before


def test_a_file_that_another_command_creates_meanwhile_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    file = SampleFile(path, [{"prompt": "a"}], SamplingConfig())
    path.write_text("theirs\n")
    with pytest.raises(UserError, match=r"cannot write .*out\.jsonl: File exists"), file.open():
        pytest.fail("opened")
    assert path.read_text() == "theirs\n"


def test_a_link_to_the_prompts_is_refused(place, capsys):
    Path("link").symlink_to("prompts.jsonl")
    assert "link is an input of this command" in refused(capsys, "--output", "link", "--overwrite")
    Path("link").unlink()
    Path("link").symlink_to("made")
    assert status_of("--output", "link") == 0
    assert Path("link").is_symlink() and samples("made") == samples("whole.jsonl")


def test_a_device_is_written_to(place):
    assert status_of("--output", "/dev/null") == 0


# Resuming.


@pytest.mark.parametrize("cut", [0, 1, 3, 6], ids="after {}".format)
@pytest.mark.parametrize("torn", [b"", b'{"prompt": "all', b"\0" * 30], ids=["", "torn", "zeros"])
def test_resume_continues_after_the_last_complete_line(place, capsys, cut, torn):
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    Path("cut.jsonl").write_bytes(b"".join(lines[:cut]) + torn)
    assert status_of("--output", "cut.jsonl", "--resume") == 0
    assert Path("cut.jsonl").read_bytes().startswith(b"".join(lines[:cut]))
    assert samples("cut.jsonl") == samples("whole.jsonl")
    assert status_of("--output", "cut.jsonl", "--resume") == 0  # with nothing left to do
    assert samples("cut.jsonl") == samples("whole.jsonl")


def test_batch_invariant_samples_have_the_same_bits_after_a_resume(place):
    assert status_of("--output", "whole", "--batch-invariant") == 0
    lines = Path("whole").read_text().splitlines(keepends=True)
    Path("cut").write_text("".join(lines[:2]))
    assert status_of("--output", "cut", "--batch-invariant", "--resume") == 0
    assert sorted(Path("cut").read_text().splitlines(keepends=True)) == sorted(lines)


def test_finished_samples_are_not_generated_again(place, monkeypatch):
    made = []
    take = Records.take
    monkeypatch.setattr(
        Records, "take", lambda self, piece: (made.append((piece.prompt, piece.sample)), take(self, piece))
    )
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    Path("cut.jsonl").write_bytes(b"".join(lines[:4]))
    assert status_of("--output", "cut.jsonl", "--resume") == 0
    assert set(made) == samples("whole.jsonl").keys() - {
        (r["prompt_index"], r["sample_index"]) for r in map(json.loads, lines[:4])
    }


def test_resume_without_a_file_starts_one(place):
    assert status_of("--output", "new.jsonl", "--resume") == 0
    assert samples("new.jsonl") == samples("whole.jsonl")


def test_interrupted_samples_are_generated_again(place):
    """After Ctrl-C they are at the end of the file; in concatenated files they may be anywhere."""
    records = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    for i in (1, 4, 5):
        records[i] |= {"finish_reason": "interrupted", "text": "a"}
    Path("cut.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, records[5]]) + "{")
    Path("link").symlink_to("cut.jsonl")
    assert status_of("--output", "link", "--resume") == 0
    assert samples("cut.jsonl") == samples("whole.jsonl") and Path("link").is_symlink()
    assert not list(Path().glob(".*.tmp"))


def test_prompts_may_be_added_at_the_end(place):
    text = Path("prompts.jsonl").read_text()
    Path("more.jsonl").write_text(text + '{"prompt": "x"}\n')
    shutil.copy("whole.jsonl", "out.jsonl")
    assert status_of("--output", "out.jsonl", "--resume", prompts="more.jsonl") == 0
    assert samples("out.jsonl").keys() == {(i, j) for i in range(3) for j in range(3)}


@pytest.mark.parametrize(
    ("old", "new", "words", "message"),
    [
        ('"all "', '"All "', [], "line 1 is from other prompts or options: its 'prompt' differs"),
        ("1.5", "1.25", [], "its 'id' differs"),
        (', "id": 1.5', "", [], "its 'id' differs"),
        ('"prompt": "no"', '"prompt": "no", "more": 1', [], "its 'more' differs"),
        ('{"prompt": "no"}\n', "", [], "this command has no prompt 1"),
        ("x", "x", ["--seed", "8"], "its 'seed' differs"),
        ("x", "x", ["--num-samples", "2"], "this command has no sample 2 of a prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_resume_refuses_other_prompts_and_seeds(place, capsys, old, new, words, message):
    Path("prompts.jsonl").write_text(Path("prompts.jsonl").read_text().replace(old, new))
    line = refused(capsys, "--output", "whole.jsonl", "--resume", *words)
    assert message in line and "give another --output, or --overwrite" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [b"mine\n", *lines], "line 1 is not a sample"),
        (lambda lines: [*lines, b"[1]\n"], "line 7 is not a sample"),
        (lambda lines: [*lines, b"\xff\n"], "line 7 is not a sample"),
        (lambda lines: [*lines, b"\n"], "line 7 is not a sample"),
        (lambda lines: [lines[0].replace(b'"seed"', b'"sed"')], "line 1 is not a sample"),
        (lambda lines: [lines[0].replace(b'"prompt_index": 0', b'"prompt_index": -1')], "line 1 is not a sample"),
        (lambda lines: [lines[0].replace(b'"sample_index": 0', b'"sample_index": "0"')], "line 1 is not a sample"),
        (lambda lines: [*lines, lines[2]], "appears twice"),
    ],
)
def test_resume_refuses_a_file_that_is_not_samples(place, capsys, change, message):
    lines = Path("whole.jsonl").read_bytes().splitlines(keepends=True)
    Path("mine").write_bytes(b"".join(change(lines)))
    assert message in refused(capsys, "--output", "mine", "--resume")


# Kills and full disks.


def test_finished_samples_survive_a_kill(place):
    """Each is in the file as soon as it ends; a resumed command generates the others."""
    words = ["--output", "out.jsonl", "--num-samples", "40", "--batch-size", "1", "--batch-invariant"]
    command = [sys.executable, str(ROOT / "sample.py"), "run", "--prompt-file", "prompts.jsonl", *WORDS, *words]
    assert status_of(*words[2:], "--output", "undisturbed") == 0
    os.mkfifo("pipe")
    with subprocess.Popen([*command[:-5], *words[2:], "--output", "pipe"], cwd=place) as process:
        with open("pipe", "rb") as pipe:
            seen = pipe.readline()
            process.send_signal(signal.SIGKILL)
        assert json.loads(seen)["finish_reason"] == "length"
    Path("out.jsonl").write_bytes(seen)
    assert status_of(*words, "--resume") == 0
    assert samples("out.jsonl") == samples("undisturbed")


@contextlib.contextmanager
def largest_file(size: int):
    """Limit files to size bytes, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_finished_samples(place, capsys):
    with largest_file(900):
        assert status_of("--output", "out.jsonl") == 2
    assert capsys.readouterr().err == "error: cannot write out.jsonl: File too large\n"
    kept = Path("out.jsonl").read_bytes().split(b"\n")
    assert len(kept) > 2 and all(map(json.loads, kept[:-1]))
    assert status_of("--output", "out.jsonl", "--resume") == 0
    assert samples("out.jsonl") == samples("whole.jsonl")


def test_samples_are_synced_when_the_command_ends(place, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    assert status_of("--output", "out.jsonl") == 0
    assert synced == [str(place / "out.jsonl"), str(place)]


# Line ends and byte order marks.


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=["none", "LF", "CRLF"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
def test_line_ends_and_byte_order_marks_are_not_part_of_a_prompt(place, capsys, monkeypatch, end, mark):
    import io

    def shown(text: str, *words: str) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="\n"))
        command = ["run", *words, "--max-new-tokens", "3", "--device", "cpu", "--temperature", "0"]
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: main(parse_flags(Arguments, command, prog="sample.py")))
        assert stop.value.code == 0
        return capsys.readouterr().out

    assert shown(f"{mark}a\r\nb{end}", "--prompt", "-") == shown("", "--prompt", "a\r\nb")
    answer = shown("", "--prompt", "ab")[2:]
    assert shown(f"{mark}ab{end or chr(10)}ab{end}", "--interactive") == answer * 2
    for name, text in (("p.txt", f"{mark}ab{end or chr(10)}b{end}"), ("p.jsonl", f'{mark}{{"prompt": "ab"}}{end}')):
        Path(name).write_text(text, newline="")
        assert shown("", "--prompt-file", name).startswith(
            "ab" if name == "p.jsonl" else "--- prompt 0, sample 0 ---\nab"
        )
        assert "\r" not in shown("", "--prompt-file", name, "--jsonl").replace("\\r", "\r") or "\r" in answer

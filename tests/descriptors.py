"""Run every command with closed, full and broken descriptors: python -m tests.descriptors RUN CORPUS FOLDER

One process imports everything and forks a child for each case. Prints each outcome as a JSON line.
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forking is safe only before torch starts threads

import matplotlib.figure  # noqa: F401 - a training imports it late; import it before forking
import rich.progress  # noqa: F401
import safetensors.torch  # noqa: F401

from gpt.errors import run_command
from tests.commands import MAINS

# stdin, stdout and stderr of each case: a path, None (closed), or a pipe without a reader.
BROKEN = "a pipe"
CASES = {
    "all open": ("/dev/null", "out", "err"),
    "stdin closed": (None, "out", "err"),
    "stdout closed": ("/dev/null", None, "err"),
    "stderr closed": ("/dev/null", "out", None),
    "both closed": ("/dev/null", None, None),
    "all closed": (None, None, None),
    "stdout full": ("/dev/null", "/dev/full", "err"),
    "stderr full": ("/dev/null", "out", "/dev/full"),
    "both full": ("/dev/null", "/dev/full", "/dev/full"),
    "stdout broken": ("/dev/null", BROKEN, "err"),
    "both broken": ("/dev/null", BROKEN, BROKEN),
    "stdout full, stderr closed": ("/dev/null", "/dev/full", None),
    "stdout closed, stderr full": ("/dev/null", None, "/dev/full"),
}
FLAGS = "--n-layer 1 --n-head 2 --n-embd 16 --seq-len 16 --batch-size 4 --device cpu --dtype float32"
# Commands that differ from another command in few cases only, and those cases.
FEW = ("train --dry-run", "train --help", "sample --jsonl", "sample --prompt -", "sample, refused")
FEW += ("evaluate", "export", "inspect")
FEW_CASES = ("all open", "stdin closed", "stdout closed", "all closed", "both full", "stdout broken")


def commands(run: str, corpus: str, folder: Path) -> dict[str, tuple[str, list[str]]]:
    """List every command by name: its main and its arguments. Each writes to its own folder."""
    train_words = ["--corpus", corpus, "--cache-dir", str(folder / "cache"), *FLAGS.split()]
    train_words += ["--max-steps", "1", "--run-dir", str(folder / "run"), "--sample-tokens", "3"]
    short = ["--max-new-tokens", "3", "--device", "cpu"]
    return {
        "train": ("train", [*train_words, "--tokenizer", "byte"]),
        "train --dry-run": ("train", [*train_words, "--dry-run"]),
        "train --help": ("train", ["--help"]),
        "sample": ("sample", [run, "--prompt", "all", *short]),
        "sample --jsonl": ("sample", [run, "--jsonl", *short]),
        "sample --output": ("sample", [run, "--output", str(folder / "out.jsonl"), "--speculate", "ngram", *short]),
        "sample --prompt -": ("sample", [run, "--prompt", "-", *short]),
        "sample, refused": ("sample", [run, "--temperature", "-1"]),
        "evaluate": ("evaluate", [run, "--corpus", corpus, "--device", "cpu"]),
        "export": ("export", [run, str(folder / "exported")]),
        "inspect": ("inspect", ["inspect", run]),
    }


def pairs() -> list[tuple[str, str]]:
    """List every command with each of its cases."""
    names = commands("", "", Path())
    return [(name, case) for name in names for case in CASES if name not in FEW or case in FEW_CASES]


def set_up(descriptors: tuple[str | None, ...], folder: Path) -> None:
    """Install the descriptors, and set Python's streams as in a process that starts with them."""
    for fd, target in enumerate(descriptors):
        if target == BROKEN:
            reader, writer = os.pipe()
            os.close(reader)
        elif target is not None:
            writer = os.open(folder / target, os.O_RDWR | os.O_CREAT, 0o644)
        if target is not None:
            os.dup2(writer, fd)
            os.close(writer)
    for fd, target in enumerate(descriptors):
        if target is None:
            os.close(fd)
    opened = [None if target is None else fd for fd, target in enumerate(descriptors)]
    sys.stdin, sys.stdout, sys.stderr = (
        None if fd is None else open(fd, "rww"[fd], 1 if fd == 2 else -1, "utf-8", closefd=False)  # noqa: SIM115
        for fd in opened
    )


def child(main: str, words: list[str], descriptors: tuple[str | None, ...], folder: Path) -> int:
    """Fork a command; return its exit status, 120 like Python's if the rest of stdout cannot be written."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        set_up(descriptors, folder)
        try:
            run_command(lambda: MAINS[main](words))
        except SystemExit as stop:
            status = stop.code
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except BaseException:
        status = 120
        (folder / "traceback").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def main() -> None:
    run, corpus, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for number, (name, case) in enumerate(pairs()):
        place = folder / str(number)
        place.mkdir()
        status = child(*commands(run, corpus, place)[name], CASES[case], place)
        shown = dict.fromkeys(("out", "err", "traceback"), "")
        for kind in shown:
            with contextlib.suppress(FileNotFoundError):
                shown[kind] = (place / kind).read_text()
        written = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
        print(json.dumps({"case": case, "command": name, "status": status, **shown, "written": written}))


if __name__ == "__main__":
    main()

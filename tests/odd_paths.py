"""Run every command with an odd path in every option that takes a path: python -m tests.odd_paths FOLDER

Prints one JSON object per line: the command, its status and its stderr. If FOLDER exists, the commands read the files
of an earlier call. Runs in its own process, because the locale decides how paths are decoded.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

from gpt.errors import run_command
from tests.commands import MAINS

TEXT = "all work and no play makes jack a dull boy\n" * 20
FLAGS = "--n-layer 1 --n-head 2 --n-embd 16 --seq-len 32 --max-steps 1 --device cpu --dtype float32 --tokenizer byte"
MODEL = [*FLAGS.split(), "--sample-tokens", "2"]


def make(folder: Path) -> None:
    """Write the files that the commands read."""
    (folder / "docs").mkdir(parents=True)
    for i in range(3):
        (folder / "docs" / f"{i}.txt").write_text(TEXT * (i + 1))
    (folder / "recipe.toml").write_text("[optim]\nwarmup_steps = 0\n")
    (folder / "prompts.txt").write_text("all\n")
    rows = [{"ctx": "a", "endings": ["b", "c"], "label": 0}, {"ctx": "d", "endings": ["e", "f"], "label": 1}]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ids.bin").write_bytes(b"".join(bytes([letter, 0]) for letter in TEXT.encode()))
    (folder / "text.txt").symlink_to("docs/0.txt")
    (folder / "link").symlink_to("elsewhere")
    (folder / "elsewhere").mkdir()
    (folder / "dangling").symlink_to("nowhere/at/all")
    (folder / "file").write_text("in the way")


def commands(at: str) -> list[tuple[int, list[str]]]:
    """List each command with its expected status; later commands use the files of earlier ones."""
    corpus, cache = ["--corpus", f"{at}/text.txt"], ["--cache-dir", f"{at}/cache"]
    begins, once = [*corpus, *cache, *MODEL], ["--max-steps", "1", "--sample-tokens", "0", "--device", "cpu"]
    asked = ["--multiple-choice", f"{at}/asked.jsonl", "--shots", f"{at}/asked.jsonl"]
    done = [
        ["train", f"{at}/recipe.toml", *begins, "--run-dir", f"{at}/run"],
        ["train", "--resume", "--run-dir", f"{at}/run", "--max-steps", "2"],
        ["train", "--resume", "--run-dir", f"{at}/run/", "--max-steps", "3"],
        ["train", "--eval-only", "--run-dir", f"{at}/./run"],
        ["train", "--dry-run", *begins],
        ["train", *begins, "--corpus", f"{at}/docs", "--run-dir", f"{at}/link"],
        ["train", *begins, "--corpus", f"{at}/docs/", "--run-dir", f"{at}/link", "--overwrite", "--profile-steps", "1"],
        ["train", *corpus, *cache, "--run-dir", f"{at}/tuned", "--init-from", f"{at}/run", *once],
        ["train", "--resume", "--run-dir", f"{at}/tuned", "--max-steps", "2"],
        ["train", *begins, "--run-dir", f"{at}/new", "--resume-from", f"{at}/run/checkpoints/step_00000002"],
        ["train", *begins, "--corpus", f"{at}/ids.bin", "--run-dir", f"{at}/ids"],
        [
            "sample",
            f"{at}/run",
            "--prompt-file",
            f"{at}/prompts.txt",
            "--output",
            f"{at}/out",
            "--draft",
            f"{at}/tuned",
        ],
        ["sample", f"{at}/run/", "--prompt-file", f"{at}/prompts.txt", "--output", f"{at}/out", "--resume"],
        ["sample", f"{at}/run", "--quantize", "int8", "--max-new-tokens", "2"],
        ["evaluate", f"{at}/run", *corpus, *cache, "--device", "cpu"],
        ["evaluate", f"{at}/run", "--device", "cpu", "--few-shot", "1", *asked],
        ["export", f"{at}/run", f"{at}/hf/export"],
        ["export", f"{at}/run", f"{at}/hf/export/", "--overwrite"],
        ["evaluate", f"{at}/hf/export", *corpus, "--device", "cpu"],
        ["train", *corpus, *cache, "--run-dir", f"{at}/theirs", "--init-from", f"{at}/hf/export", *once],
        ["inspect", "inspect", f"{at}/run"],
        ["inspect", "inspect", f"{at}/ids.bin", "--tokenizer", "byte"],
    ]
    refused = [
        ["train", f"{at}/none.toml"],
        ["train", f"{at}/text.txt"],
        ["train", *begins, "--run-dir", f"{at}/run"],
        ["train", *begins, "--run-dir", f"{at}/x", "--corpus", f"{at}/none"],
        ["train", *begins, "--run-dir", f"{at}/x", "--corpus", f"{at}/dangling"],
        ["train", *begins, "--run-dir", f"{at}/x", "--cache-dir", f"{at}/file"],
        ["train", *begins, "--run-dir", f"{at}/x", "--cache-dir", f"{at}/dangling"],
        ["train", *begins, "--run-dir", f"{at}/x", "--init-from", f"{at}/none"],
        ["train", *begins, "--run-dir", f"{at}/x", "--resume-from", f"{at}/none"],
        ["train", *begins, "--run-dir", f"{at}/file"],
        ["train", *begins, "--run-dir", f"{at}/file/below"],
        ["train", *begins, "--run-dir", f"{at}/dangling"],
        ["train", "--eval-only", "--run-dir", f"{at}/none"],
        ["sample", f"{at}/none"],
        ["sample", f"{at}/run", "--draft", f"{at}/none"],
        ["sample", f"{at}/run", "--prompt-file", f"{at}/none"],
        ["sample", f"{at}/run", "--prompt-file", f"{at}/docs"],
        ["sample", f"{at}/run", "--output", f"{at}/docs"],
        ["sample", f"{at}/run", "--output", f"{at}/out"],
        ["sample", f"{at}/run", "--output", f"{at}/dangling"],
        ["sample", f"{at}/run", "--output", f"{at}/file/below"],
        ["evaluate", f"{at}/none", *corpus],
        ["evaluate", f"{at}/run", "--corpus", f"{at}/none"],
        ["evaluate", f"{at}/run", "--multiple-choice", f"{at}/none"],
        ["evaluate", f"{at}/run", "--multiple-choice", f"{at}/docs"],
        ["export", f"{at}/none", f"{at}/y"],
        ["export", f"{at}/run", f"{at}/file"],
        ["export", f"{at}/run", f"{at}/file/below"],
        ["export", f"{at}/run", f"{at}/dangling"],
        ["export", f"{at}/run", f"{at}/docs", "--overwrite"],
        ["inspect", "inspect", f"{at}/none"],
        ["inspect", "inspect", f"{at}/docs"],
    ]
    return [(0, words) for words in done] + [(2, words) for words in refused]


def again(at: str) -> list[tuple[int, list[str]]]:
    """List commands that read the files of `commands`, perhaps in another locale."""
    ids = [*MODEL, "--corpus", f"{at}/ids.bin", "--cache-dir", f"{at}/cache"]
    done = [
        ["train", "--resume", "--run-dir", f"{at}/run", "--max-steps", "4"],
        ["train", "--resume", "--run-dir", f"{at}/tuned", "--max-steps", "3"],
        ["train", *ids, "--run-dir", f"{at}/ids", "--overwrite"],
        ["sample", f"{at}/run", "--prompt-file", f"{at}/prompts.txt", "--output", f"{at}/out", "--resume"],
        ["sample", f"{at}/run", "--quantize", "int8", "--max-new-tokens", "2"],
        ["export", f"{at}/run", f"{at}/hf/export", "--overwrite"],
        ["inspect", "inspect", f"{at}/run"],
        ["inspect", "inspect", f"{at}/ids"],
    ]
    return [(0, words) for words in done]


def main(folder: Path) -> None:
    os.fsync = lambda fd: None  # fsync is slow on a shared disk
    standard, exists = sys.stdout, folder.exists()
    if not exists:
        make(folder)
    for expected, (name, *words) in (again if exists else commands)(str(folder)):
        # The streams' own encodings, so that characters they lack show up.
        out, err = (io.TextIOWrapper(io.BytesIO(), s.encoding, s.errors) for s in (sys.__stdout__, sys.__stderr__))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_command(lambda name=name, words=words: MAINS[name](words))
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
                status = 1
        err.flush()
        said = err.buffer.getvalue().decode("utf-8", "replace")
        record = {"words": ascii([name, *words]), "expected": expected, "status": status, "said": said}
        print(json.dumps(record), file=standard, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

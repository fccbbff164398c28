"""A tiny run for tests of faults, trained once and copied for each test."""

import json
from pathlib import Path

import pytest

from gpt.errors import run_command
from gpt.run.checkpoint import _sha256
from gpt.run.layout import MANIFEST
from gpt.training.command import load_config
from tests.train_checks import TEXT
from train import main

WORDS = (
    "--corpus text.txt --run-dir run --cache-dir cache --device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 "
    "--seq-len 16 --batch-size 4 --checkpoint-interval 2 --eval-interval 100 --sample-tokens 0"
)
FLAGS = WORDS.split()
NEWEST, OLDER = "step_00000004", "step_00000002"


def make_run(folder: Path) -> None:
    """text.txt, and run with checkpoints at the steps 2 and 4, in a folder that is the working directory.

    There is no best checkpoint, as if the run had not been evaluated.
    """
    (folder / "text.txt").write_text(TEXT)
    assert main(load_config([*FLAGS, "--max-steps", "2"])) == 0
    assert main(load_config([*FLAGS, "--max-steps", "4", "--resume"])) == 0
    for best in Path("run/checkpoints").glob("best_*"):
        for file in best.iterdir():
            file.unlink()
        best.rmdir()
    for step in Path("run/checkpoints").iterdir():
        state = json.loads((step / "state.json").read_text())
        (step / "state.json").write_text(json.dumps(state | {"best": None, "evaluation_due": False}))
        reseal(step)


def status_of(*words: str) -> int:
    """Run train.py with the flags and these words; return the exit status."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(load_config([*FLAGS, *words])))
    return stop.value.code


def reseal(checkpoint: Path) -> None:
    """Update the manifest to the files, as the author of a malicious checkpoint would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest:
        data = (checkpoint / name).stat().st_size
        manifest[name] = {"bytes": data, "sha256": _sha256(checkpoint / name)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))

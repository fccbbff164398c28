"""The names of all files in a run directory, and how to recognise a run's file.

Beside the files of TABLE a run directory holds CHECKPOINTS with a folder for each checkpoint, LOCK (gpt.run.lock), and
wandb's own folder `wandb`, which always stays: it may hold data that is not uploaded yet.
"""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpt.config_file import read_toml
from gpt.data.tokenizers import load_tokenizer

CONFIG, TOKENIZER, CORPUS, RECORD = "config.toml", "tokenizer.json", "corpus.json", "run.json"
METRICS, LOSS_PLOT, TRACE, PROFILE = "metrics.jsonl", "loss.png", "trace.json.gz", "profile.txt"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"

# A checkpoint's files (gpt.run.checkpoint). AVERAGE exists only if the run keeps a moving average of the weights.
WEIGHTS, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
REQUIRED = (WEIGHTS, OPTIMIZER, STATE)
CHECKPOINT_FILES = {*REQUIRED, AVERAGE, MANIFEST}


@dataclass(frozen=True)
class RunFile:
    """A file that runs write."""

    name: str
    writer: str
    """the module that writes it"""
    matches: Callable[[Path], bool]
    """whether the file at a path has the form that runs give it"""
    option: str | None = None
    """the option of TrainConfig without which it is not written"""


def _is_config(path: Path) -> bool:
    tables = read_toml(path)
    return {"data", "model", "optim"} <= tables.keys() and "run_dir" in tables["train"]


def _is_metrics(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(12).removeprefix(codecs.BOM_UTF8)
    return b'{"step": '.startswith(start[:9])  # the only line may be truncated


def _has_keys(*keys: str) -> Callable[[Path], bool]:
    return lambda path: set(keys) <= json.loads(path.read_bytes()).keys()


def _begins(start: bytes) -> Callable[[Path], bool]:
    def matches(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(start)) == start

    return matches


TABLE = (
    RunFile(CONFIG, "gpt.training.resume", _is_config),
    RunFile(TOKENIZER, "gpt.training.resume", lambda path: load_tokenizer(path) is not None),
    RunFile(CORPUS, "gpt.training.resume", _has_keys("digest", "sources")),
    RunFile(RECORD, "gpt.run.run_files", _has_keys("files")),
    RunFile(METRICS, "gpt.training.monitor", _is_metrics),
    RunFile(LOSS_PLOT, "gpt.training.monitor", _begins(b"\x89PNG")),
    RunFile(TRACE, "gpt.training.profile", _begins(b"\x1f\x8b"), option="profile_steps"),
    RunFile(PROFILE, "gpt.training.profile", _begins(b""), option="profile_steps"),
)
# The files that RECORD lists: those of every run, and those that only a profiled run writes.
FILES = tuple(row.name for row in TABLE if row.option is None and row.name != RECORD)
TRACES = tuple(row.name for row in TABLE if row.option is not None)


def is_run_file(path: Path) -> bool:
    """Tell whether a file has the form in which runs write the file of this name."""
    try:
        return next(row.matches(path) for row in TABLE if row.name == path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # UserError is a ValueError
        return False


def checkpoints_of(run_dir: Path) -> Path:
    """Return the folder in which a run keeps its checkpoints."""
    return run_dir / CHECKPOINTS


def checkpoint_name(kind: str, step: int) -> str:
    """Return the name of a checkpoint's folder. kind: "step", or "best" for the lowest validation loss."""
    return f"{kind}_{step:08d}"

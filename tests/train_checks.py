"""Run the training command in tests, and read its results. The fixture `folder` is its working directory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt.errors import run_command
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from train import main

TEXT = "".join(f"{a} and {b} went up the hill, said {c}.\n" for a in "JKLM" for b in "abcdef" for c in "xyz")
# Six steps with three evaluations, two saves and averaged weights.
SHORT = {"max_steps": 6, "n_layer": 1, "eval_interval": 2, "checkpoint_interval": 3, "ema_decay": 0.5}


def flags(**changes) -> list[str]:
    options = {
        "corpus": "text.txt",
        "run_dir": "run",
        "device": "cpu",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "seq_len": 16,
        "batch_size": 8,
        "max_steps": 20,
        "eval_interval": 10,
        "checkpoint_interval": 10,
        "warmup_steps": 2,
        "log_interval": 1,
        "sample_tokens": 0,
        "dtype": "float32",
        **changes,
    }
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return words


def run(*extra: str, **changes) -> int:
    return main(load_config([*extra, *flags(**changes)]))


def refused(capsys, *words: str) -> str:
    """Return the only line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(load_config(list(words))))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def weights_of(run_dir: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / f"checkpoints/step_{step:08d}/model.safetensors")


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def lasting(run_dir: str) -> list[dict]:
    """Read the metrics without values that depend on the clock."""
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]

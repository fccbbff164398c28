"""A run directory: what stands in it, how it is begun, and how a model comes back out of it."""

import shutil
from pathlib import Path

import torch

from gpt.checkpoint import load_weights, newest_checkpoint
from gpt.command_line import config_from_toml
from gpt.config import Config
from gpt.errors import UserError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer, load_tokenizer

CONTENTS = ("config.toml", "tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints", "wandb")


def checkpoints_of(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def claim_run_dir(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the run directory, or refuse. overwrite deletes what a run writes there and nothing else."""
    try:
        present = [run_dir / name for name in CONTENTS if (run_dir / name).exists()]
        if overwrite:
            for path in present:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif present and not resume:
            raise UserError(
                f"{run_dir} already holds a run: add --resume to go on, --overwrite to begin anew, or another --run-dir"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the run directory {run_dir}: {error.strerror}") from error


def pick_device(name: str) -> torch.device:
    """The device that a name asks for; auto takes a GPU where there is one. Raises UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def read_run(run_dir: Path) -> tuple[Config, Tokenizer, Path]:
    """Config, tokenizer and newest sound checkpoint of a run. Raises UserError where one is missing."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run directory: there is no such directory")
    if not (run_dir / "config.toml").exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.toml")
    checkpoint = newest_checkpoint(checkpoints_of(run_dir))
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint yet: train it first, or wait for its first checkpoint")
    return config_from_toml(run_dir / "config.toml"), load_tokenizer(run_dir / "tokenizer.json"), checkpoint


def load(run_dir: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer]:
    """The model (in eval mode, fp32) and tokenizer of a run's newest sound checkpoint.

    Raises UserError where the directory holds no run, no checkpoint, or a damaged one.
    """
    config, tokenizer, checkpoint = read_run(Path(run_dir))
    model = GPT(config.model)
    load_weights(checkpoint, model)
    return model.eval().to(pick_device(device)), tokenizer

"""A run directory: how a run is begun, gone on with, stopped, and how its model comes back."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from gpt.checkpoint import load_weights, newest_checkpoint, verify
from gpt.command_line import config_from_toml
from gpt.config import Config, TrainConfig
from gpt.corpus import Corpus
from gpt.device import pick_device
from gpt.errors import UserError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer, load_tokenizer

CONTENTS = ("config.toml", "tokenizer.json", "corpus.json", "metrics.jsonl", "loss.png", "checkpoints", "wandb")


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def _present(run_dir: Path) -> list[Path]:
    return [run_dir / name for name in CONTENTS if (run_dir / name).exists()]


def earlier_run(config: Config, say: Callable[[str], None] = print) -> tuple[Tokenizer | None, Path | None]:
    """The tokenizer and the checkpoint that this run goes on from.

    A run that begins anew has no checkpoint, and no tokenizer unless init_from brings one.

    Raises UserError where the run directory is taken and neither resume nor overwrite is given, where there is nothing
    to evaluate, where the model asked for is not the run's, or a named checkpoint is damaged.
    """
    from gpt.initial import initial_tokenizer  # it reads runs too

    train = config.train
    if train.resume_from is not None:
        fault = verify(train.resume_from)
        if fault:
            raise UserError(f"cannot resume from {train.resume_from}: {fault}")
        # A checkpoint stands in RUN/checkpoints/step_x.
        source, checkpoint = train.resume_from.resolve().parent.parent, train.resume_from
        if source != train.run_dir.resolve() and _present(train.run_dir) and not train.overwrite:
            raise UserError(f"{train.run_dir} already holds another run: add --overwrite, or give another --run-dir")
    elif train.eval_only or (train.resume and _present(train.run_dir)):
        source = train.run_dir
        checkpoint = read_run(source, say)[2] if train.eval_only else newest_checkpoint(checkpoints_of(source), say)
        if checkpoint is None:
            return initial_tokenizer(config), None
    elif _present(train.run_dir) and not (train.overwrite or train.resume):
        raise UserError(
            f"{train.run_dir} already holds a run: add --resume to go on, --overwrite to begin anew, "
            "or give another --run-dir"
        )
    else:
        return initial_tokenizer(config), None
    saved = asdict(config_from_toml(source / "config.toml").model)
    for key, value in asdict(config.model).items():
        if value != saved[key] and not (key == "vocab_size" and value is None):
            raise UserError(f"{source} was trained with {key} {saved[key]}, not {value}: resume with the same model")
    return load_tokenizer(source / "tokenizer.json"), checkpoint


def claim_run_dir(train: TrainConfig) -> Path:
    """Make the run directory; overwrite first deletes what a run writes there, and nothing else."""
    try:
        if train.overwrite:
            for path in _present(train.run_dir):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        train.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the run directory {train.run_dir}: {error.strerror}") from error
    return train.run_dir


def write_provenance(corpus: Corpus, path: Path) -> None:
    """What the run was trained on: every source with its size and SHA-256, and how it was split."""
    sources = [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in corpus.sources]
    counts = ("digest", "documents", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    path.write_text(json.dumps({key: getattr(corpus, key) for key in counts} | {"sources": sources}, indent=1) + "\n")


def read_run(run_dir: Path, say: Callable[[str], None] = print) -> tuple[Config, Tokenizer, Path]:
    """Config, tokenizer and newest sound checkpoint of a run. Raises UserError where one is missing."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run directory: there is no such directory")
    if not (run_dir / "config.toml").exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.toml")
    checkpoint = newest_checkpoint(checkpoints_of(run_dir), say)
    if checkpoint is None:
        raise UserError(f"{run_dir} has no checkpoint yet: train it first, or wait for its first one")
    return config_from_toml(run_dir / "config.toml"), load_tokenizer(run_dir / "tokenizer.json"), checkpoint


def load(run_dir: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer]:
    """The model (in eval mode, fp32) and tokenizer of a run's newest sound checkpoint: the averaged weights, if kept.

    Raises UserError where the directory holds no run, no checkpoint, or a damaged one.
    """
    config, tokenizer, checkpoint = read_run(Path(run_dir))
    place = pick_device(device)
    model = GPT(config.model)
    load_weights(checkpoint, model, averaged=True)
    return model.eval().to(place), tokenizer


class StopRequest:
    """Notes the first SIGINT or SIGTERM in `signal`, for the loop to end in order; the second ends the process.

    close() gives the signals back to who had them before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""Read a run directory: its config, tokenizer, checkpoints and model."""

import json
from collections.abc import Callable
from pathlib import Path

from gpt.arguments import checked
from gpt.config import Config
from gpt.config_file import config_from_toml
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.device import Device, pick_device
from gpt.errors import UserError
from gpt.files import is_folder
from gpt.folders import adapter, instead
from gpt.model import GPT
from gpt.run.checkpoint import load_weights, newest_checkpoint, verify
from gpt.run.layout import CONFIG, CORPUS, TOKENIZER, checkpoints_of


def read_run(
    run_dir: Path, which: str | Path = "newest", say: Callable[[str], None] = print
) -> tuple[Config, Tokenizer, Path]:
    """Read a run's config and tokenizer, and find a valid checkpoint: "newest", "best", or the one at a path.

    Raises UserError if one of them is missing or damaged.
    """
    if not is_folder(run_dir):
        hint = instead(run_dir) if run_dir.exists() else "it does not exist"
        raise UserError(f"{run_dir} is not a run directory: {hint or 'it is a file'}")
    if not (run_dir / CONFIG).exists():
        hint = adapter(run_dir) if (run_dir / "config.json").exists() else instead(run_dir)
        if not hint and (run_dir / "config.json").exists():
            hint = "it is a Hugging Face checkpoint: train it with --init-from, or load it with gpt.from_hf"
        raise UserError(f"{run_dir} is not a run directory: {hint or 'it has no config.toml'}")
    if which in ("newest", "best"):
        checkpoint = newest_checkpoint(checkpoints_of(run_dir), say, kind="best" if which == "best" else "")
        if checkpoint is None:
            kind = "checkpoint" if which == "newest" else "best checkpoint"
            raise UserError(f"{run_dir} has no {kind} yet: train it first, or wait for its first one")
    else:
        checkpoint = Path(which)
        if fault := verify(checkpoint):
            raise UserError(f"the checkpoint {checkpoint} cannot be used: {fault}")
    return config_from_toml(run_dir / CONFIG), run_tokenizer(run_dir), checkpoint


def run_tokenizer(run_dir: Path) -> Tokenizer:
    """Read a run's tokenizer. Raises UserError if it is damaged, or not the one that the run was trained with."""
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    try:
        trained = json.loads((run_dir / CORPUS).read_bytes()).get("tokenizer")
    except (OSError, ValueError, AttributeError):
        trained = None
    if trained not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{run_dir / TOKENIZER} is not the tokenizer that the run was trained with: restore the original file"
        )
    return tokenizer


@checked
def load(run_dir: str | Path, device: Device = "auto", *, which: str | Path = "newest") -> tuple[GPT, Tokenizer]:
    """Load a run's model (float32, in eval mode, with the averaged weights if the run keeps them) and its tokenizer.

    which: "newest", the newest valid checkpoint; "best", that of the lowest validation loss; or a checkpoint's path.
    Raises UserError if the directory has no run or no valid checkpoint, and if the device cannot be used.
    """
    target = pick_device(device)
    config, tokenizer, checkpoint = read_run(Path(run_dir), which)
    model = GPT(config.model)
    load_weights(checkpoint, model, averaged=True)
    return model.eval().to(target), tokenizer

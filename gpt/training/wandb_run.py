"""Weights & Biases."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt.config import Config
from gpt.errors import UserError
from gpt.files import path_to_text


def title_of(run_dir: Path) -> str:
    """Return the run directory's name as valid UTF-8."""
    return os.fsencode(run_dir.resolve().name).decode("utf-8", "replace")


def start_wandb(config: Config, run_id: str | None) -> Any:
    """Start a wandb run with its files in the run directory, or resume the one with the given id."""
    run_dir, mode = config.train.run_dir, config.log.wandb
    if path_to_text(run_dir) != str(run_dir):
        raise UserError(f"wandb cannot use {run_dir}, which is not UTF-8 here: give another --run-dir, or --wandb off")
    try:
        import wandb

        return wandb.init(
            project=config.log.wandb_project,
            name=title_of(run_dir),
            dir=run_dir,
            mode=mode,
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,  # offline no server can be asked
            config=json.loads(json.dumps(asdict(config), default=str, ensure_ascii=False).encode("utf-8", "replace")),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except ImportError as error:
        raise UserError("wandb is not installed: pip install wandb, or leave --wandb off") from error
    except wandb.Error as error:
        raise UserError(f"wandb {mode} could not start ({error}): try --wandb offline, or off") from error

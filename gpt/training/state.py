"""Collect, restore and check the training state in a checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt.distributed import World, gathered
from gpt.errors import UserError
from gpt.run.checkpoint import TensorFiles, load_weights, read_like, read_tensors
from gpt.run.layout import AVERAGE, OPTIMIZER, STATE, WEIGHTS
from gpt.training.average import Average
from gpt.training.optimizer_state import optimizer_tensors, restore_optimizers


def training_tensors(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Average | None = None,
    world: World | None = None,
) -> TensorFiles:
    """Collect a checkpoint's tensors by file: the live tensors, or gathered ones if sharded; shared weights once.

    All ranks must call it together; ranks other than 0 get no tensors.
    """
    world = world or World(torch.device("cpu"))
    tensors = {
        WEIGHTS: gathered(model.named_parameters(), world),
        OPTIMIZER: gathered(optimizer_tensors(model, optimizers).items(), world),
    }
    if average is not None:
        tensors[AVERAGE] = gathered(average.tensors.items(), world)
    return tensors


def load_training_state(
    checkpoint: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None = None
) -> dict[str, Any]:
    """Restore weights, optimizers and average from a verified checkpoint; return its state.json.

    Without a saved average, the average starts from the weights.
    Raises UserError, naming the file, for another model's checkpoint, even one with valid checksums.
    """
    load_weights(checkpoint, model)
    restore_optimizers(model, optimizers, read_tensors(checkpoint / OPTIMIZER))
    if average is not None:
        path = checkpoint / (AVERAGE if (checkpoint / AVERAGE).exists() else WEIGHTS)
        average.load(read_like(path, average.tensors))
    return read_state(checkpoint)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_data_position(value: Any) -> bool:
    """Tell whether a value may be a loader's state: counts, a packing, and the states of a mixture's loaders."""
    if not isinstance(value, dict):
        return False
    own = {key: part for key, part in value.items() if key not in ("packing", "corpora")}
    corpora = value.get("corpora", [])
    of_one = lambda part: isinstance(part, dict) and "corpora" not in part and _is_data_position(part)
    parts = isinstance(corpora, list) and all(map(of_one, corpora))
    return parts and isinstance(value.get("packing", ""), str) and all(map(_is_count, own.values()))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises UserError, naming file and key, for a value of the wrong kind."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not a training state: it is not JSON") from None
    is_number = lambda value: type(value) in (int, float) and math.isfinite(value)
    checks = {
        "step": _is_count,
        "tokens": _is_count,
        "metrics_bytes": _is_count,
        "loader": _is_data_position,
        "scaler": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
        "evaluations_since_best": _is_count,
        "skipped": _is_count,
        "evaluation_due": lambda value: isinstance(value, bool),
        "guard": lambda value: (
            isinstance(value, dict)
            and _is_count(value.get("in_a_row"))
            and isinstance(value.get("losses"), list)
            and all(map(is_number, value["losses"]))
        ),
        "recipe": lambda value: isinstance(value, dict),
        "best": lambda value: value is None or (isinstance(value, dict) and is_number(value.get("val_loss"))),
        "wandb_id": lambda value: value is None or isinstance(value, str),
    }
    if not isinstance(state, dict) or "step" not in state:
        raise UserError(f'{path} is not a training state: it has no "step"')
    for key in checks.keys() & state.keys():
        if not checks[key](state[key]):
            raise UserError(f'{path} is not a training state: "{key}" is {str(state[key])[:40]!r}')
    return state

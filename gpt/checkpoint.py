"""Checkpoints: one directory each, safetensors and JSON only, complete or not there at all.

    checkpoints/step_00000500/model.safetensors       the weights
                              optimizer.safetensors   every optimizer state tensor, as "<weight's name>.<state's name>"
                              average.safetensors     the weights' moving average, where one is kept
                              state.json              step, data position, float16's loss scale
                              manifest.json           size and SHA-256 of the files above, written last

They hold whole tensors, whatever number of processes wrote them, so that any number can go on from them: under
torchrun all ranks must call save_checkpoint together, and rank 0 writes.

A checkpoint is written beside its place under a temporary name, each file fsynced, then renamed. Nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.distributed import World, gathered, like, local
from gpt.errors import UserError
from gpt.optim import Average

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
AVERAGE = "average.safetensors"  # the one file that a checkpoint may lack


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every state tensor of the optimizers, keyed by the weight's name and the state's."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizers(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put back what optimizer_tensors gave."""
    weights = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, state_key = key.rsplit(".", 1)
        if name not in weights:
            raise UserError(f"the checkpoint's optimizer knows a weight {name!r} that the model lacks")
        p = weights[name]
        # Moments go where the weight is, and are sharded as it is; Adam's step count is on its device.
        owner[p].state[p][state_key] = like(value, p) if value.ndim else value.to(p.device)


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    *,
    keep: int,
    average: Average | None = None,
    world: World | None = None,
) -> Path:
    """Write directory/step_<step>, then delete all but the newest `keep`. state: JSON values, state["step"] among them.

    average: the weights' moving average, if one is kept. Raises UserError, naming the file, where the disk refuses;
    the older checkpoints are then untouched.
    """
    world = world or World(torch.device("cpu"))
    final = directory / f"step_{state['step']:08d}"
    tensors = {
        FILES[0]: gathered(model.named_parameters(), world),  # shared weights once
        FILES[1]: gathered(optimizer_tensors(model, optimizers).items(), world),
    }
    if average is not None:
        tensors[AVERAGE] = gathered(average.tensors.items(), world)
    if world.main:
        _write(final, tensors, state)
        for old in list_checkpoints(directory)[keep:]:
            shutil.rmtree(old)
    return final


def _write(final: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    directory = final.parent
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".step_*.tmp"):
            shutil.rmtree(stale)
        temporary.mkdir()
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, temporary / name)
        (temporary / FILES[2]).write_text(json.dumps(state, indent=1))
        names = (*tensors, FILES[2])
        manifest = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in names
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*names, MANIFEST):
            _fsync(temporary / name)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {final}: {error}; the earlier ones are untouched") from error


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under a directory, newest first, verified or not."""
    return sorted(directory.glob("step_*"), reverse=True)


def verify(checkpoint: Path) -> str | None:
    """None where every file stands as the manifest says; else one clause that names the file and its fault."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name in (*FILES, *([AVERAGE] if AVERAGE in manifest else [])):
            path, entry = checkpoint / name, manifest[name]
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{path} does not have the checksum its manifest states"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{checkpoint / MANIFEST} is not a manifest"
    return None


def newest_checkpoint(directory: Path, say=print) -> Path | None:
    """The newest checkpoint that verifies, or None where there is none at all.

    Says which newer ones it passes over and why. Raises UserError where there are some but none verifies.
    """
    found = list_checkpoints(directory)
    for checkpoint in found:
        fault = verify(checkpoint)
        if fault is None:
            return checkpoint
        say(f"passing over {checkpoint.name}: {fault}")
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {directory} verifies; the newest: {verify(found[0])}")
    return None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def load_weights(checkpoint: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Copy a verified checkpoint's weights into the model; averaged: their moving average, if it holds one.

    Raises UserError where names or shapes differ.
    """
    path = checkpoint / FILES[0]
    if averaged and (checkpoint / AVERAGE).exists():
        path = checkpoint / AVERAGE
    saved = _read(path)
    weights = dict(model.named_parameters())
    for name in sorted(weights.keys() ^ saved.keys()):
        raise UserError(f"{path} and the model differ: only one of them has the weight {name!r}")
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.shape != saved[name].shape:
                raise UserError(
                    f"{path}: {name} has shape {tuple(saved[name].shape)}, the model wants {tuple(weight.shape)}"
                )
            local(weight).copy_(local(like(saved[name], weight)))


def load_training_state(
    checkpoint: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None = None
) -> dict[str, Any]:
    """Restore weights and optimizers from a verified checkpoint; returns its state.json.

    average: restored too; from the weights where the checkpoint holds none.
    """
    load_weights(checkpoint, model)
    restore_optimizers(model, optimizers, _read(checkpoint / FILES[1]))
    if average is not None:
        average.load(_read(checkpoint / (AVERAGE if (checkpoint / AVERAGE).exists() else FILES[0])))
    return json.loads((checkpoint / FILES[2]).read_text())

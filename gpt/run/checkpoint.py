"""Checkpoints: one directory each, in safetensors and JSON, complete or absent.

    checkpoints/step_00000500/model.safetensors       the weights
                              optimizer.safetensors   optimizer states, each named WEIGHT.STATE
                              average.safetensors     the moving average of the weights, if the run keeps one
                              state.json              step, data position, float16's loss scale, best loss
                              manifest.json           size and SHA-256 of the other files, written last
    checkpoints/best_00000400/                        the same for the step with the lowest validation loss

Tensors are stored whole, so that any number of processes can resume: under torchrun all ranks gather them together, and
rank 0 writes.

A checkpoint is written under a temporary name beside its own, each file is flushed to the disk, then the folder is
renamed. Deletion renames first, too, and removes only the files above: anything else in the folder stays. Nothing is
unpickled. gpt.training.saver writes checkpoints in a thread.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.distributed import like, local
from gpt.errors import UserError
from gpt.files import flush, make_folder, utf8_path
from gpt.run.layout import AVERAGE, CHECKPOINT_FILES, MANIFEST, REQUIRED, STATE, WEIGHTS, checkpoint_name

_NAME = re.compile(r"(step|best)_[0-9]{8,18}")
_TEMPORARY = re.compile(rf"\.{_NAME.pattern}\.[0-9a-z]+\.tmp")
TensorFiles = dict[str, dict[str, Tensor]]  # name of the file -> name of the tensor -> tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store(directory: Path, tensors: TensorFiles, state: dict[str, Any], *, keep: int, kinds: tuple[str, ...]) -> None:
    """Write the checkpoint of state["step"] as each of the kinds "step" and "best", then prune. state: JSON values.

    Raises UserError naming the file if the disk refuses; the older checkpoints are then untouched.
    """
    for kind in kinds:
        _write(directory / checkpoint_name(kind, state["step"]), tensors, state)
    prune(directory, state["step"], keep)


def prune(directory: Path, step: int, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` of kind "step" and the newest of kind "best".

    Checkpoints of later steps are deleted, too: they are damaged, or the run has gone back behind them.
    """
    try:
        for kind, number in (("step", keep), ("best", 1)):
            own = [path for path in list_checkpoints(directory) if path.name.startswith(kind)]
            past = [path for path in own if _step(path) <= step]
            for path in {*own} - {*past[:number]}:
                remove(path)
    except OSError as error:
        raise UserError(f"cannot delete the old checkpoint {error.filename}: {error.strerror}") from error


def _write(final: Path, tensors: TensorFiles, state: dict[str, Any]) -> None:
    directory = final.parent
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        make_folder(directory)
        for stale in unfinished(directory):
            discard(stale)
        temporary.mkdir()
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, temporary / name)
        (temporary / STATE).write_text(json.dumps(state, indent=1))
        names = (*tensors, STATE)
        for name in names:
            flush(temporary / name)
        manifest = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in names
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush(temporary / MANIFEST)
        flush(temporary)
        if os.path.lexists(final):
            remove(final)
        if final.exists():  # it holds a file of the user's
            for name in (*names, MANIFEST):
                os.replace(temporary / name, final / name)
            flush(final)
            temporary.rmdir()
        else:
            temporary.rename(final)
        flush(directory)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            discard(temporary)
        raise UserError(f"cannot write the checkpoint {final}: {error}; the earlier ones are untouched") from error


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, never leaving a part that could pass for a whole one; of a link, only the link.

    A folder that holds other files stays with those.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
    elif any(path.name not in CHECKPOINT_FILES or path.is_dir() for path in checkpoint.iterdir()):
        discard(checkpoint)
    else:
        aside = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        if aside.exists():
            discard(aside)
        checkpoint.rename(aside)
        discard(aside)


def discard(folder: Path) -> None:
    """Delete a checkpoint's files, the manifest first, and the folder if it is then empty."""
    for name in (MANIFEST, *sorted(CHECKPOINT_FILES - {MANIFEST})):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    if not os.listdir(folder):
        folder.rmdir()


def unfinished(directory: Path) -> list[Path]:
    """List the temporary folders of saves and deletions that were killed."""
    found = [path for path in directory.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("_")[2])


def list_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints in a directory, verified or not, newest first; of one step, kind "step" comes first.

    A folder of which only files of the user's are left is not listed.
    """
    found = [path for path in directory.glob("*_*") if _NAME.fullmatch(path.name) and not _is_leftover(path)]
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def _is_leftover(path: Path) -> bool:
    try:
        names = os.listdir(path)
    except OSError:  # verify will report it
        return False
    return bool(names) and CHECKPOINT_FILES.isdisjoint(names)


def verify(checkpoint: Path) -> str | None:
    """Return None if every file matches the manifest, else a clause that names the file and its fault."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        for name in {*REQUIRED, *manifest}:
            path, entry = checkpoint / name, manifest[name]
            if path.parent != checkpoint:
                raise ValueError(name)
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{path} does not have the checksum that its manifest states"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{checkpoint / MANIFEST} is not a manifest"
    return None


def newest_checkpoint(directory: Path, say=print, *, kind: str = "") -> Path | None:
    """Return the newest checkpoint that verifies, of one kind if given; None if the directory has no checkpoint.

    Reports each newer one that it skips. Raises UserError if checkpoints exist but none verifies.
    """
    found = [path for path in list_checkpoints(directory) if path.name.startswith(kind)]
    for checkpoint in found:
        fault = verify(checkpoint)
        if fault is None:
            return checkpoint
        say(f"passing over {checkpoint.name}: {fault}")
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {directory} verifies; the newest: {verify(found[0])}")
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_path(path) as readable:
            return load_file(readable)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def load_weights(checkpoint: Path, model: nn.Module, *, averaged: bool = False) -> None:
    """Copy a verified checkpoint's weights into the model; averaged: their moving average, if the checkpoint has one.

    Raises UserError if names or shapes differ.
    """
    path = checkpoint / (AVERAGE if averaged and (checkpoint / AVERAGE).exists() else WEIGHTS)
    weights = dict(model.named_parameters())
    saved = read_like(path, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            local(weight).copy_(local(like(saved[name], weight)))


def read_like(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read a file whose tensors must have the names and shapes of the weights."""
    saved = read_tensors(path)
    for name in sorted(weights.keys() ^ saved.keys()):
        raise UserError(f"{path} and the model differ: only one of them has the weight {name!r}")
    for name, weight in weights.items():
        if weight.shape != saved[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, the model wants {tuple(weight.shape)}"
            )
    return saved

"""Checkpoints: one directory each, safetensors and JSON only, complete or not there at all.

    checkpoints/step_00000500/model.safetensors       the weights
                              optimizer.safetensors   every optimizer state tensor, as "<weight's name>.<state's name>"
                              average.safetensors     the weights' moving average, where one is kept
                              state.json              step, data position, float16's loss scale, best loss
                              manifest.json           size and SHA-256 of the files above, written last
    checkpoints/best_00000400/                        the same, of the step with the lowest validation loss

They hold whole tensors, whatever number of processes wrote them, so that any number can go on from them: under
torchrun all ranks gather them together, and rank 0 writes.

A checkpoint is written beside its place under a temporary name, each file flushed to the disk, then renamed. Deletion
renames first, too, and takes only the files above: whatever else a folder holds stays. Nothing is unpickled.
gpt.training.saver writes them beside the training.
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

MANIFEST = "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
AVERAGE = "average.safetensors"  # the one file that a checkpoint may lack
OWN = {*FILES, AVERAGE, MANIFEST}
_NAME = re.compile(r"(step|best)_[0-9]{8,18}")
_TEMPORARY = re.compile(rf"\.{_NAME.pattern}\.[0-9a-z]+\.tmp")
Tensors = dict[str, dict[str, Tensor]]  # file name -> tensor's name -> tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store(directory: Path, tensors: Tensors, state: dict[str, Any], *, keep: int, kinds: tuple[str, ...]) -> None:
    """Write the checkpoint of state["step"], under each of the kinds "step" and "best", then prune. state: JSON values.

    Raises UserError, naming the file, where the disk refuses; the older checkpoints are then untouched.
    """
    for kind in kinds:
        _write(directory / _name(kind, state["step"]), tensors, state)
    prune(directory, state["step"], keep)


def prune(directory: Path, step: int, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` of the kind "step" and the newest of the kind "best".

    Later steps than this one go too: they are damaged or of a course that the run has left.
    """
    try:
        for kind, number in (("step", keep), ("best", 1)):
            own = [path for path in list_checkpoints(directory) if path.name.startswith(kind)]
            past = [path for path in own if _step(path) <= step]
            for path in {*own} - {*past[:number]}:
                remove(path)
    except OSError as error:
        raise UserError(f"cannot delete the old checkpoint {error.filename}: {error.strerror}") from error


def _write(final: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    directory = final.parent
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        make_folder(directory)
        for stale in unfinished(directory):
            discard(stale)
        temporary.mkdir()
        for name, values in tensors.items():
            save_file({key: value.contiguous() for key, value in values.items()}, temporary / name)
        (temporary / FILES[2]).write_text(json.dumps(state, indent=1))
        names = (*tensors, FILES[2])
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
        if final.exists():  # a file of the user's is in it
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
    """Delete a checkpoint so that no half of it is ever taken for a whole one; of a link, the link.

    A folder with other files in it stays, with those.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
    elif any(path.name not in OWN or path.is_dir() for path in checkpoint.iterdir()):
        discard(checkpoint)
    else:
        aside = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        if aside.exists():
            discard(aside)
        checkpoint.rename(aside)
        discard(aside)


def discard(folder: Path) -> None:
    """Delete a checkpoint's files, the manifest first, and their folder unless it holds something else."""
    for name in (MANIFEST, *sorted(OWN - {MANIFEST})):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    if not os.listdir(folder):
        folder.rmdir()


def unfinished(directory: Path) -> list[Path]:
    """The folders that a save or a deletion, killed on its way, left under their temporary names."""
    found = [path for path in directory.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _name(kind: str, step: int) -> str:
    return f"{kind}_{step:08d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("_")[2])


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under a directory, newest first, verified or not; of one step the kind "step" comes first.

    A folder that was deleted but for a file of the user's is not one.
    """
    found = [path for path in directory.glob("*_*") if _NAME.fullmatch(path.name) and not _is_leftover(path)]
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def _is_leftover(path: Path) -> bool:
    try:
        names = os.listdir(path)
    except OSError:  # verify says why
        return False
    return bool(names) and OWN.isdisjoint(names)


def verify(checkpoint: Path) -> str | None:
    """None where every file is as the manifest says; else one clause that names the file and its fault."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        for name in {*FILES, *manifest}:
            path, entry = checkpoint / name, manifest[name]
            if path.parent != checkpoint:
                raise ValueError(name)
            if path.stat().st_size != entry["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{path} does not have the checksum its manifest states"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{checkpoint / MANIFEST} is not a manifest"
    return None


def newest_checkpoint(directory: Path, say=print) -> Path | None:
    """The newest checkpoint that verifies, the best one included, or None where no checkpoint exists.

    Says which newer ones it passes over and why. Raises UserError where there are some but none verifies.
    """
    return _first_sound(list_checkpoints(directory), directory, say)


def best_checkpoint(directory: Path, say=print) -> Path | None:
    """The checkpoint with the lowest validation loss, or None where none is marked so. Else as newest_checkpoint."""
    found = [path for path in list_checkpoints(directory) if path.name.startswith("best")]
    return _first_sound(found, directory, say)


def _first_sound(found: list[Path], directory: Path, say) -> Path | None:
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
    """Copy a verified checkpoint's weights into the model; averaged: their moving average, if it holds one.

    Raises UserError where names or shapes differ.
    """
    path = checkpoint / FILES[0]
    if averaged and (checkpoint / AVERAGE).exists():
        path = checkpoint / AVERAGE
    weights = dict(model.named_parameters())
    saved = read_like(path, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            local(weight).copy_(local(like(saved[name], weight)))


def read_like(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, which have the names and shapes of the weights."""
    saved = read_tensors(path)
    for name in sorted(weights.keys() ^ saved.keys()):
        raise UserError(f"{path} and the model differ: only one of them has the weight {name!r}")
    for name, weight in weights.items():
        if weight.shape != saved[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, the model wants {tuple(weight.shape)}"
            )
    return saved

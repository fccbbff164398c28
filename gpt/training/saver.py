"""Checkpoints written beside the training, by one thread: from a copy, or in place until the state is to change."""

import threading
from pathlib import Path
from typing import Any

import torch

from gpt.errors import UserError
from gpt.files import flush
from gpt.run.checkpoint import TensorFiles, prune, store


def snapshot(tensors: TensorFiles) -> TensorFiles:
    """A copy in CPU memory that later steps cannot change."""
    copy = lambda tensor: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
    return {file: {name: copy(tensor.detach()) for name, tensor in values.items()} for file, values in tensors.items()}


class Saver:
    """Writes the checkpoints of one run, one at a time.

    save() first waits for the checkpoint before. By default it returns when the state is copied to CPU memory.
    in_place: the thread writes the tensors that it was given, so that no memory is needed for a copy; call
    before_change() before anything changes them. What goes wrong in the thread is raised, as UserError, by the next
    check(), save(), wait() or before_change(). Python waits for the thread before it exits, after Ctrl-C too.
    metrics: a file to flush to the disk before each checkpoint that counts on its lines. directory None: write nothing,
    as on the ranks other than 0.
    """

    def __init__(
        self, directory: Path | None, *, keep: int, metrics: Path | None = None, in_place: bool = False
    ) -> None:
        self.directory, self.keep, self.metrics, self.in_place = directory, keep, metrics, in_place
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, tensors: TensorFiles, state: dict[str, Any], *, kinds: tuple[str, ...] = ("step",)) -> None:
        """Write what the tensors and the state (JSON values) are now. kinds: as gpt.run.checkpoint.store takes them."""
        self.wait()
        if self.directory is None:
            return
        held = tensors if self.in_place else snapshot(tensors)
        self._thread = threading.Thread(target=self._write, args=(held, state, kinds), name="saver")
        self._thread.start()

    def before_change(self) -> None:
        """Wait until no save reads the tensors that it was given."""
        if self.in_place:
            self.wait()

    def prune(self, step: int) -> None:
        """Delete what a save that was killed at this step has left to delete."""
        self.wait()
        if self.directory is not None:
            prune(self.directory, step, self.keep)

    def check(self) -> None:
        """Raise what went wrong in a save that has ended; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the save that is under way, and raise what went wrong in it."""
        self.close()
        self.check()

    def close(self) -> None:
        """Wait for the save that is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, tensors: TensorFiles, state: dict[str, Any], kinds: tuple[str, ...]) -> None:
        try:
            if self.metrics is not None:
                flush(self.metrics)
                flush(self.metrics.parent)
            store(self.directory, tensors, state, keep=self.keep, kinds=kinds)
        except OSError as error:
            self._error = UserError(f"cannot write {self.metrics}: {error.strerror}; the checkpoints are untouched")
        except BaseException as error:
            self._error = error

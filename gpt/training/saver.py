"""Write checkpoints in a thread during training, from a copy of the state or from the state itself."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gpt.files import flush
from gpt.run.checkpoint import TensorFiles, prune, store
from gpt.run.metrics import writing


def snapshot(tensors: TensorFiles) -> TensorFiles:
    """Copy the tensors to CPU memory."""
    copy = lambda tensor: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)
    return {file: {name: copy(tensor.detach()) for name, tensor in values.items()} for file, values in tensors.items()}


class Saver:
    """Writes the checkpoints of a run, one at a time.

    save() first waits for the previous checkpoint. By default it returns when the state is copied to CPU memory.
    in_place: the thread writes the given tensors themselves, without memory for a copy; call before_change() before
    changing them. The next check(), save(), wait() or before_change() raises the thread's error, as UserError. Python
    waits for the thread before it exits, also after Ctrl-C. metrics: a file to flush to the disk before each
    checkpoint, which relies on its lines. directory None: write nothing, as on ranks other than 0.
    """

    def __init__(
        self, directory: Path | None, *, keep: int, metrics: Path | None = None, in_place: bool = False
    ) -> None:
        self.directory, self.keep, self.metrics, self.in_place = directory, keep, metrics, in_place
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._saving: Future[None] | None = None

    def save(self, tensors: TensorFiles, state: dict[str, Any], *, kinds: tuple[str, ...] = ("step",)) -> None:
        """Start to write the tensors and the state (JSON values). kinds: as for gpt.run.checkpoint.store."""
        self.wait()
        if self.directory is None:
            return
        held = tensors if self.in_place else snapshot(tensors)
        self._saving = self._pool.submit(self._write, held, state, kinds)

    def before_change(self) -> None:
        """Wait until no save reads the given tensors."""
        if self.in_place:
            self.wait()

    def prune(self, step: int) -> None:
        """Prune the checkpoints, for a save of this step that was killed before it did."""
        self.wait()
        if self.directory is not None:
            prune(self.directory, step, self.keep)

    def check(self) -> None:
        """Raise the error of a finished save, without waiting."""
        if self._saving is not None and self._saving.done():
            saving, self._saving = self._saving, None
            saving.result()

    def wait(self) -> None:
        """Wait for the current save, and raise its error."""
        self.close()
        self.check()

    def close(self) -> None:
        """Wait for the current save, without raising its error."""
        if self._saving is not None:
            self._saving.exception()

    def _write(self, tensors: TensorFiles, state: dict[str, Any], kinds: tuple[str, ...]) -> None:
        if self.metrics is not None:
            with writing(self.metrics):
                flush(self.metrics)
                flush(self.metrics.parent)
        store(self.directory, tensors, state, keep=self.keep, kinds=kinds)

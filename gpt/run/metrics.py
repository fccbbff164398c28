"""Read metrics.jsonl, and truncate it when a run resumes."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt.errors import UserError
from gpt.files import write_whole
from gpt.run.loss_plot import Losses


def metrics_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Iterate over the records of a metrics.jsonl, each with the offset of its line's end in bytes.

    Stops at the first invalid or truncated line.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                return
            yield record, end


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, up to the first invalid or truncated line."""
    return [record for record, _ in metrics_lines(path)]


def cut_metrics(path: Path, start_step: int, size: int | None) -> Losses:
    """Truncate a metrics.jsonl to its `size` bytes at start_step; return the losses that remain.

    Without a size, or if the file is shorter, remove the first record of a later step and all after it.
    """
    if path.exists() and path.stat().st_nlink > 1:  # a hard link, such as a backup, keeps its content
        write_whole(path, path.read_bytes())
    if size is not None and path.exists() and path.stat().st_size >= size:
        os.truncate(path, size)
        return Losses(record for record, _ in metrics_lines(path))
    losses, end = Losses(), 0
    for record, line_end in metrics_lines(path):
        if record["step"] > start_step:
            break
        losses.add(record)
        end = line_end
    with path.open("ab") as file:
        file.truncate(end)
    with path.open("rb+") as file:
        file.seek(max(0, end - 1))
        if file.read() not in (b"", b"\n"):  # the last line was truncated after its closing brace
            file.write(b"\n")
    return losses


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError in the block as a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the checkpoints are untouched") from error

"""The progress bar shown while a corpus is read."""

import sys
from typing import Any


class CorpusProgress:
    """A bar for each stage, with bytes per second and time left; on a terminal only. An OnProgress callback."""

    def __init__(self) -> None:
        self.progress = None
        self.tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.progress is None:  # imported only if there is something to read
            from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = ("{task.description}", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
            self.progress.start()
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what)
        self.progress.update(self.tasks[what], completed=done, total=total)

    def __enter__(self) -> "CorpusProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

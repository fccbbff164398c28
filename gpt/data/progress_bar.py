"""The progress bar of reading a corpus."""

import sys
from typing import Any


class CorpusProgress:
    """A bar with bytes per second and time left for each stage of reading a corpus; on a terminal only.

    Called as progress(what, bytes done, bytes in all), which is what gpt.data.corpus.prepare does.
    """

    def __init__(self) -> None:
        self.progress = None
        self.tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.progress is None:  # the usual second start reads nothing: no import for it
            from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = ("{task.description}", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, transient=True, disable=not sys.stdout.isatty())
            self.progress.start()
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)

    def __enter__(self) -> "CorpusProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

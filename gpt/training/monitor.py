"""Report a run: progress bar, metrics.jsonl, loss.png and Weights & Biases."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

from gpt.config import Config
from gpt.files import flush
from gpt.run.checkpoint import list_checkpoints
from gpt.run.layout import CHECKPOINTS, LOSS_PLOT, METRICS, TABLE, TRACES, checkpoints_of
from gpt.run.loss_plot import plot_losses
from gpt.run.metrics import cut_metrics, writing
from gpt.stop import process_seconds
from gpt.training.wandb_run import start_wandb, title_of

SILENCE = 10.0  # seconds between progress reports of an evaluation


class Ticker:
    """Reports the progress of an evaluation every SILENCE seconds."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._last = clock()

    def __call__(self, done: int, total: int) -> None:
        if done == 0:
            self._last = self._clock()
        elif self._clock() - self._last >= SILENCE:
            self._last = self._clock()
            self._say(f"evaluating: {done / total:.0%} of {total:,} tokens")


class Monitor:
    """Writes metrics.jsonl, a progress bar on a terminal (lines elsewhere), loss.png and a wandb run.

    When a run resumes at start_step, metrics.jsonl is truncated to metrics_bytes, its size when that step was saved, so
    that the file reads as one run; if it is shorter, the records of later steps are removed.
    Raises UserError if the file cannot be written.
    """

    def __init__(
        self, config: Config, *, start_step: int = 0, metrics_bytes: int | None = None, wandb_id: str | None = None
    ):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.run_dir, self.max_steps = config.train.run_dir, config.train.max_steps
        self.path = self.run_dir / METRICS
        self._open(start_step, metrics_bytes)
        self.wandb = start_wandb(config, wandb_id) if config.log.wandb != "off" else None
        self.console = Console(highlight=False)
        self.last_line = -math.inf
        self.ticker = Ticker(self.say)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=self.max_steps, completed=start_step, status="")
        self.progress.start()
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.say(record.getMessage())
        for name in ("kernels", "gpt"):
            logging.getLogger(name).addHandler(self.handler)
            logging.getLogger(name).setLevel(logging.INFO)

    def say(self, text: str | None) -> None:
        """Print a text above the bar, without markup; None prints nothing."""
        if text is not None:
            self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if not self.progress.disable:
            self.progress.update(self.task, completed=step)

    def evaluating(self, done: int, total: int) -> None:
        """Show the progress of an evaluation, in tokens."""
        if self.progress.disable:
            self.ticker(done, total)
        else:
            self.progress.update(self.task, status=f"evaluating: {done / total:.0%} of {total:,} tokens")

    def log(self, record: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, with the seconds since the start, and show it in the bar or as a line."""
        record = {**record, "seconds": round(process_seconds(), 3)}
        # JSON has finite numbers only.
        written = {key: x for key, x in record.items() if not isinstance(x, float) or math.isfinite(x)}
        self.losses.add(written)
        with writing(self.path):
            line = (json.dumps(written) + "\n").encode()
            if self.file.write(line) != len(line):  # the disk is full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        step = record["step"]
        if "val_loss" in record:
            whole = f" on all {record['val_tokens']:,} tokens" if "val_tokens" in record else ""
            self.say(
                f"step {step}: validation loss {record['val_loss']:.4f} nats per token, "
                f"{record['bits_per_byte']:.4f} bits per byte{whole}, {record['seconds']:.1f} s"
            )
        elif "train_loss" in record:
            status = f"loss {record['train_loss']:.4f}  {record['tokens_per_second'] / 1000:.1f}k tokens/s"
            self.progress.update(self.task, completed=step, status=status)
            if self.progress.disable and step - self.last_line >= self.max_steps / 20:
                self.last_line = step
                self.say(f"step {step}/{self.max_steps}: {status}")

    def _open(self, step: int, size: int | None) -> None:
        with writing(self.path):
            self.losses = cut_metrics(self.path, step, size)
            self.file = self.path.open("ab", buffering=0)  # unbuffered: an error is raised by the write

    def rewind(self, step: int) -> None:
        """Remove the records of later steps, after a rollback to this one."""
        self.file.close()
        self._open(step, None)
        self.last_line = -math.inf
        self.advance(step)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the size of metrics.jsonl, and the id of the wandb run."""
        return {"metrics_bytes": self.file.tell(), "wandb_id": self.wandb.id if self.wandb is not None else None}

    def close(self) -> None:
        """Stop the bar, close the file, draw loss.png, finish the wandb run."""
        self.progress.stop()
        for name in ("kernels", "gpt"):
            logging.getLogger(name).removeHandler(self.handler)
        try:
            flush(self.path)
        except OSError as error:
            self.say(f"{self.path} could not be flushed to the disk: {error.strerror}")
        self.file.close()
        try:
            plot_losses(self.losses, self.run_dir / LOSS_PLOT, title_of(self.run_dir))
        except OSError as error:  # the run succeeded all the same
            self.say(f"loss.png was not drawn: {error.strerror or error}")
        if self.wandb is not None:
            self.wandb.finish()

    def written(self) -> list[str]:
        """List what the run directory now holds; of the checkpoints the newest and the best."""
        names = [row.name for row in TABLE if row.option is None]
        found = list_checkpoints(checkpoints_of(self.run_dir))
        newest = [next((p.name for p in found if p.name.startswith(kind)), None) for kind in ("step", "best")]
        names += [f"{CHECKPOINTS}/{name}" for name in newest if name]
        names += [name for name in TRACES if (self.run_dir / name).exists()]
        return names + ["wandb"] * (self.wandb is not None)


class SilentMonitor:
    """The Monitor of ranks other than 0, which report nothing."""

    path = None

    def state(self) -> dict[str, Any]:
        return {}

    def _ignore(self, *args: Any) -> None: ...

    say = advance = evaluating = log = rewind = close = _ignore

"""The state of the training loop."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpt.config import Config
from gpt.data.loader import Batches, Loader
from gpt.data.tokenizers import Tokenizer
from gpt.distributed import World
from gpt.model import GPT
from gpt.stop import StopRequest
from gpt.training.average import Average
from gpt.training.guard import Guard, LossScale
from gpt.training.hardware import mfu, peak_flops
from gpt.training.monitor import Monitor, SilentMonitor
from gpt.training.parallel import Parallel
from gpt.training.profile import Profiler
from gpt.training.progress import Progress
from gpt.training.saver import Saver


@dataclass
class Rate:
    """Tokens per second since the last log, evaluation or save."""

    step: int = 0
    since: float = field(default_factory=time.perf_counter)

    def restart(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()

    def tokens_per_second(self, step: int, tokens_per_step: int) -> float:
        return (step - self.step) * tokens_per_step / (time.perf_counter() - self.since)


@dataclass
class Job:
    """The parts of a training and its progress. gpt.training.start builds it, train.py runs it."""

    config: Config
    world: World
    stop: StopRequest
    tokenizer: Tokenizer
    loader: Loader
    batches: Batches
    val_tokens: list[np.ndarray]
    model: GPT
    parallel: Parallel
    optimizers: list[torch.optim.Optimizer]
    weights: list[nn.Parameter]
    average: Average | None
    guard: Guard
    loss_scale: LossScale
    tokens_per_step: int
    at: Progress = field(default_factory=Progress)
    rate: Rate = field(default_factory=Rate)
    monitor: Monitor | SilentMonitor = field(default_factory=SilentMonitor)
    saver: Saver | None = None
    """None until the run directory is open; --eval-only never opens it"""
    profiler: Profiler | None = None
    checkpoint: Path | None = None
    """the newest valid checkpoint, to roll back to"""
    saved_step: int | None = None
    """the step of the run directory's newest checkpoint"""
    trials: int = 0
    """number of next steps before which every rank tries a micro-batch for memory"""
    stopping: bool = False
    """a rank was told to stop, and the loop ends after this step"""
    listens: bool = True
    """stop between micro-batches when told to; off while steps are skipped"""

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def micro_steps(self) -> int:
        """Micro-batches in this rank's part of a step."""
        options = self.config.train
        return options.batch_size * options.grad_accum_steps // self.loader.batch_size

    @property
    def hears_at_once(self) -> bool:
        """Whether asking all ranks for a stop costs no wait for a device."""
        return self.world.size == 1 or self.device.type == "cpu"

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take."""
        return self.at.step >= self.config.train.max_steps or self.stopping or self.without_progress

    @property
    def without_progress(self) -> bool:
        return self.at.without_progress(self.config.train.patience)

    def heard(self) -> bool:
        """Tell whether any rank was told to stop. All ranks must call it together."""
        return self.world.any(self.stop.reason is not None)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights, if the run keeps them, for the duration of the block."""
        if self.average is None:
            yield
            return
        if self.saver is not None:
            self.saver.before_change()
        with self.average.swapped_in():
            yield

    def throughput(self) -> dict[str, float]:
        """Return tokens per second over all ranks, and MFU if the device's peak is known."""
        rate = self.rate.tokens_per_second(self.at.step, self.tokens_per_step)
        share = mfu(rate, self.model.flops_per_token(), peak_flops(self.device), self.world.size)
        return {"tokens_per_second": round(rate, 1)} | ({} if share is None else {"mfu": round(share, 4)})

    def state(self) -> dict[str, Any]:
        """Return the states of data, loss scale and guard for a checkpoint, as JSON values. Waits for the device."""
        return {
            "loader": self.batches.state_dict(),
            "scaler": self.loss_scale.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def close(self) -> None:
        """Close threads and files; finish a save in progress."""
        for part in (self.saver, self.batches, self.profiler, self.monitor):
            if part is not None:
                part.close()

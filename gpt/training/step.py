"""Take an optimizer step: micro-batches forward and backward, agreement of the ranks, clipping, update."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpt.data.loader import DOCUMENT_INPUTS
from gpt.device import autocast, seed_generators
from gpt.distributed import full, local
from gpt.errors import out_of_memory
from gpt.model.config import IGNORE_INDEX
from gpt.stop import Stopped
from gpt.training.job import Job
from gpt.training.optimizer_state import take_step
from gpt.training.plan import fewer_rows

SELDOM = 16  # micro-batches between checks for a stop, if a check waits for the device


def accumulate(job: Job) -> Tensor | None:
    """Accumulate the gradients of a step; return the loss (), or None if a rank was told to stop.

    The mean of the loss over the ranks is the mean over all targets. If memory runs out, the step starts again with
    fewer rows per micro-batch. Raises UserError if even one row needs too much.
    """
    while True:
        loss, fits, start = None, True, job.batches.state_dict()
        try:
            fits = job.trials == 0 or _fits_everywhere(job)
            # A resumed run draws the same dropout.
            seed_generators(job.device, job.config.train.seed, job.at.step, job.world.rank)
            loss = _forward_backward(job) if fits else None
        except Stopped:
            job.model.zero_grad(set_to_none=True)
            job.batches.go_to(start)
            return None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if loss is not None:
            return loss
        # Outside the handler the error no longer keeps the activations alive.
        job.model.zero_grad(set_to_none=True)
        rows = job.loader.batch_size
        fewer = fewer_rows(rows, job.config, job.device, job.world.size, agreed=not fits)
        job.batches.go_to(start, rows=fewer)
        job.monitor.say(f"out of memory: micro-batches have {fewer} rows from now on instead of {rows}")


def _forward_backward(job: Job) -> Tensor:
    """Compute the gradients and the loss () of a step. Raises Stopped if a rank was told to stop."""
    loss, pace = torch.zeros((), device=job.device), 1 if job.hears_at_once else SELDOM
    parts = (job.batches.next_batch() for _ in range(job.micro_steps))
    shares = itertools.repeat(1 / job.micro_steps)
    if job.config.data.packing == "best_fit":  # batches have different numbers of targets: weight them
        parts = list(parts)
        shares = job.world.shares(torch.stack([(y != IGNORE_INDEX).sum() for _, y, *_ in parts]).float())
    for n, (batch, share) in enumerate(zip(parts, shares), start=1):
        if n > 1 and job.listens and n % pace == 0 and job.heard():
            raise Stopped
        loss += _micro_step(job, batch, share, reduced=n == job.micro_steps)
    return loss


def _micro_step(job: Job, batch: Sequence[Tensor], share: Tensor | float, reduced: bool) -> Tensor:
    """Add the gradients of a batch weighted with its share of the step; return its part of the loss ()."""
    x, y, *places = batch
    optim = job.config.optim
    options = {"z_loss": optim.z_loss, "label_smoothing": optim.label_smoothing, **dict(zip(DOCUMENT_INPUTS, places))}
    with job.parallel.gradients(reduced=reduced):
        with autocast(job.device, job.config.train.dtype):
            loss = job.parallel.loss(x, y, **options) * share
        (loss * job.loss_scale.scale if job.loss_scale.enabled else loss).backward()
    return loss.detach()


def _fits_everywhere(job: Job) -> bool:
    """Try a micro-batch on each rank alone, so that none waits for another; tell whether all have memory for it.

    Raises Stopped if a rank was told to stop.
    """
    start, fits = job.batches.state_dict(), True
    try:
        _micro_step(job, job.batches.next_batch(), 1.0, reduced=False)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fits = False
    job.model.zero_grad(set_to_none=True)
    job.batches.go_to(start)
    fitting, asked = job.world.sum(fits, job.stop.reason is not None)
    if asked and job.listens:
        raise Stopped
    return fitting == job.world.size


def agree(job: Job, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Average the losses () over the ranks; the second value () is above 0 if any rank was told to stop."""
    asked = torch.full_like(loss, job.stop.reason is not None)
    return job.world.mean(torch.stack((loss, asked))).unbind()


def gradient_norm(weights: list[nn.Parameter]) -> Tensor:
    """Return the norm () of all gradients together, over all ranks."""
    return full(nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]))


@torch.no_grad()
def scale_gradients(weights: list[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a factor ()."""
    torch._foreach_mul_([local(p.grad) for p in weights if p.grad is not None], factor)


def clip(job: Job, grad_norm: Tensor) -> None:
    """Clip the gradients to the norm grad_clip, and undo float16's loss scale."""
    most = job.config.optim.grad_clip
    if most or job.loss_scale.enabled:
        factor = ((most or math.inf) / (grad_norm + 1e-6)).clamp(max=1.0)
        scale_gradients(job.weights, factor / job.loss_scale.scale)


def update(job: Job, found_inf: Tensor) -> None:
    """Update weights, loss scale and average; if found_inf () is 1, only the loss scale changes."""
    job.saver.before_change()
    for optimizer in job.optimizers:
        take_step(optimizer, found_inf)
        optimizer.zero_grad(set_to_none=True)
    job.loss_scale.update(found_inf)
    if job.average is not None:
        job.average.update(found_inf)
    job.trials = max(0, job.trials - 1)
    job.at.step += 1
    job.at.tokens += job.tokens_per_step
    job.monitor.advance(job.at.step)
    job.saver.check()
    job.profiler.step()

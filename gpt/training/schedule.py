"""Learning rate schedules."""

import math

import torch

from gpt.training.config import OptimConfig


def lr_scale(step: int, max_steps: int, config: OptimConfig) -> float:
    """Compute the learning rate at a step (from 0) as a fraction of its peak.

    Linear warm-up; then cosine decay (Loshchilov & Hutter 2017), or linear decay, or constant with linear decay over
    the last decay_fraction (WSD, Hu et al. 2024), or constant. Decay ends at min_lr / learning_rate.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr / config.learning_rate
    left = max_steps - step  # remaining steps, including this one
    if config.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left / max(1, max_steps - config.warmup_steps))
    elif config.schedule == "linear":
        share = left / max(1, max_steps - config.warmup_steps)
    elif config.schedule == "wsd":
        share = min(1.0, left / max(1.0, config.decay_fraction * max_steps))
    else:
        return 1.0
    return floor + (1 - floor) * share


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set the learning rate of each group to scale times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("peak_lr", group["lr"])

"""The exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.distributed import like, local


class Average:
    """An exponential moving average of the weights: average += (1 - decay) * (weight - average) after each step.

    Kept in float32 and sharded like the weights. It starts as a copy of the weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._pairs = [(local(p.detach()), local(self.tensors[name])) for name, p in model.named_parameters()]

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Update the average after a step; change nothing if found_inf () is 1, a skipped step."""
        weights, averages = map(list, zip(*self._pairs))
        away = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(away, (1 - self.decay) * (1 - found_inf))
        torch._foreach_add_(averages, away)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged weights for the duration of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in self._pairs:
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load whole tensors by name, as stored in checkpoints."""
        for name, average in self.tensors.items():
            local(average).copy_(local(like(tensors[name], average)))

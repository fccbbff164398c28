"""The exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.distributed import like, local


class Average:
    """An exponential moving average of the weights: average += (1 - decay) * (weight - average) after each step.

    Kept in float32, sharded as the weights are. It starts as the weights are when it is made.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._pairs = [(local(p.detach()), local(self.tensors[name])) for name, p in model.named_parameters()]

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Follow the weights by one step, unless the step was skipped."""
        weights, averages = map(list, zip(*self._pairs))
        away = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(away, (1 - self.decay) * (1 - found_inf))
        torch._foreach_add_(averages, away)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the average's values for as long as the block lasts."""
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
        """Take whole tensors by name, as checkpoints hold them."""
        for name, average in self.tensors.items():
            local(average).copy_(local(like(tensors[name], average)))

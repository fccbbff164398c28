"""A decoder's step as a CUDA graph: recorded once, then replayed as one launch instead of some hundred."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 2  # steps that run as they are, in which kernels are compiled and libraries set up


class _Recorded(NamedTuple):
    replay: Callable[[], None]
    tokens: Tensor  # (B, T), where the graph reads them
    where: Tensor  # (N, B), likewise
    logits: Tensor  # (B, T, V), where it leaves them


class StepGraphs:
    """run(tokens (B, T), where (N, B)) -> logits (B, T, V), replayed from the third call with one shape on.

    run must launch the same kernels on the same addresses at every call, except for its arguments and its result.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]):
        self._run = run
        self.clear()

    def clear(self) -> None:
        """Forget all graphs: what they read or write is about to move."""
        self._recorded: dict[torch.Size, _Recorded] = {}
        self._times: Counter[torch.Size] = Counter()

    def step(self, tokens: Tensor, where: list[list[int]]) -> Tensor:
        """Logits of tokens (B, T); where: N times a number for each row, on the host."""
        shape, at = tokens.shape, torch.tensor(where)
        self._times[shape] += 1
        if self._times[shape] <= WARM_UP:
            return self._run(tokens, at.to(tokens.device))
        if shape not in self._recorded:
            self._recorded[shape] = self._record(tokens.clone(), at.to(tokens.device))
        graph = self._recorded[shape]
        graph.tokens.copy_(tokens)
        graph.where.copy_(at)
        graph.replay()
        return graph.logits.clone()

    def _record(self, tokens: Tensor, where: Tensor) -> _Recorded:
        replay, logits = record(lambda: self._run(tokens, where))
        return _Recorded(replay, tokens, where, logits)


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what run launches, without running it: how to replay it, and where its result will then be."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result

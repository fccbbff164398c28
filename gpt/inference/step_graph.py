"""A decoder's step as a CUDA graph: recorded once, then replayed in one launch instead of a hundred."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP = 2  # first steps that are not recorded: they compile kernels and set up libraries


class _Recorded(NamedTuple):
    replay: Callable[[], None]
    tokens: Tensor  # (B, T), read by the graph
    counts: Tensor  # (N, B), read by the graph
    logits: Tensor  # (B, T, V), written by the graph


class StepGraphs:
    """Replays run(tokens (B, T), counts (N, B)) -> logits (B, T, V) from the third call with the same shape on.

    Each call of run must launch the same kernels on the same addresses, except for its arguments and its result.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor]):
        self._run = run
        self.clear()

    def clear(self) -> None:
        """Drop all graphs. Call it before the tensors that they use move."""
        self._recorded: dict[torch.Size, _Recorded] = {}
        self._times: Counter[torch.Size] = Counter()

    def step(self, tokens: Tensor, counts: list[list[int]]) -> Tensor:
        """Compute logits (B, T, V) of tokens (B, T). counts: N lists of a number for each row."""
        shape, at = tokens.shape, torch.tensor(counts)
        self._times[shape] += 1
        if self._times[shape] <= WARM_UP:
            return self._run(tokens, at.to(tokens.device))
        if shape not in self._recorded:
            own = tokens.clone(), at.to(tokens.device)
            replay, logits = record(lambda: self._run(*own))
            self._recorded[shape] = _Recorded(replay, *own, logits)
        graph = self._recorded[shape]
        graph.tokens.copy_(tokens)
        graph.counts.copy_(at)
        graph.replay()
        return graph.logits.clone()


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record run's launches without executing them; returns a function that replays them, and their result's tensor."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result

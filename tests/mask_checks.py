"""Masks for tests: every built-in mask, and compositions."""

import functools

import torch

from kernels.attention_arguments import Arguments
from kernels.masks import (
    CAUSAL,
    FULL,
    Band,
    Mask,
    bigbird,
    block_sparse,
    global_tokens,
    prefix,
    random_blocks,
    sink_tokens,
    sliding_window,
    strided,
)
from kernels.operators import call_of
from kernels.problem import Problem


def checkerboard(q, k):
    return (q + k) % 2 == 0


def later_queries(q, k, start):
    return q >= start


LATER = Mask(later_queries, 50, bands=[Band(q_begin=50, exact=True)])


def problem_of(mask: Mask, Tq: int, Tk: int, B: int = 1, H: int = 1, device="cpu", segment_ids=None) -> Problem:
    q, k = torch.randn(B, Tq, H, 16, device=device), torch.randn(B, Tk, 1, 16, device=device)
    return Problem(call_of(Arguments(q, k, k, mask, segment_ids)))


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def some_layout() -> torch.Tensor:
    return torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) < 0.4


# Built-in masks visit exactly the tiles that hold a True, compositions at most 1.15 x as many.
BUILT_IN = {
    "full": FULL,
    "causal": CAUSAL,
    "window": sliding_window(20),
    "sinks": sink_tokens(20),
    "prefix": prefix(lengths(0, 33, 150)),
    "global": global_tokens([0, 1, 77]),
    "many global": global_tokens([3, 40, 41, 79, 120, 148]),
    "strided": strided(70),
    "random blocks": random_blocks(2, 5, 16),
    "bigbird": bigbird(20, 3, 2, 5, 16),
    "block sparse": block_sparse(some_layout(), 25),
}
COMPOSED = {
    "window & sinks": CAUSAL & (sliding_window(20) | sink_tokens(4)),
    "prefix LM": CAUSAL | prefix(lengths(0, 33, 150)),
    "prefix & window": prefix(lengths(0, 33, 150)) & sliding_window(30) | sink_tokens(2),
    "Longformer": CAUSAL & (sliding_window(20) | global_tokens([0, 77])),
    "strided window": sliding_window(90) & strided(40),
    "strided pattern": CAUSAL & (sliding_window(16) | strided(64)),
    "causal layout": CAUSAL & block_sparse(some_layout(), 25),
    "layout or window": block_sparse(some_layout(), 25) | sliding_window(8),
    "bigbird prefix": bigbird(10, 0, 1, 3, 16) | prefix(lengths(0, 7, 20)),
    "many bands": functools.reduce(Mask.__or__, [sink_tokens(20 * n) & LATER for n in range(1, 4)], CAUSAL)
    | functools.reduce(Mask.__or__, [global_tokens([9 * n]) & CAUSAL for n in range(6)]),
}

"""One attention call as the kernels see it: operands, constants and tile sizes, ready to launch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import configs, masks
from kernels.attention_reference import dropout_threshold
from kernels.tiles import Dropout, Masking, Scoring, Sizes

LOG2E = math.log2(math.e)


class Launch(NamedTuple):
    """A kernel with its grid, its arguments and its compile-time options."""

    kernel: Callable
    grid: tuple[int]
    args: dict
    options: dict

    def run(self) -> None:
        if self.grid[0] > 0:
            self.kernel[self.grid](**self.args, **self.options)


def within_reach(x: Tensor) -> Tensor:
    """x (B, T, H, D), copied if positions or elements lie so far apart that a tile of them would span 2^31 elements."""
    return x if max(x.stride(1), x.stride(3)) < 2**31 // configs.MAX_TILE_EXTENT else x.contiguous()


@dataclass
class Problem:
    """q (B, Tq, H, D), k (B, Tk, H_kv, D), v (B, Tk, H_kv, Dv), and the rest of `kernels.attention`'s arguments.

    mask: the key of the predicate; mask_ints: the bands, then the mask's integers; mask_rows: its tensors (B,).
    softcap, dropout_p: 0 for none. seed: int64 (1,).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: str
    n_bands: int
    mask_ints: list[int]
    mask_rows: list[Tensor]
    segments_q: Tensor | None
    segments_k: Tensor | None
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: Tensor | None
    arch: str | None = None

    def __post_init__(self):
        self.q, self.k, self.v = within_reach(self.q), within_reach(self.k), within_reach(self.v)
        B, Tq, H, D = self.q.shape
        _, Tk, H_kv, Dv = self.v.shape
        self.B, self.H_kv = B, H_kv
        self.sizes = Sizes(Tq, Tk, H, H // H_kv, D, Dv)
        self.arch = self.arch or configs.architecture(self.q.device)

    def launch(self, kernel: Callable, name: str, n_rows: int, heads: int, rows_are_queries: bool, **args) -> Launch:
        """`kernel` with one program for each tile of n_rows rows of each head, and what all kernels take."""
        D, Dv = self.sizes.D, self.sizes.Dv
        config = configs.choose(self.arch, self.q.dtype, D, Dv, name)
        tiles = math.ceil(n_rows / (config.block_m if rows_are_queries else config.block_n))
        block_d, block_dv = configs.block_dim(D), configs.block_dim(Dv)
        operands = {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "q_strides": self.q.stride(),
            "k_strides": self.k.stride(),
            "v_strides": self.v.stride(),
            "sizes": self.sizes,
            "masking": self.masking(),
            "scoring": self.scoring(),
            "dropout": self.dropout(),
        }
        constants = {
            "PREDICATE": masks.predicate(self.mask).triton,
            "FOLD": self.folds(),
            "CHECK_D": block_d != D,
            "CHECK_DV": block_dv != Dv,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
        }
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return Launch(kernel, (tiles * heads * self.B,), {**operands, **args, **constants}, options)

    def masking(self) -> Masking:
        n = 7 * self.n_bands
        bands, ints = tuple(self.mask_ints[:n]), tuple(self.mask_ints[n:])
        return Masking(bands, ints, tuple(self.mask_rows), self.segments_q, self.segments_k)

    def folds(self) -> bool:
        """Whether the scale can wait for the exponent, one fused multiply-add: the maximum must commute with it."""
        return self.softcap == 0 and self.alibi_slopes is None and self.bias is None and self.scale > 0

    def scoring(self) -> Scoring:
        B, Tq, H, _ = self.q.shape
        bias, strides = None, ()
        if self.bias is not None:
            bias = self.bias.expand(B, H, Tq, self.sizes.Tk)
            strides = bias.stride()
        if self.softcap:
            return Scoring(self.scale / self.softcap, self.softcap * LOG2E, self.alibi_slopes, bias, strides)
        return Scoring(self.scale * LOG2E, None, self.alibi_slopes, bias, strides)

    def dropout(self) -> Dropout:
        if self.dropout_p == 0:
            return Dropout(None, 0, 1.0)
        return Dropout(self.seed, dropout_threshold(self.dropout_p), 1 / (1 - self.dropout_p))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

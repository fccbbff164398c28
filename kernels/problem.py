"""One attention call, ready to launch: operands, constants and tile sizes of a kernel."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import configs, mask
from kernels.arguments import in_float32
from kernels.attention_reference import dropout_threshold
from kernels.mask import REFERENCE
from kernels.operators import Call, DecodeCall
from kernels.tile_lists import tile_lists
from kernels.tiles import Dropout, Masking, Scoring, Sizes

LOG2E = math.log2(math.e)


class Launch(NamedTuple):
    """A kernel with its grid, arguments and compile-time options."""

    kernel: Callable
    grid: tuple[int]
    args: dict
    options: dict

    def run(self) -> None:
        if self.grid[0] > 0:
            self.kernel[self.grid](**self.args, **self.options)


def within_reach(x: Tensor) -> Tensor:
    """Return x (B, T, H, D), copied if its strides are so large that a tile would span 2^31 elements."""
    return x if max(x.stride(1), x.stride(3)) < 2**31 // configs.MAX_TILE_EXTENT else x.contiguous()


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """Describe x (B, T, H, D) to the copy engine as (B, H, T, D), in boxes of `rows` by `columns`; None if it cannot.

    The engine needs a base and strides that are multiples of 16 bytes, contiguous elements, and no empty or repeated
    axis (CUDA Driver API, cuTensorMapEncodeTiled). The axes of length 1 come first: dropping those costs nothing.
    """
    itemsize = x.element_size()
    # The stride of an axis of length 1 is never taken: any legal one will do.
    strides = [s if n > 1 else 16 for n, s in zip(x.shape, x.stride())]
    if x.stride(3) != 1 or x.data_ptr() % 16 or 0 in x.shape:
        return None
    if any(s <= 0 or s * itemsize % 16 or s * itemsize >= 2**40 for s in strides[:3]):
        return None
    B, T, H, D = x.shape
    return TensorDescriptor(x, [B, H, T, D], [strides[0], strides[2], strides[1], 1], [1, 1, rows, columns])


def descriptors(args: dict) -> dict:
    """Make descriptors for q, k, v and dout, without strides; none if the copy engine cannot read one of them."""
    boxes = {"q": ("BLOCK_M", "BLOCK_D"), "k": ("BLOCK_N", "BLOCK_D"), "v": ("BLOCK_N", "BLOCK_DV")}
    if "dout" in args:
        boxes["dout"] = "BLOCK_M", "BLOCK_DV"
    found = {name: descriptor(args[name], args[rows], args[columns]) for name, (rows, columns) in boxes.items()}
    return {} if None in found.values() else found | {f"{name}_strides": () for name in found}


def head_dim_constants(D: int, Dv: int) -> dict:
    """Return the sizes of tiles along the head dims, and whether these are smaller."""
    block_d, block_dv = configs.block_dim(D), configs.block_dim(Dv)
    return {"BLOCK_D": block_d, "BLOCK_DV": block_dv, "CHECK_D": block_d != D, "CHECK_DV": block_dv != Dv}


def masking_of(call: Call | DecodeCall, lists: tuple = (), segments: tuple = (None, None)) -> Masking:
    """Make a call's mask for the kernels: its bands, or instead of them lists of tiles."""
    rows = tuple(call.rows[n - REFERENCE] if n >= REFERENCE else None for n in call.bands)
    return Masking(
        bands=() if lists else tuple(0 if n >= REFERENCE else n for n in call.bands),
        band_rows=rows if not lists and any(row is not None for row in rows) else (),
        lists=lists,
        ints=mask.with_tables(call.ints, call.q.device),
        rows=tuple(call.rows),
        segments_q=segments[0],
        segments_k=segments[1],
    )


def scoring_of(call: Call | DecodeCall, unit: float = LOG2E) -> Scoring:
    """Make a call's scoring, without a bias; unit: LOG2E for logits in base 2, 1 for natural ones."""
    scale, softcap = call.scale * unit, None
    if call.softcap:
        scale, softcap = in_float32(call.scale / call.softcap), call.softcap * unit
    return Scoring(scale, softcap, call.alibi_slopes, None, None, ())


def folds(scoring: Scoring) -> bool:
    """Say whether the scale can wait for the exponent, as one fused multiply-add: it must commute with the maximum."""
    return scoring.softcap is None and scoring.alibi_slopes is None and scoring.bias is None and scoring.scale > 0


class Problem:
    """A call for one architecture: that of its tensors if None.

    shift: (B, H, Tq), float32, which the forward pass fills if there is a bias, and the backward pass reads.
    """

    def __init__(self, call: Call, arch: str | None = None, shift: Tensor | None = None):
        q, k, v = (within_reach(x) for x in call[:3])
        self.call = call._replace(q=q, k=k, v=v)
        B, Tq, H, D = q.shape
        _, Tk, H_kv, Dv = v.shape
        self.B, self.H_kv = B, H_kv
        self.sizes = Sizes(Tq, Tk, H, H // H_kv, D, Dv)
        self.arch = arch or configs.architecture(q.device)
        self.shift = self.empty(B, H, Tq, dtype=torch.float32) if shift is None and call.bias is not None else shift

    def launch(self, kernel: Callable, name: str, n_rows: int, heads: int, rows_are_queries: bool, **args) -> Launch:
        """Prepare `kernel`, with one program for each tile of n_rows rows of each head and the common arguments."""
        D, Dv = self.sizes.D, self.sizes.Dv
        config = configs.choose(self.arch, self.call.q.dtype, D, Dv, name)
        tiles = math.ceil(n_rows / (config.block_m if rows_are_queries else config.block_n))
        scoring = self.scoring()
        operands = dict(zip(("q", "k", "v"), self.call[:3]))
        operands |= {f"{name}_strides": x.stride() for name, x in operands.items()}
        operands |= {
            "sizes": self.sizes,
            "masking": self.masking(config.block_m, config.block_n, rows_are_queries),
            "scoring": scoring,
            "dropout": self.dropout(),
        }
        constants = {
            "PREDICATE": mask.predicate(self.call.key).triton,
            "FOLD": folds(scoring),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            **head_dim_constants(D, Dv),
        }
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        args = {**operands, **args, **constants}
        if config.tma:
            args |= descriptors(args)
        return Launch(kernel, (tiles * heads * self.B,), args, options)

    def masking(self, block_m: int, block_n: int, over_keys: bool) -> Masking:
        call, pattern = self.call, self.call.pattern()
        lists: tuple = ()
        if pattern.has_lists:
            found = tile_lists(pattern, self.sizes.Tq, self.sizes.Tk, block_m, block_n, over_keys, call.q.device)
            lists = found, found.stride(0) if found.shape[0] > 1 else 0, found.stride(1)
        return masking_of(call, lists, (call.segments_q, call.segments_k))

    def scoring(self) -> Scoring:
        if self.call.bias is None:
            return scoring_of(self.call)
        Tq, Tk, H = self.sizes[:3]
        bias = self.call.bias.expand(self.B, H, Tq, Tk)
        return scoring_of(self.call, 1.0)._replace(bias=bias, shift=self.shift, bias_strides=bias.stride())

    def dropout(self) -> Dropout:
        if self.call.dropout_p == 0:
            return Dropout(None, 0, 1.0)
        return Dropout(self.call.seed, dropout_threshold(self.call.dropout_p), 1 / (1 - self.call.dropout_p))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.call.q.dtype, device=self.call.q.device)

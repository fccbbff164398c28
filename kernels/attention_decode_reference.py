"""Decoding in plain PyTorch: append in place, gather pages, then attention over each sequence's own keys."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention_reference import attention_reference
from kernels.mask import STANDS_FOR, Band, Mask


class DecodeCall(NamedTuple):
    """One call as an operator gets it, which takes no objects: see `operators.Call` for the mask's fields.

    The rest as in `kernels.attention_decode`; softcap 0 for none.
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor
    k_new: Tensor | None
    v_new: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    block_table: Tensor | None
    mask: str
    n_bands: int
    indexed: bool
    mask_ints: list[int]
    mask_rows: list[Tensor]
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    bias = None  # what prepares a launch of `attention` asks for it


def attention_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, *, return_lse: bool = False, upcast: bool = True,
    **arguments,
):  # fmt: skip
    """The call of `kernels.attention_decode` by attention_reference.py, whose `upcast` it has. No gradients."""

    def attend(*tensors, **features):
        return attention_reference(*tensors, **features, upcast=upcast)

    return by_length(attend, q, k_cache, v_cache, cache_lens, return_lse=return_lse, **arguments)


@torch.no_grad()
def by_length(
    attend: Callable, q, k_cache, v_cache, cache_lens, *, k_new, v_new, rotary, mask: Mask, block_table, return_lse,
    **features,
):  # fmt: skip
    """Decode by `attend`, a function like `kernels.attention`: one call for each run of sequences of one length."""
    Tq, n_new = q.shape[1], 0 if k_new is None else q.shape[1]
    runs = list(_runs([n + n_new for n in cache_lens.tolist()]))
    if rotary is not None:
        positions = (cache_lens.long() + n_new)[:, None] + torch.arange(-Tq, 0, device=q.device)  # (B, Tq)
        q = rotated(q, positions, rotary)
        k_new = None if k_new is None else rotated(k_new, positions, rotary)
    if n_new:
        append(k_cache, k_new, cache_lens, runs, block_table)
        append(v_cache, v_new, cache_lens, runs, block_table)
    outs, lses = [], []
    for begin, end, total in runs:
        k, v = (gather(cache, block_table, begin, end, total) for cache in (k_cache, v_cache))
        own = of_rows(mask, begin, end)
        out = attend(q[begin:end], k, v, mask=own, return_lse=return_lse, **features)
        outs.append(out[0] if return_lse else out)
        lses.append(out[1] if return_lse else None)
    if len(outs) == 1:
        return (outs[0], lses[0]) if return_lse else outs[0]
    out = torch.cat(outs) if outs else q.new_empty(0, *q.shape[1:3], v_cache.shape[3])
    if return_lse:
        return out, torch.cat(lses) if lses else q.new_empty(0, q.shape[2], Tq, dtype=torch.float32)
    return out


def _runs(totals: list[int]) -> Iterator[tuple[int, int, int]]:
    """(begin, end, total) for neighbours of one length, whose keys are a view of the cache."""
    begin = 0
    for total, run in itertools.groupby(totals):
        end = begin + len(list(run))
        yield begin, end, total
        begin = end


def rotated(x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, H, D) turned by the tables' rows at positions (B, T), in float32; a position below 0 counts as 0."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (table[positions.clamp(min=0)].to(real).unsqueeze(2) for table in rotary)
    first, second = x.to(real).chunk(2, dim=-1)
    return (torch.cat((first, second), dim=-1) * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)


def append(cache: Tensor, new: Tensor, cache_lens: Tensor, runs: list, block_table: Tensor | None) -> None:
    """Write new (B, T, H_kv, D) behind the cache_lens (B,) tokens of each sequence; runs: see `_runs`, new included."""
    T = new.shape[1]
    if block_table is None:
        for begin, end, total in runs:
            cache[begin:end, total - T : total] = new[begin:end]
    else:
        page_size = cache.shape[1]
        positions = cache_lens.long()[:, None] + torch.arange(T, device=new.device)  # (B, T)
        pages = block_table.long().gather(1, positions // page_size)
        cache[pages, positions % page_size] = new


def gather(cache: Tensor, block_table: Tensor | None, begin: int, end: int, total: int) -> Tensor:
    """The first `total` tokens of sequences begin to end - 1: (end - begin, total, H_kv, D), a view if it can be."""
    if block_table is None:
        return cache[begin:end, :total]
    n_pages = -(-total // cache.shape[1])
    return cache[block_table[begin:end, :n_pages].long()].flatten(1, 2)[:, :total]


def of_rows(mask: Mask, begin: int, end: int) -> Mask:
    """The mask of rows begin to end - 1 of the batch."""
    if not mask.tensors:
        return mask
    return rebuilt(
        mask.key, len(mask.bands), mask.indexed, list(mask.operands), [tensor[begin:end] for tensor in mask.tensors]
    )


def rebuilt(key: str, n_bands: int, indexed: bool, ints: list[int], rows: list[Tensor]) -> Mask:
    """A mask from what an operator gets of it, enough for `kernels.attention` to go by."""
    numbers = [rows[n - STANDS_FOR] if n >= STANDS_FOR else n for n in ints[: 7 * n_bands]]
    mask = Mask.__new__(Mask)
    mask.key, mask.indexed, mask.operands, mask.tensors = key, indexed, tuple(ints), tuple(rows)
    mask.bands = tuple(Band(*numbers[7 * r : 7 * r + 7]) for r in range(n_bands))
    mask.ints = tuple(ints[7 * n_bands :])
    mask.shows_itself, mask.dense_cache = False, {}
    return mask

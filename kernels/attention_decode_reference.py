"""Decoding in plain PyTorch: append in place, gather pages, then attend over each sequence's own keys."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.attention_arguments import DecodeArguments
from kernels.attention_reference import attention_reference


def attention_decode_reference(call: DecodeArguments, upcast: bool = True):
    """Decode by attention_reference.py, whose `upcast` it has. No gradients."""
    return by_length(functools.partial(attention_reference, upcast=upcast), call)


@torch.no_grad()
def by_length(attend: Callable, call: DecodeArguments):
    """Decode by `attend`, a function like `kernels.attention`, called once for each run of sequences of one length."""
    q, k_cache, v_cache, cache_lens, k_new, v_new, rotary, mask, block_table, *features, return_lse = call
    features = dict(zip(("scale", "softcap", "alibi_slopes", "sinks"), features), return_lse=return_lse)
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
        out = attend(q[begin:end], k, v, mask=mask.of_rows(begin, end), **features)
        outs.append(out[0] if return_lse else out)
        lses.append(out[1] if return_lse else None)
    if len(outs) == 1:
        return (outs[0], lses[0]) if return_lse else outs[0]
    out = torch.cat(outs) if outs else q.new_empty(0, *q.shape[1:3], v_cache.shape[3])
    if return_lse:
        return out, torch.cat(lses) if lses else q.new_empty(0, q.shape[2], Tq, dtype=torch.float32)
    return out


def _runs(totals: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, end, total) for each run of sequences of one length: their keys are a view of the cache."""
    begin = 0
    for total, run in itertools.groupby(totals):
        end = begin + len(list(run))
        yield begin, end, total
        begin = end


def rotated(x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, T, H, D) by positions (B, T), in float32; a position below 0 counts as 0."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (table[positions.clamp(min=0)].to(real).unsqueeze(2) for table in rotary)
    first, second = x.to(real).chunk(2, dim=-1)
    return (torch.cat((first, second), dim=-1) * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)


def append(cache: Tensor, new: Tensor, cache_lens: Tensor, runs: list, block_table: Tensor | None) -> None:
    """Write new (B, T, H_kv, D) behind the cache_lens (B,) tokens of each sequence; runs, see `_runs`, include them."""
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
    """Return the first `total` tokens of sequences begin to end - 1: (sequences, total, H_kv, D); a view if it can."""
    if block_table is None:
        return cache[begin:end, :total]
    n_pages = -(-total // cache.shape[1])
    return cache[block_table[begin:end, :n_pages].long()].flatten(1, 2)[:, :total]

"""The arguments of `attention`, `attention_reference` and `attention_decode`, and their checks.

They run in every call, so they must take only microseconds. None reads the values of a tensor, which would wait for a
GPU; only `check_lengths`, for a CPU, does.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.arguments import as_floats, check_integer, check_number, check_real, check_switch, check_tensors, kind
from kernels.mask import FAR, Mask
from kernels.masks import CAUSAL

# Limits of scale and softcap: the kernels multiply them by log2(e) and divide one by the other, in float32.
LEAST, MOST = 1e-30, 1e30
BELOW_ONE = math.nextafter(1, 0)


class Arguments(NamedTuple):
    """The arguments of one call of `attention`, with their defaults."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask = CAUSAL
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None
    return_lse: bool = False

    @property
    def has_mask_only(self) -> bool:
        """Whether the call has no segments, no ALiBi and no bias."""
        return self.segment_ids is None and self.alibi_slopes is None and self.bias is None


class DecodeArguments(NamedTuple):
    """The arguments of one call of `attention_decode`, with their defaults."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    mask: Mask = CAUSAL
    block_table: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    return_lse: bool = False


def checked(call: Arguments) -> Arguments:
    """Raise TypeError or ValueError for an invalid call; return it with its numbers as floats: see `as_floats`."""
    q, k, v, *_ = call
    _check_qkv(q, k, v)
    B, Tq, H, _ = q.shape
    _check_common(q, call.mask, call.scale, call.softcap, call.alibi_slopes, call.sinks)
    if call.segment_ids is not None:
        _check_segments(call.segment_ids, q, k)
    if call.bias is not None:
        _check_bias(call.bias, q, (B, H, Tq, k.shape[1]))
    check_number("dropout_p", call.dropout_p, 0, BELOW_ONE, "a number from 0 to below 1")
    seed = call.seed
    if isinstance(seed, Tensor):
        check_tensors(seed=seed)
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed must be an int or a one-element int64 tensor, not {seed.dtype} of {tuple(seed.shape)}"
            )
        _check_devices(q, seed=seed)
    elif seed is not None:
        check_integer("seed", seed)
    check_switch("return_lse", call.return_lse)
    scale, softcap, dropout_p = as_floats(call.scale, call.softcap, call.dropout_p)
    return call._replace(scale=scale, softcap=softcap, dropout_p=dropout_p)


def check_dtypes(q, k, v) -> None:
    """Raise TypeError unless q, k and v are tensors with supported dtypes; autocast may still make these equal."""
    check_tensors(q=q, k=k, v=v)
    check_real(q=q, k=k, v=v)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_dtypes(q, k, v)
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must have the axes (B, T, H, D), not {q.ndim}, {k.ndim} and {v.ndim} axes")
    B, Tq, H, D = q.shape
    Bk, Tk, H_kv, Dk = k.shape
    Bv, Tv, Hv, _ = v.shape
    if not (Bk == B == Bv and Dk == D and Tv == Tk and Hv == H_kv):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: they must be (B, Tq, H, D), "
            "(B, Tk, H_kv, D) and (B, Tk, H_kv, Dv)"
        )
    _check_heads("q and k", H, H_kv, D)
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    _check_devices(q, k=k, v=v)
    if Tq >= FAR or Tk >= FAR:
        raise ValueError(f"the lengths of q and k must be below {FAR}, not {Tq} and {Tk}")


def _check_heads(names: str, H: int, H_kv: int, D: int) -> None:
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"{names}: {H} query heads and {H_kv} key heads: H must be a multiple of H_kv")
    if D == 0:
        raise ValueError(f"{names} have a last axis of 0: a head dim must be at least 1")


def _check_devices(q: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"all tensors must be on one device, not q on {q.device} and {name} on {x.device}")


def _check_common(q: Tensor, mask, scale, softcap, alibi_slopes, sinks) -> None:
    """Check the arguments that all three functions share."""
    B, _, H, _ = q.shape
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be one of kernels.masks, such as masks.CAUSAL, or masks.FULL to hide nothing, not "
            f"{kind(mask)}; to hide keys with a tensor, pass a bias of 0 and -inf"
        )
    for row in mask.tensors:
        if row.shape != (B,):
            raise ValueError(f"a mask's tensor must have one value for each of {B} rows, not shape {tuple(row.shape)}")
        _check_devices(q, mask=row)
    if scale is not None:
        check_number("scale", scale, -MOST, MOST, f"a number from -{MOST:g} to {MOST:g}, or None")
    if softcap is not None:
        check_number("softcap", softcap, LEAST, MOST, f"a positive number, {LEAST:g} to {MOST:g}, or None")
    for name, per_head in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if per_head is not None:
            check_tensors(**{name: per_head})
            check_real(**{name: per_head})
            if per_head.shape != (H,):
                raise ValueError(f"{name} must have one value for each of {H} heads, not shape {tuple(per_head.shape)}")
            _check_devices(q, **{name: per_head})


def _check_int32(name: str, x, shape: tuple[int, ...]) -> None:
    check_tensors(**{name: x})
    if x.shape != shape or x.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 of shape {shape}, not {x.dtype} of {tuple(x.shape)}")


def _check_segments(segment_ids, q: Tensor, k: Tensor) -> None:
    B, Tq, Tk = q.shape[0], q.shape[1], k.shape[1]
    is_pair = isinstance(segment_ids, tuple)
    if is_pair and len(segment_ids) != 2:
        raise ValueError(f"segment_ids must be a tensor or a pair (queries, keys), not a tuple of {len(segment_ids)}")
    if not is_pair and Tq != Tk:
        raise ValueError(f"with Tq {Tq} and Tk {Tk}, segment_ids must be a pair, for queries and for keys")
    for ids, T in zip(segment_ids if is_pair else (segment_ids,), (Tq, Tk)):
        _check_int32("segment_ids", ids, (B, T))
        _check_devices(q, segment_ids=ids)


def _check_bias(bias, q: Tensor, full: tuple[int, int, int, int]) -> None:
    check_tensors(bias=bias)
    if bias.dtype == torch.bool:
        raise TypeError(
            "bias is added to the scores, so it must be a float tensor, not torch.bool: to hide keys, pass a mask "
            "(kernels.masks), or a bias of 0 and -inf: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)"
        )
    check_real(bias=bias)
    if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], full[::-1])):
        raise ValueError(f"bias of shape {tuple(bias.shape)} does not broadcast to {full}")
    _check_devices(q, bias=bias)


def check_decode(call: DecodeArguments) -> None:
    """Raise TypeError or ValueError for an invalid call of `attention_decode`; `check_lengths` reads the lengths."""
    q, k_cache, v_cache, cache_lens, k_new, v_new, rotary, mask, block_table, *features, return_lse = call
    new = {} if k_new is None else {"k_new": k_new, "v_new": v_new}
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new must be passed together: one of them is None")
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, cache_lens=cache_lens, **new)
    check_real(q=q, k_cache=k_cache, v_cache=v_cache, **new)
    _check_cache(q, k_cache, v_cache, block_table)
    B, Tq, _, D = q.shape
    H_kv, Dv = v_cache.shape[2:]
    _check_int32("cache_lens", cache_lens, (B,))
    if new and (k_new.shape != (B, Tq, H_kv, D) or v_new.shape != (B, Tq, H_kv, Dv)):
        raise ValueError(
            f"k_new must be {(B, Tq, H_kv, D)} and v_new {(B, Tq, H_kv, Dv)} for this q and cache, not "
            f"{tuple(k_new.shape)} and {tuple(v_new.shape)}"
        )
    dtypes = {x.dtype for x in (q, k_cache, v_cache, *new.values())}
    if len(dtypes) > 1:
        names = ", ".join(["q", "k_cache", "v_cache", *new])
        raise TypeError(f"{names} must have one dtype, not {', '.join(sorted(map(str, dtypes)))}")
    if rotary is not None:
        _check_rotary(rotary, q)
    _check_devices(q, k_cache=k_cache, v_cache=v_cache, cache_lens=cache_lens, block_table=block_table, **new)
    _check_common(q, mask, *features)
    check_switch("return_lse", return_lse)


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table) -> None:
    if not (q.ndim == k_cache.ndim == v_cache.ndim == 4):
        raise ValueError(f"q, k_cache and v_cache must have four axes, not {q.ndim}, {k_cache.ndim} and {v_cache.ndim}")
    B, Tq, H, D = q.shape
    n, capacity, H_kv, Dk = k_cache.shape
    if Dk != D or v_cache.shape[:3] != k_cache.shape[:3] or (block_table is None and n != B):
        raise ValueError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} do not fit: they "
            "must be (B, Tq, H, D), (B, capacity, H_kv, D) and (B, capacity, H_kv, Dv), or with a block_table "
            "(n_pages, page_size, H_kv, D) and (n_pages, page_size, H_kv, Dv)"
        )
    _check_heads("q and k_cache", H, H_kv, D)
    if block_table is not None:
        check_tensors(block_table=block_table)
        if block_table.ndim != 2 or block_table.shape[0] != B or block_table.dtype != torch.int32:
            raise ValueError(
                f"block_table must be int32 of shape ({B}, max_pages), not {block_table.dtype} of "
                f"{tuple(block_table.shape)}"
            )
        if capacity == 0 or capacity % 16:
            raise ValueError(f"a page of k_cache and v_cache must hold a multiple of 16 tokens, not {capacity}")
        capacity *= block_table.shape[1]
    if capacity >= FAR or Tq >= FAR:
        raise ValueError(f"the lengths of q and k_cache must be below {FAR}, not {Tq} and {capacity}")


def _check_rotary(rotary, q: Tensor) -> None:
    if not isinstance(rotary, tuple):
        raise TypeError(f"rotary must be a tuple (cos, sin) of two tables, not {kind(rotary)}")
    if len(rotary) != 2:
        raise ValueError(f"rotary must be two tables (cos, sin), not a tuple of {len(rotary)}")
    D = q.shape[3]
    for table in rotary:
        check_tensors(rotary=table)
        check_real(rotary=table)
        _check_devices(q, rotary=table)
    cos, sin = rotary
    if D % 2 or cos.ndim != 2 or cos.shape != sin.shape or cos.shape[0] == 0 or cos.shape[1] != D:
        raise ValueError(
            f"rotary must be two tables (positions, {D}), D even, not {tuple(cos.shape)}, {tuple(sin.shape)}"
        )


def check_lengths(k_cache, cache_lens, n_new: int, block_table, rotary) -> None:
    """Raise ValueError for lengths and pages outside the cache."""
    n_pages, length = k_cache.shape[:2]
    capacity = length if block_table is None else length * block_table.shape[1]
    lens = cache_lens.tolist()
    if not lens:
        return
    if min(lens) < 0 or max(lens) + n_new > capacity:
        raise ValueError(
            f"cache_lens {min(lens)} to {max(lens)} and {n_new} new tokens do not fit a capacity of {capacity}"
        )
    if rotary is not None and max(lens) + n_new > rotary[0].shape[0]:
        raise ValueError(f"rotary has {rotary[0].shape[0]} positions, but a sequence has {max(lens) + n_new} tokens")
    for b, n in enumerate(lens if block_table is not None else ()):
        pages = block_table[b, : -(-(n + n_new) // length)].tolist()
        if any(not 0 <= page < n_pages for page in pages):
            raise ValueError(f"block_table names pages {pages} for sequence {b}, but pages are 0 to {n_pages - 1}")

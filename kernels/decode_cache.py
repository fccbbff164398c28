"""Device functions for the cache of keys and values: addresses, loads, rotation, appending."""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.tiles import load_inside, narrow

# New tokens written to the cache at a time.
APPENDED = tl.constexpr(16)


class Cache(NamedTuple):
    """Keys and values (B, capacity, H_kv, D), or pages (n_pages, PAGE, H_kv, D) with a table (B, max_pages)."""

    k: object
    v: object
    k_strides: tuple
    v_strides: tuple
    table: object
    table_stride: int
    # Triton 3.6 loses the constants, such as strides of 1, of a nested tuple unless the outer one ends in a constant.
    end: None = None


class New(NamedTuple):
    """New keys and values (B, Tq, H_kv, D) to append, or None."""

    k: object
    v: object
    k_strides: tuple
    v_strides: tuple
    end: None = None


class Rotary(NamedTuple):
    """Rotary tables (n_rows, D), contiguous, or None."""

    cos: object
    sin: object
    n_rows: int


@triton.jit
def load_rows(rows, stride, inside, n_cols, COLS: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """Load a tile whose rows begin at the pointers `rows`; rows not `inside` and columns from n_cols on read as 0."""
    cols = tl.arange(0, COLS)
    pointers = rows[:, None] + cols[None, :].to(tl.int64) * stride
    return load_inside(pointers, inside, cols < n_cols, CHECK_ROWS, CHECK_COLS)


@triton.jit
def load_rotated(rows, stride, inside, position, rotary, D, COLS: tl.constexpr):
    """Load rows like load_rows and rotate them by `position`: x * cos + (x with its halves swapped) * sin."""
    cols = tl.arange(0, COLS)[None, :]
    swapped = tl.where(cols < D // 2, cols + D // 2, cols - D // 2)
    seen = inside[:, None] & (cols < D)
    x = tl.load(rows[:, None] + cols.to(tl.int64) * stride, mask=seen, other=0.0)
    y = tl.load(rows[:, None] + swapped.to(tl.int64) * stride, mask=seen, other=0.0)
    at = tl.minimum(tl.maximum(position, 0), rotary.n_rows - 1)[:, None].to(tl.int64) * D + cols
    cos = tl.load(rotary.cos + at, mask=seen, other=0.0).to(tl.float32)
    sin = tl.load(rotary.sin + at, mask=seen, other=0.0).to(tl.float32)
    return narrow(x.to(tl.float32) * cos + y.to(tl.float32) * sin, x.dtype)


@triton.jit
def cache_rows(base, strides, cache, b, h_kv, keys, inside, PAGE: tl.constexpr):
    """Return pointers to the keys of sequence b; only those `inside` are looked up in the page table."""
    base += h_kv.to(tl.int64) * strides[2]
    if PAGE == 0:
        return base + b.to(tl.int64) * strides[0] + keys.to(tl.int64) * strides[1]
    else:
        table = cache.table + b.to(tl.int64) * cache.table_stride
        page = tl.load(table + keys // PAGE, mask=inside, other=0)
        return base + page.to(tl.int64) * strides[0] + (keys % PAGE).to(tl.int64) * strides[1]


@triton.jit
def new_keys(new, rotary, b, h_kv, i, inside, position, D, CHECK_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the new keys i, rotated if there are tables."""
    rows = new.k + b.to(tl.int64) * new.k_strides[0] + h_kv.to(tl.int64) * new.k_strides[2]
    rows += i.to(tl.int64) * new.k_strides[1]
    if rotary.cos is not None:
        return load_rotated(rows, new.k_strides[3], inside, position, rotary, D, BLOCK_D)
    else:
        return load_rows(rows, new.k_strides[3], inside, D, BLOCK_D, True, CHECK_D)


@triton.jit
def new_values(new, b, h_kv, i, inside, Dv, CHECK_DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    rows = new.v + b.to(tl.int64) * new.v_strides[0] + h_kv.to(tl.int64) * new.v_strides[2]
    return load_rows(rows + i.to(tl.int64) * new.v_strides[1], new.v_strides[3], inside, Dv, BLOCK_DV, True, CHECK_DV)


@triton.jit
def append(cache, new, rotary, b, h_kv, cached, sizes, CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr,
            PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Write the new keys and values of one head to the cache, up to its capacity. This launch does not read them."""
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    for start in range(0, sizes.Tq, APPENDED):
        i = start + tl.arange(0, APPENDED)
        keys = cached + i
        inside = (i < sizes.Tq) & (keys < sizes.Tk)
        k = new_keys(new, rotary, b, h_kv, i, inside, keys, sizes.D, CHECK_D, BLOCK_D)
        v = new_values(new, b, h_kv, i, inside, sizes.Dv, CHECK_DV, BLOCK_DV)
        k_rows = cache_rows(cache.k, cache.k_strides, cache, b, h_kv, keys, inside, PAGE)[:, None]
        v_rows = cache_rows(cache.v, cache.v_strides, cache, b, h_kv, keys, inside, PAGE)[:, None]
        tl.store(k_rows + d.to(tl.int64) * cache.k_strides[3], k, mask=inside[:, None] & (d < sizes.D))
        tl.store(v_rows + dv.to(tl.int64) * cache.v_strides[3], v, mask=inside[:, None] & (dv < sizes.Dv))

"""Device functions that the attention kernels share: which tiles to visit, loads, scores, dropout bits.

Query i is at position i + Tk - Tq, key j at position j. Tile n of keys holds the keys n * BLOCK_N to
(n + 1) * BLOCK_N - 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels import dispatch, mask

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)
BAND = tl.constexpr(mask.BAND)
LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum starts here, so that differences of maxima are never -inf - -inf = NaN.
FLOOR = tl.constexpr(-3.0e38)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite bias
COARSE = tl.constexpr(2.0**29)  # as in kernels/bias.py


class Sizes(NamedTuple):
    """Lengths, heads (H query heads, GROUP of them for each key head) and head dims."""

    Tq: int
    Tk: int
    H: int
    GROUP: int
    D: int
    Dv: int


class Masking(NamedTuple):
    """A mask's operands; its predicate is a constant of the kernel.

    bands       the numbers of each `mask.Band`
    band_rows   (), or for each number of bands a tensor (B,) to read instead, or None
    lists       (), or instead of bands the result of tile_lists.tile_lists with its strides along batch and rows
    ints, rows  the predicate's integers and tables, and its tensors (B,)
    segments_q, segments_k  (B, Tq) and (B, Tk), contiguous, or None
    """

    bands: tuple
    band_rows: tuple
    lists: tuple
    ints: tuple
    rows: tuple
    segments_q: object
    segments_k: object


class Scoring(NamedTuple):
    """How dot products become logits. A None is compiled away.

    logit = dot * scale, or softcap * tanh(dot * scale), then alibi_slopes (H,), in base 2: the factor log2(e) is in
    scale, or in softcap if there is one. With a bias (strides b, h, q, k), the factor comes last. The forward pass
    subtracts shift (B, H, Tq) from each row of the bias.
    """

    scale: float
    softcap: float | None
    alibi_slopes: object
    bias: object
    shift: object
    bias_strides: tuple  # last: triton 3.6 misreads a tuple in a tuple that a tensor follows


class Dropout(NamedTuple):
    """seed: int64 (1,), None for no dropout; an entry below threshold, of 32 bits, is dropped; scale: 1 / (1 - p)."""

    seed: object
    threshold: int
    scale: float


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in float32. The interpreter would multiply bfloat16 as raw integers, so widen it there."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round x (float32) to the dtype of an input, to nearest. The interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def head(x, strides, b, h):
    """Return the (T, D) matrix of head h of row b of x (B, T, H, D), for load_tile.

    x is a pointer or, if strides is (), a descriptor of problem.descriptor.
    """
    if len(strides) == 0:
        return x, tl.cast(b, tl.int32), tl.cast(h, tl.int32)
    else:
        return x + b * strides[0] + h * strides[2]


@triton.jit
def load_tile(base, strides, first, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr,
              CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):  # fmt: skip
    """Load rows first to first + ROWS - 1 of a (T, D) matrix from head(), with strides strides[1] and strides[3].

    Elements outside (n_rows, n_cols) are not touched and read as 0. Only the step to the first row needs 64 bits. With
    a descriptor, the copy engine (TMA, sm_90 and later) finds addresses and edges.
    """
    if len(strides) == 0:
        return base[0].load([base[1], base[2], first, 0]).reshape(ROWS, COLS)
    else:
        return _load_by_pointers(base, strides, first, n_rows, n_cols, ROWS, COLS, CHECK_ROWS, CHECK_COLS)


@triton.jit
def _load_by_pointers(base, strides, first, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr,
                      CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    start = base + tl.cast(first, tl.int64) * strides[1]
    pointers = start + rows[:, None] * strides[1] + cols[None, :] * strides[3]
    return load_inside(pointers, first + rows < n_rows, cols < n_cols, CHECK_ROWS, CHECK_COLS)


@triton.jit
def load_inside(pointers, rows_inside, cols_inside, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """Load a tile; rows and columns that are checked and not inside read as 0."""
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(pointers, mask=rows_inside[:, None] & cols_inside[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=rows_inside[:, None], other=0.0)
    elif CHECK_COLS:
        return tl.load(pointers, mask=cols_inside[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(base, strides, tile, first, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store the part of a tile inside (n_rows, n_cols), in the output's dtype."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    start = base + tl.cast(first, tl.int64) * strides[1]
    pointers = start + rows[:, None] * strides[1] + cols[None, :] * strides[3]
    inside = (first + rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def _span(bands, r: tl.constexpr, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr):
    """Return the tiles of band r: begin, full_begin, full_end, end; tiles full_begin to full_end - 1 lie inside it.

    `first`, `last`: the positions of this program's rows. OVER_KEYS: rows are queries, and the tiles hold keys;
    otherwise rows are keys, and the tiles hold queries.
    """
    least = bands[BAND * r]
    most = bands[BAND * r + 1]
    is_exact = bands[BAND * r + 6]
    if OVER_KEYS:
        near, far, shift, total = -most, -least, 0, sizes.Tk
        begin, end = bands[BAND * r + 2], bands[BAND * r + 3]
        own_begin, own_end = bands[BAND * r + 4], bands[BAND * r + 5]
    else:
        near, far, shift, total = least, most, sizes.Tk - sizes.Tq, sizes.Tq
        begin, end = bands[BAND * r + 4], bands[BAND * r + 5]
        own_begin, own_end = bands[BAND * r + 2], bands[BAND * r + 3]
    is_within = (own_begin <= first) & (last < own_end) & (is_exact != 0)
    full_begin = tl.maximum(tl.maximum(begin, last + near) - shift, 0)
    full_end = tl.minimum(tl.minimum(end, first + far + 1) - shift, total)
    first = tl.maximum(first, own_begin)
    last = tl.minimum(last, own_end - 1)
    begin = tl.maximum(tl.maximum(begin, first + near) - shift, 0)
    end = tl.minimum(tl.minimum(end, last + far + 1) - shift, total)
    # From indices to tiles; an empty range ends where it begins.
    end = tl.where((first <= last) & (begin < end), (end + BLOCK - 1) // BLOCK, 0)
    begin = tl.minimum(begin // BLOCK, end)
    full_begin = tl.minimum((full_begin + BLOCK - 1) // BLOCK, end)
    full_end = tl.minimum(tl.where(is_within, tl.maximum(full_end, 0) // BLOCK, 0), end)
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def _bands_of_row(masking, b):
    """Return the numbers of the bands for row b of the batch."""
    if len(masking.band_rows) == 0:
        return masking.bands
    else:
        bands = ()
        for i in tl.static_range(len(masking.bands)):
            if masking.band_rows[i] is None:
                bands += (masking.bands[i],)
            else:
                bands += (tl.load(masking.band_rows[i] + b),)
        return bands


@triton.jit
def _visits_by_bands(bands, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr):
    """Return the spans of all bands, in order and without overlap."""
    spans = ()
    for r in tl.static_range(len(bands) // BAND):
        spans += _span(bands, r, first, last, sizes, BLOCK, OVER_KEYS)
    if len(bands) == BAND:
        return spans
    disjoint = ()
    done = 0  # tiles before this one are in a span
    for _ in tl.static_range(len(bands) // BAND):
        # Of the spans that reach further, take the first to begin, and of these the one with the longest full part.
        begin, full_begin, full_end, end = done, done, done, done
        found = False
        for r in tl.static_range(len(bands) // BAND):
            begin_r = tl.maximum(spans[4 * r], done)
            end_r = spans[4 * r + 3]
            full_end_r = spans[4 * r + 2]
            is_first = (begin_r < begin) | ((begin_r == begin) & (full_end_r > full_end))
            is_better = (begin_r < end_r) & ((found == 0) | is_first)
            begin = tl.where(is_better, begin_r, begin)
            full_begin = tl.where(is_better, spans[4 * r + 1], full_begin)
            full_end = tl.where(is_better, full_end_r, full_end)
            end = tl.where(is_better, end_r, end)
            found = found | is_better
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.maximum(full_end, full_begin)
        disjoint += (begin, full_begin, full_end, end)
        done = tl.maximum(done, end)
    return disjoint


@triton.jit
def visits(masking, b, row, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr):
    """Return the tiles to visit for tile `row` of the rows, at positions first to last, each once.

    The result is a flat tuple for the four functions below: with lists (number of full tiles, of partial tiles, the
    list), else (begin, full_begin, full_end, end) for each band, ascending and disjoint; tiles from full_begin to
    full_end - 1 need no predicate.
    """
    if len(masking.lists) > 0:
        tiles = masking.lists[0] + tl.cast(b, tl.int64) * masking.lists[1] + tl.cast(row, tl.int64) * masking.lists[2]
        return tl.load(tiles), tl.load(tiles + 1), tiles + 2
    else:  # needed: Triton compiles the code after an if even if that returned
        return _visits_by_bands(_bands_of_row(masking, b), first, last, sizes, BLOCK, OVER_KEYS)


@triton.jit
def count_full(spans):
    """Count the tiles that need no predicate."""
    if len(spans) == 3:
        n = spans[0]
    else:
        n = spans[2] - spans[1]
        for r in tl.static_range(1, len(spans) // 4):
            n += spans[4 * r + 2] - spans[4 * r + 1]
    return n


@triton.jit
def count_partial(spans):
    """Count the tiles that need the predicate."""
    if len(spans) == 3:
        n = spans[1]
    else:
        n = spans[3] - spans[0] - count_full(spans)
        for r in tl.static_range(1, len(spans) // 4):
            n += spans[4 * r + 3] - spans[4 * r]
    return n


@triton.jit
def full_tile(spans, i):
    """Return the i-th tile that needs no predicate."""
    if len(spans) == 3:
        tile = tl.load(spans[2] + i)
    else:
        tile = spans[1] + i
        for r in tl.static_range(1, len(spans) // 4):
            i -= spans[4 * r - 2] - spans[4 * r - 3]
            tile = tl.where(i >= 0, spans[4 * r + 1] + i, tile)
    return tile


@triton.jit
def partial_tile(spans, i):
    """Return the i-th tile that needs the predicate: left of the first full part, right of it, left of the second..."""
    if len(spans) == 3:
        tile = tl.load(spans[2] + spans[0] + i)
    else:
        tile = spans[0] + i
        for r in tl.static_range(len(spans) // 4):
            if r > 0:
                i -= spans[4 * r - 1] - spans[4 * r - 2]
                tile = tl.where(i >= 0, spans[4 * r] + i, tile)
            i -= spans[4 * r + 1] - spans[4 * r]
            tile = tl.where(i >= 0, spans[4 * r + 2] + i, tile)
    return tile


@triton.jit
def visible(masking, b, q, k, q_index, k_index, sizes, PREDICATE: tl.constexpr):
    """Return which pairs of a tile the mask shows. q, k (positions), q_index and k_index broadcast to the tile."""
    params = masking.ints
    for r in tl.static_range(len(masking.rows)):
        params += (tl.load(masking.rows[r] + b),)
    seen = PREDICATE(q, k, params) & (k_index < sizes.Tk)
    if masking.segments_q is not None:
        row = tl.cast(b, tl.int64)
        ids_q = tl.load(masking.segments_q + row * sizes.Tq + q_index, mask=q_index < sizes.Tq, other=0)
        ids_k = tl.load(masking.segments_k + row * sizes.Tk + k_index, mask=k_index < sizes.Tk, other=0)
        seen = seen & (ids_q == ids_k)
    return seen


@triton.jit
def tanh(x):
    """Compute the hyperbolic tangent in float32, near 0 too to about one rounding step of x, by a series."""
    x2 = x * x
    series = -0.05396825396825397 + x2 * (0.021869488536155203 - x2 * 0.008863235529902197)
    series = x + x * x2 * (-0.3333333333333333 + x2 * (0.13333333333333333 + x2 * series))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def logits(s, scoring, h, q, k):
    """Turn dot products s into logits in base 2, natural ones if a bias follows; also return softcap's derivative."""
    slope = 1.0
    s = s * scoring.scale
    if scoring.softcap is not None:
        t = tanh(s)
        slope = 1.0 - t * t
        s = t * scoring.softcap
    if scoring.alibi_slopes is not None:
        per_position = tl.load(scoring.alibi_slopes + h).to(tl.float32)
        if scoring.bias is None:
            per_position *= LOG2E
        s -= per_position * tl.abs(q - k).to(tl.float32)
    return s, slope


@triton.jit
def load_bias(scoring, b, h, q_index, k_index, sizes):
    """Load a tile of the bias in float32."""
    stride_b, stride_h, stride_q, stride_k = scoring.bias_strides
    base = scoring.bias + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    pointers = base + tl.cast(q_index, tl.int64) * stride_q + tl.cast(k_index, tl.int64) * stride_k
    return tl.load(pointers, mask=(q_index < sizes.Tq) & (k_index < sizes.Tk), other=0.0).to(tl.float32)


@triton.jit
def add_bias(s, bias, shift):
    """Return s + bias - shift in base 2, with s rounded as s + bias in float64 would round it: see kernels/bias.py."""
    power = (shift.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |shift|
    rounder = tl.where(power < COARSE, 0.0, power * (1.5 / COARSE))
    return (s + rounder - rounder + (bias - shift)) * LOG2E


@triton.jit
def in_base_2(sink):
    """Return a sink's logit in base 2, finite unless the sink is -inf."""
    return tl.where(sink == float("-inf"), sink, tl.minimum(tl.maximum(sink * LOG2E, FLOOR), -FLOOR))


@triton.jit
def natural_lse(m_i, l_i, sink):
    """Return natural lse from maximum and sum in base 2. If the sink (or None) is the maximum, it is not rounded."""
    lse = (m_i + tl.log2(l_i)) / LOG2E
    if sink is not None:
        lse = tl.where(m_i == in_base_2(sink), sink + tl.log2(l_i) / LOG2E, lse)
    return lse


@triton.jit
def _mix(x):
    """Mix the bits of 32-bit words by a bijection, as attention_reference._mix does."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def dropout_keep(dropout, b, h, q_index, k_index):
    """Return which entries of a tile survive dropout, as attention_reference.dropout_keep does."""
    seed = tl.load(dropout.seed)
    b = tl.cast(b, tl.uint32)
    h = tl.cast(h, tl.uint32)
    i = q_index.to(tl.uint32)
    low = _mix(_mix(_mix(_mix(tl.cast(seed & 0xFFFFFFFF, tl.uint32)) ^ b) ^ h) ^ i)
    high = _mix(_mix(_mix(_mix(tl.cast((seed >> 32) & 0xFFFFFFFF, tl.uint32) ^ low) ^ i) ^ h) ^ b)
    bits = _mix(_mix(k_index.to(tl.uint32) ^ low) ^ high)
    return bits >= tl.cast(dropout.threshold, tl.uint32)

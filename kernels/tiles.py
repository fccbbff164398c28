"""What the attention kernels share, as device functions: which tiles to visit, loads, scores, dropout bits.

Positions and indices: query i is at position i + Tk - Tq, key j at position j. A tile is a number: tile n of keys
holds the keys n * BLOCK_N to (n + 1) * BLOCK_N - 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels import dispatch, mask

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)
BAND = tl.constexpr(mask.BAND)
LOG2E = tl.constexpr(1.4426950408889634)
# The running maximum starts here, not at -inf, so that differences of maxima are never NaN.
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
    """A mask's operands, beside its predicate, which is a constant of the kernel.

    bands: the numbers of each `mask.Band`; band_rows: (), or as many tensors (B,) to read instead, or None each;
    lists: (), or what tile_lists.py gives, with how far apart its batches and rows lie, instead of bands; ints: the
    mask's integers and tables; rows: its tensors (B,); segments_q (B, Tq) and segments_k (B, Tk): contiguous, or both
    None.
    """

    bands: tuple
    band_rows: tuple
    lists: tuple
    ints: tuple
    rows: tuple
    segments_q: object
    segments_k: object


class Scoring(NamedTuple):
    """How dot products become logits. What is None is compiled away.

    logit = dot * scale, or softcap * tanh(dot * scale), then alibi_slopes (H,), in base 2: the factor log2(e) is in
    scale, or in softcap where there is one. With a bias, which lies bias_strides (b, h, q, k) elements apart, that
    factor comes last. shift (B, H, Tq): what the forward pass takes off each row of the bias.
    """

    scale: float
    softcap: float | None
    alibi_slopes: object
    bias: object
    shift: object
    bias_strides: tuple  # last: triton 3.6 misreads a tuple in a tuple that a tensor follows


class Dropout(NamedTuple):
    """seed: int64 (1,), or None for no dropout; below threshold of 32 bits an entry is dropped; scale: 1 / (1 - p)."""

    seed: object
    threshold: int
    scale: float


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32. The interpreter would multiply bfloat16 as raw integers, so there it is widened."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x (float32) in the dtype of an input, rounded to nearest. The interpreter would cut bfloat16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def head(x, strides, b, h):
    """The (T, D) matrix of head h of row b of x (B, T, H, D), as load_tile takes it.

    x is a pointer, or, where strides is (), a descriptor as problem.descriptor makes them.
    """
    if len(strides) == 0:
        return x, tl.cast(b, tl.int32), tl.cast(h, tl.int32)
    else:
        return x + b * strides[0] + h * strides[2]


@triton.jit
def load_tile(base, strides, first, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr,
              CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):  # fmt: skip
    """Rows first to first + ROWS - 1 of a (T, D) matrix whose axes lie strides[1] and strides[3] elements apart.

    What lies outside (n_rows, n_cols) is never touched and reads as 0. The one long step is taken in 64 bits.
    base is head()'s; with a descriptor the copy engine itself (TMA, sm_90 and later) finds addresses and edges.
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
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(pointers, mask=(first + rows < n_rows)[:, None] & (cols < n_cols)[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=(first + rows < n_rows)[:, None], other=0.0)
    elif CHECK_COLS:
        return tl.load(pointers, mask=(cols < n_cols)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(base, strides, tile, first, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Write a tile where it lies within (n_rows, n_cols), in the output's dtype."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    start = base + tl.cast(first, tl.int64) * strides[1]
    pointers = start + rows[:, None] * strides[1] + cols[None, :] * strides[3]
    inside = (first + rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def _span(bands, r: tl.constexpr, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr):
    """The tiles that band r asks for: begin, full_begin, full_end, end; those from full_begin on are wholly in it.

    `first`, `last`: the positions of the rows of this program. OVER_KEYS: they are queries, and the tiles hold keys;
    otherwise they are keys, and the tiles hold queries.
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
    # From indices to tiles; what is empty ends where it begins.
    end = tl.where((first <= last) & (begin < end), (end + BLOCK - 1) // BLOCK, 0)
    begin = tl.minimum(begin // BLOCK, end)
    full_begin = tl.minimum((full_begin + BLOCK - 1) // BLOCK, end)
    full_end = tl.minimum(tl.where(is_within, tl.maximum(full_end, 0) // BLOCK, 0), end)
    return begin, full_begin, tl.maximum(full_end, full_begin), end


@triton.jit
def _bands_of_row(masking, b):
    """The bands' numbers, those of row b of the batch where they differ from row to row."""
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
    """The spans of all bands, put in order and cut so that no two share a tile."""
    spans = ()
    for r in tl.static_range(len(bands) // BAND):
        spans += _span(bands, r, first, last, sizes, BLOCK, OVER_KEYS)
    if len(bands) == BAND:
        return spans
    disjoint = ()
    done = 0  # all tiles before this one are taken care of
    for _ in tl.static_range(len(bands) // BAND):
        # Of the spans that reach further, the one that begins first; of those, the one with the longest full part.
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
    """The tiles to visit for tile `row` of the rows, at positions first to last, each once.

    Returns a flat tuple for the four functions below: (full tiles, partial tiles, the list) where there are lists, else
    four tiles (begin, full_begin, full_end, end) for each band, in ascending order and disjoint: tiles from full_begin
    to full_end - 1 need no predicate.
    """
    if len(masking.lists) > 0:
        tiles = masking.lists[0] + tl.cast(b, tl.int64) * masking.lists[1] + tl.cast(row, tl.int64) * masking.lists[2]
        return tl.load(tiles), tl.load(tiles + 1), tiles + 2
    else:  # Triton compiles the code after an if, return or not
        return _visits_by_bands(_bands_of_row(masking, b), first, last, sizes, BLOCK, OVER_KEYS)


@triton.jit
def count_full(spans):
    """How many tiles need no predicate."""
    if len(spans) == 3:
        n = spans[0]
    else:
        n = spans[2] - spans[1]
        for r in tl.static_range(1, len(spans) // 4):
            n += spans[4 * r + 2] - spans[4 * r + 1]
    return n


@triton.jit
def count_partial(spans):
    """How many tiles need the predicate."""
    if len(spans) == 3:
        n = spans[1]
    else:
        n = spans[3] - spans[0] - count_full(spans)
        for r in tl.static_range(1, len(spans) // 4):
            n += spans[4 * r + 3] - spans[4 * r]
    return n


@triton.jit
def full_tile(spans, i):
    """The i-th tile that needs no predicate."""
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
    """The i-th tile that needs the predicate: left of the first full part, right of it, left of the second, ..."""
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
    """Which pairs of a tile take part. q, k: positions that broadcast to the tile; q_index, k_index: indices alike."""
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
    """Hyperbolic tangent in float32, to about one rounding step of x near 0 as well (a series there)."""
    x2 = x * x
    series = -0.05396825396825397 + x2 * (0.021869488536155203 - x2 * 0.008863235529902197)
    series = x + x * x2 * (-0.3333333333333333 + x2 * (0.13333333333333333 + x2 * series))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def logits(s, scoring, h, q, k):
    """From dot products s to logits in base 2, or natural ones that wait for a bias; the derivative of softcap."""
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
    """A tile of the bias in float32."""
    stride_b, stride_h, stride_q, stride_k = scoring.bias_strides
    base = scoring.bias + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
    pointers = base + tl.cast(q_index, tl.int64) * stride_q + tl.cast(k_index, tl.int64) * stride_k
    return tl.load(pointers, mask=(q_index < sizes.Tq) & (k_index < sizes.Tk), other=0.0).to(tl.float32)


@triton.jit
def add_bias(s, bias, shift):
    """s + bias - shift in base 2, s rounded to what float64 would keep of s + bias: see kernels/bias.py."""
    power = (shift.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, at most |shift|
    rounder = tl.where(power < COARSE, 0.0, power * (1.5 / COARSE))
    return (s + rounder - rounder + (bias - shift)) * LOG2E


@triton.jit
def in_base_2(sink):
    """A sink's logit in base 2, finite unless it is -inf."""
    return tl.where(sink == float("-inf"), sink, tl.minimum(tl.maximum(sink * LOG2E, FLOOR), -FLOOR))


@triton.jit
def natural_lse(m_i, l_i, sink):
    """lse from the maximum and the sum in base 2. A sink (None without) that is the maximum itself is not rounded."""
    lse = (m_i + tl.log2(l_i)) / LOG2E
    if sink is not None:
        lse = tl.where(m_i == in_base_2(sink), sink + tl.log2(l_i) / LOG2E, lse)
    return lse


@triton.jit
def _mix(x):
    """A bijection of 32-bit words that avalanches; the same as attention_reference._mix."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def dropout_keep(dropout, b, h, q_index, k_index):
    """Which entries of a tile survive dropout; the same function as attention_reference.dropout_keep."""
    seed = tl.load(dropout.seed)
    b = tl.cast(b, tl.uint32)
    h = tl.cast(h, tl.uint32)
    i = q_index.to(tl.uint32)
    low = _mix(_mix(_mix(_mix(tl.cast(seed & 0xFFFFFFFF, tl.uint32)) ^ b) ^ h) ^ i)
    high = _mix(_mix(_mix(_mix(tl.cast((seed >> 32) & 0xFFFFFFFF, tl.uint32) ^ low) ^ i) ^ h) ^ b)
    bits = _mix(_mix(k_index.to(tl.uint32) ^ low) ^ high)
    return bits >= tl.cast(dropout.threshold, tl.uint32)

"""Decoding in Triton: a few queries of each sequence against its long cache of keys and values.

The first kernel has one program for each split of SPLIT keys (Flash-Decoding,
https://pytorch.org/blog/flash-decoding/). It attends to them with FlashAttention-2's online softmax
(https://arxiv.org/abs/2307.08691) for all query heads of a key head, and stores its sum, maximum and denominator in
float32. The second kernel combines the splits in order. Batch, lengths and device do not change the size of a split, so
a sequence always gets the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import configs, mask
from kernels.attention_forward import softmax_step
from kernels.decode_cache import Cache, New, Rotary, append, cache_rows, load_rotated, load_rows, new_keys, new_values
from kernels.mask import bands_of
from kernels.operators import DecodeCall
from kernels.problem import Launch, Problem, folds, head_dim_constants, masking_of, scoring_of, within_reach
from kernels.tiles import (
    FLOOR,
    Sizes,
    count_full,
    count_partial,
    dot,
    full_tile,
    in_base_2,
    narrow,
    natural_lse,
    partial_tile,
    visits,
)

# Keys of a split. Not tuned by timing: 64 KiB of keys and values in 16 bits at D = 64.
SPLIT = 256
# Splits that the combining kernel takes at a time.
BLOCK_S = 32


@triton.jit
def _tile(acc, l_i, m_i, q, n, b, h_kv, h, q_position, cached, cache, new, rotary, sizes, masking, scoring,
          PREDICATE: tl.constexpr, MASKED: tl.constexpr, HAS_NEW: tl.constexpr, FOLD: tl.constexpr,
          CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Update (acc, l_i, m_i) with one tile of keys. sizes.Tk: the sequence's length."""
    keys = n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cache = keys < cached
    is_new = (keys >= cached) & (keys < sizes.Tk)
    rows = cache_rows(cache.k, cache.k_strides, cache, b, h_kv, keys, in_cache, PAGE)
    k = load_rows(rows, cache.k_strides[3], in_cache, sizes.D, BLOCK_D, MASKED, CHECK_D)
    if MASKED and HAS_NEW:
        # Another program writes them to the cache, perhaps later.
        fresh = new_keys(new, rotary, b, h_kv, keys - cached, is_new, keys, sizes.D, CHECK_D, BLOCK_D)
        k = tl.where(is_new[:, None], fresh, k)
    p, alpha, l_i, m_i, _ = softmax_step(q, k, l_i, m_i, 0.0, b, h, q_position, keys[None, :], q_position, sizes,
                                         masking, scoring, PREDICATE, MASKED, FOLD)  # fmt: skip
    rows = cache_rows(cache.v, cache.v_strides, cache, b, h_kv, keys, in_cache, PAGE)
    v = load_rows(rows, cache.v_strides[3], in_cache, sizes.Dv, BLOCK_DV, MASKED, CHECK_DV)
    if MASKED and HAS_NEW:
        fresh = new_values(new, b, h_kv, keys - cached, is_new, sizes.Dv, CHECK_DV, BLOCK_DV)
        v = tl.where(is_new[:, None], fresh, v)
    acc = dot(narrow(p, v.dtype), v, acc * alpha[:, None])
    return acc, l_i, m_i


@triton.jit
def _lengths(cache_lens, b, sizes, HAS_NEW: tl.constexpr):
    """Return sequence b's tokens in the cache and in all, limited to the cache even if the given length is wrong."""
    cached = tl.minimum(tl.maximum(tl.load(cache_lens + b), 0), sizes.Tk)
    if HAS_NEW:
        total = tl.minimum(cached + sizes.Tq, sizes.Tk)
    else:
        total = cached
    return cached, total


@triton.jit
def _spans(masking, b, m, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the tiles of keys for tile m of the rows: see `tiles.visits`. Row r is query r // GROUP."""
    first = m * BLOCK_M // sizes.GROUP
    last = tl.minimum((m * BLOCK_M + BLOCK_M - 1) // sizes.GROUP, sizes.Tq - 1)
    shift = sizes.Tk - sizes.Tq
    return visits(masking, b, m, first + shift, last + shift, sizes, BLOCK_N, True)


@triton.jit
def _splits(spans, TILES: tl.constexpr):
    """Return the splits of TILES tiles that spans touch: (begin, end) for each span, without those of earlier spans."""
    found = ()
    done = 0
    for r in tl.static_range(len(spans) // 4):
        begin = tl.maximum(spans[4 * r] // TILES, done)
        end = tl.maximum((spans[4 * r + 3] + TILES - 1) // TILES, begin)
        end = tl.where(spans[4 * r] < spans[4 * r + 3], end, begin)
        found += (begin, end)
        done = tl.where(begin < end, end, done)
    return found


@triton.jit
def _count_splits(splits):
    n = splits[1] - splits[0]
    for r in tl.static_range(1, len(splits) // 2):
        n += splits[2 * r + 1] - splits[2 * r]
    return n


@triton.jit
def _nth_split(splits, i):
    split = splits[0] + i
    for r in tl.static_range(1, len(splits) // 2):
        i -= splits[2 * r - 1] - splits[2 * r - 2]
        split = tl.where(i >= 0, splits[2 * r] + i, split)
    return split


@triton.jit
def _within(spans, begin, end, cached_end):
    """Clip spans to tiles begin to end - 1, with no full tile from cached_end on."""
    clipped = ()
    for r in tl.static_range(len(spans) // 4):
        full_begin = tl.minimum(tl.maximum(spans[4 * r + 1], begin), end)
        full_end = tl.minimum(tl.minimum(tl.maximum(spans[4 * r + 2], begin), end), cached_end)
        clipped += (
            tl.minimum(tl.maximum(spans[4 * r], begin), end),
            full_begin,
            tl.maximum(full_begin, full_end),
            tl.minimum(tl.maximum(spans[4 * r + 3], begin), end),
        )
    return clipped


@triton.jit
def decode_kernel(q, cache, new, rotary, cache_lens, counts, partial, maxima, sums, q_strides, sizes, n_slots, masking,
                  scoring, PREDICATE: tl.constexpr, HAS_NEW: tl.constexpr, FOLD: tl.constexpr, CHECK_D: tl.constexpr,
                  CHECK_DV: tl.constexpr, PAGE: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Fill partial (B, H_kv, n_slots, Tq * GROUP, Dv), and maxima and sums without Dv. sizes.Tk: the cache's capacity.

    Slot i is the i-th split that a tile of rows needs under its mask and length. counts (B, tiles of rows) gets their
    number; later slots are not written. One additional slot appends the new tokens.
    """
    H_kv = sizes.H // sizes.GROUP
    n_rows = sizes.Tq * sizes.GROUP
    tiles_m = tl.cdiv(n_rows, BLOCK_M)
    n_programs = n_slots + HAS_NEW
    h_kv = tl.program_id(0) % H_kv
    m = tl.program_id(0) // H_kv % tiles_m
    slot = tl.program_id(0) // H_kv // tiles_m % n_programs
    b = tl.program_id(0) // H_kv // tiles_m // n_programs
    cached, total = _lengths(cache_lens, b, sizes, HAS_NEW)
    if HAS_NEW:
        appends = (slot == n_slots) & (m == 0)
        if appends:
            append(cache, new, rotary, b, h_kv, cached, sizes, CHECK_D, CHECK_DV, PAGE, BLOCK_D, BLOCK_DV)

    own = Sizes(sizes.Tq, total, sizes.H, sizes.GROUP, sizes.D, sizes.Dv)
    spans = _spans(masking, b, m, own, BLOCK_M, BLOCK_N)
    splits = _splits(spans, TILES)
    n_splits = tl.minimum(_count_splits(splits), n_slots)
    if (slot == 0) & (h_kv == 0):
        tl.store(counts + b * tiles_m + m, n_splits)
    if slot < n_splits:
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < n_rows
        head = h_kv * sizes.GROUP + row % sizes.GROUP
        position = row // sizes.GROUP + (total - sizes.Tq)
        q_rows = q + b.to(tl.int64) * q_strides[0] + head.to(tl.int64) * q_strides[2]
        q_rows += (row // sizes.GROUP).to(tl.int64) * q_strides[1]
        if rotary.cos is not None:
            q_tile = load_rotated(q_rows, q_strides[3], inside, position, rotary, sizes.D, BLOCK_D)
        else:
            q_tile = load_rows(q_rows, q_strides[3], inside, sizes.D, BLOCK_D, True, CHECK_D)

        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        m_i = tl.full((BLOCK_M,), FLOOR, tl.float32)
        begin = _nth_split(splits, slot) * TILES
        mine = _within(spans, begin, begin + TILES, cached // BLOCK_N)
        h = head[:, None]
        q_position = position[:, None]
        for i in range(count_full(mine)):
            acc, l_i, m_i = _tile(acc, l_i, m_i, q_tile, full_tile(mine, i), b, h_kv, h, q_position, cached, cache,
                                  new, rotary, own, masking, scoring, PREDICATE, False, HAS_NEW, FOLD, CHECK_D,
                                  CHECK_DV, PAGE, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
        # One or two tiles, perhaps of new keys: not worth pipelined loads.
        for i in tl.range(count_partial(mine), num_stages=1):
            acc, l_i, m_i = _tile(acc, l_i, m_i, q_tile, partial_tile(mine, i), b, h_kv, h, q_position, cached, cache,
                                  new, rotary, own, masking, scoring, PREDICATE, True, HAS_NEW, FOLD, CHECK_D,
                                  CHECK_DV, PAGE, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip

        at = ((b.to(tl.int64) * H_kv + h_kv) * n_slots + slot) * n_rows + row
        cols = tl.arange(0, BLOCK_DV)[None, :]
        tl.store(maxima + at, m_i, mask=inside)
        tl.store(sums + at, l_i, mask=inside)
        tl.store(partial + at[:, None] * sizes.Dv + cols, acc, mask=inside[:, None] & (cols < sizes.Dv))


@triton.jit
def combine_kernel(counts, partial, maxima, sums, sinks, out, lse, sizes, n_slots, BLOCK_M: tl.constexpr,
                   BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute out (B, Tq, H, Dv) and lse (B, H, Tq), contiguous: one program combines a query's splits for one head."""
    n_rows = sizes.Tq * sizes.GROUP
    H_kv = sizes.H // sizes.GROUP
    row = tl.program_id(0) % n_rows
    h_kv = tl.program_id(0) // n_rows % H_kv
    b = (tl.program_id(0) // n_rows // H_kv).to(tl.int64)
    t = row // sizes.GROUP
    h = h_kv * sizes.GROUP + row % sizes.GROUP
    # With n_slots 0, counts are not written.
    n = tl.minimum(tl.load(counts + b * tl.cdiv(n_rows, BLOCK_M) + row // BLOCK_M), n_slots)

    cols = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    l_i = 0.0
    m_i = FLOOR
    sink = None
    if sinks is not None:
        # Start as if a key with the sink's logit and a value of zero had been seen.
        sink = tl.load(sinks + h).to(tl.float32)
        m_i = tl.maximum(m_i, in_base_2(sink))
        l_i = tl.exp2(in_base_2(sink) - m_i)
    for start in range(0, n, BLOCK_S):
        slots = start + tl.arange(0, BLOCK_S)
        inside = slots < n
        at = ((b * H_kv + h_kv) * n_slots + slots) * n_rows + row
        maxima_s = tl.load(maxima + at, mask=inside, other=FLOOR)
        sums_s = tl.load(sums + at, mask=inside, other=0.0)
        seen = inside[:, None] & (cols < sizes.Dv)[None, :]
        partial_s = tl.load(partial + at[:, None] * sizes.Dv + cols[None, :], mask=seen, other=0.0)
        m_new = tl.maximum(m_i, tl.max(maxima_s, 0))
        weight = tl.exp2(maxima_s - m_new)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(sums_s * weight, 0)
        acc = acc * alpha + tl.sum(partial_s * weight[:, None], 0)
        m_i = m_new

    # A query that saw no key has l_i = 0: its output is 0 and its lse -inf.
    is_empty = l_i == 0
    l_i = tl.where(is_empty, 1.0, l_i)
    out_row = out + ((b * sizes.Tq + t) * sizes.H + h) * sizes.Dv
    tl.store(out_row + cols, narrow(acc / l_i, out.dtype.element_ty), mask=cols < sizes.Dv)
    natural = tl.where(is_empty, float("-inf"), natural_lse(m_i, l_i, sink))
    tl.store(lse + (b * sizes.H + h) * sizes.Tq + t, natural)


class DecodeProblem(Problem):
    """A call of attention_decode for one architecture: that of its tensors if None."""

    def __init__(self, call: DecodeCall, arch: str | None = None):
        self.call = call._replace(q=within_reach(call.q), cache_lens=call.cache_lens.contiguous())
        self.B, Tq, H, D = call.q.shape
        _, length, self.H_kv, Dv = call.v_cache.shape
        self.page = 0 if call.block_table is None else length
        capacity = length if call.block_table is None else call.block_table.shape[1] * length
        self.sizes = Sizes(Tq, capacity, H, H // self.H_kv, D, Dv)
        self.arch = arch or configs.architecture(call.q.device)
        self.config = configs.choose(self.arch, call.q.dtype, D, Dv, "decode")
        self.n_rows = Tq * self.sizes.GROUP
        self.block_m = min(self.config.block_m, configs.block_dim(self.n_rows))
        self.tiles_m = math.ceil(self.n_rows / self.block_m)
        self.n_slots = self._most_splits()
        self.has_new = call.k_new is not None

    def _most_splits(self) -> int:
        """Return how many splits a tile of rows may need at any length, by the capacity and the mask's bands."""
        capacity, most_splits = self.sizes.Tk, 0
        for band in bands_of(self.call.bands, self.call.rows):
            if not band.is_fixed():
                return math.ceil(capacity / SPLIT)
            least, most, begin, end = band[:4]
            begin, end = max(begin, 0), min(end, capacity)
            along = math.ceil(end / SPLIT) - begin // SPLIT if begin < end else 0
            across = math.ceil((most - least + self.sizes.Tq - 1) / SPLIT) + 1 if least <= most else 0
            most_splits += min(along, across)
        return min(most_splits, math.ceil(capacity / SPLIT))

    def scratch(self) -> dict:
        """Allocate what the splits leave for the combining kernel, with the other arguments of both kernels."""
        shape = self.B, self.H_kv, self.n_slots, self.n_rows
        counts = self.call.q.new_empty(self.B, self.tiles_m, dtype=torch.int32)
        partial = self.empty(*shape, self.sizes.Dv, dtype=torch.float32)
        maxima, sums = (self.empty(*shape, dtype=torch.float32) for _ in range(2))
        scratch = {"counts": counts, "partial": partial, "maxima": maxima, "sums": sums, "sizes": self.sizes}
        block_dv = configs.block_dim(self.sizes.Dv)
        return scratch | {"n_slots": self.n_slots, "BLOCK_M": self.block_m, "BLOCK_DV": block_dv}


def decode_launch(problem: DecodeProblem, scratch: dict) -> Launch:
    """Prepare the launch that attends to the splits and appends the new tokens."""
    call, config = problem.call, problem.config
    table, cos, sin = (None if x is None else x.contiguous() for x in (call.block_table, call.cos, call.sin))
    k_strides, v_strides = call.k_cache.stride(), call.v_cache.stride()
    cache = Cache(call.k_cache, call.v_cache, k_strides, v_strides, table, 0 if table is None else table.stride(0))
    new, scoring = New(None, None, (), ()), scoring_of(call)
    if problem.has_new:
        new = New(call.k_new, call.v_new, call.k_new.stride(), call.v_new.stride())
    rotary = Rotary(cos, sin, 0 if cos is None else cos.shape[0])
    args = {"q": call.q, "cache": cache, "new": new, "rotary": rotary, "cache_lens": call.cache_lens}
    # Bands for every mask: lists of tiles would need the lengths, which only the device knows.
    args |= {"q_strides": call.q.stride(), "masking": masking_of(call), "scoring": scoring}
    args |= {"PREDICATE": mask.predicate(call.key).triton, "HAS_NEW": problem.has_new, "FOLD": folds(scoring)}
    args |= {"PAGE": problem.page, "TILES": SPLIT // config.block_n, "BLOCK_N": config.block_n}
    args |= head_dim_constants(*problem.sizes[4:])
    grid = (problem.B * problem.H_kv * problem.tiles_m * (problem.n_slots + problem.has_new),)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(decode_kernel, grid, {**args, **scratch}, options)


def combine_launch(problem: DecodeProblem, scratch: dict, out: Tensor, lse: Tensor) -> Launch:
    """Prepare the launch that combines the splits."""
    args = {"sinks": problem.call.sinks, "out": out, "lse": lse, "BLOCK_S": BLOCK_S}
    grid = (problem.B * problem.H_kv * problem.n_rows,)
    return Launch(combine_kernel, grid, {**args, **scratch}, {"num_warps": 4})


def decode(problem: DecodeProblem) -> tuple[Tensor, Tensor]:
    """Return out (B, Tq, H, Dv) in q's dtype and lse (B, H, Tq) in float32; append the new tokens to the cache."""
    Tq, _, H, _, _, Dv = problem.sizes
    scratch = problem.scratch()
    out, lse = problem.empty(problem.B, Tq, H, Dv), problem.empty(problem.B, H, Tq, dtype=torch.float32)
    decode_launch(problem, scratch).run()
    combine_launch(problem, scratch, out, lse).run()
    return out, lse

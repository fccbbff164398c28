"""Every attention mask by name: a predicate in plain operators, and the tiles it needs. mask.py puts them together.

A mask says which keys a query may attend to. It is written once, as a function of positions, and the same function
runs inside the Triton kernels, in the PyTorch reference and in the picture of the mask::

    def dilated_window(q, k, window, step):        # q, k: positions; True = may attend
        return (q >= k) & (q - k < window) & ((q - k) % step == 0)

    mask = Mask(dilated_window, 64, 2, bands=[Band(least=0, most=63, exact=False)])

Query i of Tq stands at position i + Tk - Tq, key j at position j: queries line up with the last keys. A position may
therefore be negative, and a mask may leave a query without any key.

**Tiles.** A mask also tells which tiles of the (query, key) plane hold a True, as a short list of `Band`s whose union
covers every True. A band is a strip along the diagonal cut by a range of keys and a range of queries, so it says the
same thing of rows (for the forward pass and dQ) and of columns (for dK and dV). The `&` of two masks intersects their
bands and `|` joins the lists; both are arithmetic on integers, done once when the mask is built. What bands cannot say
(random blocks, layouts, strides) is found out by evaluating the predicate, once for each length and tile size, which
gives lists of tiles: see tile_lists.py.
"""

import functools
import itertools
from collections.abc import Iterable

import torch

from kernels.mask import FAR, MAX_BANDS, Band, Constant, Mask, Table, lookup

# A table is kept as long as the process lives.
MAX_TABLE = 1 << 24


def everything(q, k):
    return q == q


def causal(q, k):
    return q >= k


def within_window(q, k, window):
    return (q >= k) & (q - k < window)


def is_sink_token(q, k, n):
    return k < n


FULL = Mask(everything, bands=[Band(exact=True)])
"""Every query attends to every key."""

CAUSAL = Mask(causal, bands=[Band(least=0, exact=True)])
"""A query attends to its own position and those before it."""


@functools.lru_cache(maxsize=256)
def sliding_window(window: int) -> Mask:
    """The last `window` keys, the query's own position included (Longformer, https://arxiv.org/abs/2004.05150)."""
    if window < 1:
        raise ValueError(f"window {window} shows a query nothing: 1 (the query itself) is the least")
    return Mask(within_window, window, bands=[Band(least=0, most=window - 1, exact=True)])


@functools.lru_cache(maxsize=256)
def sink_tokens(n: int) -> Mask:
    """The first `n` keys, for every query, even one before them (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Meant for composition: `CAUSAL & (sliding_window(256) | sink_tokens(4))`.
    """
    if n < 0:
        raise ValueError(f"sink_tokens takes 0 or more, not {n}")
    return Mask(is_sink_token, n, bands=[Band(k_end=n, exact=True)])


def is_prefix(q, k, length):
    return k < length


def prefix(lengths: torch.Tensor) -> Mask:
    """The first keys of each row of the batch, for every query: lengths (B,) int32, on the device of the queries.

    `CAUSAL | prefix(lengths)` is the mask of a prefix language model (https://arxiv.org/abs/1910.10683).
    """
    return Mask(is_prefix, lengths, bands=[Band(k_end=lengths, exact=True)])


def is_global(q, k, table):
    return (lookup(table, q) != 0) | (lookup(table, k) != 0)


def global_tokens(positions: Iterable[int]) -> Mask:
    """Tokens that all others attend to and that attend to all others (Longformer, https://arxiv.org/abs/2004.05150).

    Meant for composition: `CAUSAL & (sliding_window(256) | global_tokens([0, 77]))`.
    """
    positions = sorted({int(n) for n in positions})
    if positions and not 0 <= positions[0] <= positions[-1] < MAX_TABLE:
        raise ValueError(
            f"global_tokens takes positions from 0 to {MAX_TABLE - 1}, not {positions[0]}..{positions[-1]}"
        )
    bands: list[Band] | None = []
    for _, run in itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        run = [position for _, position in run]
        begin, end = run[0], run[-1] + 1
        bands += [Band(k_begin=begin, k_end=end, exact=True), Band(q_begin=begin, q_end=end, exact=True)]
    marks = [0] * (positions[-1] + 1 if positions else 0)
    for n in positions:
        marks[n] = 1
    return Mask(is_global, Table(marks), bands=bands if len(bands) <= MAX_BANDS else None)


def is_strided(q, k, stride):
    return (q - k) % stride == 0


@functools.lru_cache(maxsize=256)
def strided(stride: int) -> Mask:
    """Keys a multiple of `stride` away, before and after (Sparse Transformers, https://arxiv.org/abs/1904.10509).

    Meant for composition: `sliding_window(512) & strided(4)` is a dilated window, `CAUSAL & (sliding_window(128) |
    strided(128))` the strided pattern of that paper.
    """
    if stride < 1:
        raise ValueError(f"strided takes 1 or more, not {stride}")
    return Mask(is_strided, stride, bands=[Band(exact=True)] if stride == 1 else None)


def is_random_block(q, k, block, random, share, seed):
    # The blocks up to the query's own, n of them, are dealt into `random` shares in turn: `size` of them fall to this
    # one, and a hash of (seed, n) draws one of those. It depends on no length, and all but the last line on q alone.
    n = q * (q >= 0) // block + 1
    size = (n - 1 - share + random) // random
    size = size - (size - 65535) * (size > 65535)
    x = n * 0x2545F491 + seed
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    drawn = share + random * (((x >> 17) & 0x7FFF) * size >> 15)
    drawn = (drawn + 1) * ((q >= 0) & (drawn < n)) - 1
    return k // block == drawn


@functools.lru_cache(maxsize=256)
def random_blocks(random: int, seed: int, block: int = 64) -> Mask:
    """For each block of queries `random` of the blocks of keys up to it, drawn by `seed`; all, while there are fewer.

    Which ones depends on (seed, the block of queries) alone, so that a longer sequence does not change them.
    """
    if random < 0 or block < 1:
        raise ValueError(f"random_blocks takes 0 or more blocks of 1 or more keys, not {random} of {block}")
    bands = [Band(least=1 - block, q_begin=0)]
    mask = sink_tokens(0)
    for share in range(random):
        constants = (Constant(n) for n in (block, random, share))
        # Each share draws by a seed of its own, below what a mask's integers may be.
        own_seed = (seed * 0x9E3779B1 + share * 0x5BD1E995) % FAR
        one = Mask(is_random_block, *constants, own_seed, bands=bands, indexed=True)
        mask = one if share == 0 else mask | one
    return mask


@functools.lru_cache(maxsize=256)
def bigbird(window: int, global_: int, random: int, seed: int, block: int = 64) -> Mask:
    """BigBird for a decoder: window, global tokens and random blocks, all causal (https://arxiv.org/abs/2007.14062).

    The last `window` keys (the query's own included), the first `global_` ones, and `random_blocks` of `block` keys.
    """
    return CAUSAL & (sliding_window(window) | sink_tokens(global_) | random_blocks(random, seed, block))


def is_in_layout(q, k, block, n_rows, n_columns, layout):
    row = q * (q >= 0) // block
    column = k // block
    inside = (q >= 0) & (row < n_rows) & (column < n_columns)
    return inside & (lookup(layout, row * n_columns + column) != 0)


def block_sparse(layout: torch.Tensor, block: int) -> Mask:
    """Blocks of `block` queries by `block` keys: layout (rows, columns), not 0 where the queries of a row of blocks, by
    their positions, see the keys of a column. What lies outside the layout is not seen.
    """
    if layout.ndim != 2 or layout.numel() > MAX_TABLE or block < 1:
        raise ValueError(
            f"layout is a matrix of {MAX_TABLE} blocks at most, not {tuple(layout.shape)}, of {block} keys"
        )
    n_rows, n_columns = layout.shape
    table = Table((layout != 0).flatten().int().tolist())
    return Mask(is_in_layout, block, n_rows, n_columns, table)


def segment_ids(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Segment ids (1, T) int32 of documents packed end to end in one row.

    cu_seqlens (n + 1,): where each document begins and the last one ends, as in [0, 30, 31, 70]. What lies behind the
    last document, the padding, is a segment of its own.
    """
    positions = torch.arange(T, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    return torch.searchsorted(ends, positions, right=True).to(torch.int32)[None]

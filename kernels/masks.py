"""Every attention mask by name: a predicate in plain operators, and the tiles it needs. mask.py puts them together.

A mask says which keys a query may attend to. It is written once, as a function of positions, and the same function
runs inside the Triton kernels, in the PyTorch reference and in the picture of the mask::

    def dilated_window(q, k, window, step):        # q, k: positions; True = may attend
        return (q >= k) & (q - k < window) & ((q - k) % step == 0)

    mask = Mask(dilated_window, 64, 2, bands=[Band(least=0, most=63, exact=False)])

Query i of Tq is at position i + Tk - Tq, key j at position j: queries line up with the last keys. A position may
therefore be negative, and a mask may leave a query without any key.

**Tiles.** A mask also tells which tiles of the (query, key) plane hold a True, as a short list of `Band`s whose union
covers every True. A band is a strip along the diagonal cut by a range of keys and a range of queries, so it says the
same thing of rows (for the forward pass and dQ) and of columns (for dK and dV). The `&` of two masks intersects their
bands and `|` joins the lists; both are arithmetic on integers, done once when the mask is built. What bands cannot say
(random blocks, layouts, strides) is found out by evaluating the predicate, once for each length and tile size, which
gives lists of tiles: see tile_lists.py.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable

import torch

from kernels.arguments import check_integer, check_tensors, kind
from kernels.mask import FAR, MAX_BANDS, Band, Constant, Mask, Table, lookup

# A table is kept as long as the process lives.
MAX_TABLE = 1 << 24
# A predicate holds each share's text.
MAX_RANDOM = 100


def _of_integers(**least: int | None) -> Callable:
    """Check the integers of a function that builds a mask, from `least` (None: any) to FAR, and keep what it builds."""

    def decorate(build: Callable[..., Mask]) -> Callable[..., Mask]:
        signature = inspect.signature(build)
        kept = functools.lru_cache(maxsize=256)(build)

        @functools.wraps(build)
        def checked(*args, **options) -> Mask:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if least[name] is None:
                    check_integer(name, value)
                else:
                    check_integer(name, value, least[name], FAR, f"{least[name]} or more, and {FAR} at most")
            return kept(*map(int, bound.args))

        return checked

    return decorate


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


@_of_integers(window=1)
def sliding_window(window: int) -> Mask:
    """The last `window` keys, the query's own position included (Longformer, https://arxiv.org/abs/2004.05150)."""
    return Mask(within_window, window, bands=[Band(least=0, most=window - 1, exact=True)])


@_of_integers(n=0)
def sink_tokens(n: int) -> Mask:
    """The first `n` keys, for every query, even one before them (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Meant for composition: `CAUSAL & (sliding_window(256) | sink_tokens(4))`.
    """
    return Mask(is_sink_token, n, bands=[Band(k_end=n, exact=True)])


def is_prefix(q, k, length):
    return k < length


def prefix(lengths: torch.Tensor) -> Mask:
    """The first keys of each row of the batch, for every query: lengths (B,) int32, on the device of the queries.

    `CAUSAL | prefix(lengths)` is the mask of a prefix language model (https://arxiv.org/abs/1910.10683).
    """
    check_tensors(lengths=lengths)
    if lengths.dtype != torch.int32 or lengths.ndim != 1:
        raise TypeError(f"lengths is int32 of shape (B,), not {lengths.dtype} of {tuple(lengths.shape)}")
    return Mask(is_prefix, lengths, bands=[Band(k_end=lengths, exact=True)])


def is_global(q, k, table):
    return (lookup(table, q) != 0) | (lookup(table, k) != 0)


def global_tokens(positions: Iterable[int]) -> Mask:
    """Tokens that all others attend to and that attend to all others (Longformer, https://arxiv.org/abs/2004.05150).

    Meant for composition: `CAUSAL & (sliding_window(256) | global_tokens([0, 77]))`.
    """
    positions = _positions(positions)
    bands: list[Band] | None = []
    for _, run in itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        run = [position for _, position in run]
        begin, end = run[0], run[-1] + 1
        bands += [Band(k_begin=begin, k_end=end, exact=True), Band(q_begin=begin, q_end=end, exact=True)]
    marks = [0] * (positions[-1] + 1 if positions else 0)
    for n in positions:
        marks[n] = 1
    return Mask(is_global, Table(marks), bands=bands if len(bands) <= MAX_BANDS else None)


def _positions(positions: Iterable[int]) -> list[int]:
    """The positions in order, each once."""
    if isinstance(positions, str | bytes | dict) or not isinstance(positions, Iterable):
        raise TypeError(f"positions are integers in a list, a set or a tensor, not {kind(positions)}")
    if isinstance(positions, torch.Tensor):
        positions = _values("positions", positions, 1)
    found = set()
    for n in positions:
        check_integer("each of positions", n, 0, MAX_TABLE - 1, f"from 0 to {MAX_TABLE - 1}")
        found.add(int(n))
    return sorted(found)


def _values(name: str, x: torch.Tensor, ndim: int) -> list:
    """What a tensor of `ndim` axes holds; it may have to come from a GPU."""
    check_tensors(**{name: x})
    if x.ndim != ndim:
        raise ValueError(f"{name} has {ndim} axes, not shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{name} is a tensor with values, not one on the device meta")
    return x.tolist()


def is_strided(q, k, stride):
    return (q - k) % stride == 0


@_of_integers(stride=1)
def strided(stride: int) -> Mask:
    """Keys a multiple of `stride` away, before and after (Sparse Transformers, https://arxiv.org/abs/1904.10509).

    Meant for composition: `sliding_window(512) & strided(4)` is a dilated window, `CAUSAL & (sliding_window(128) |
    strided(128))` the strided pattern of that paper.
    """
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


@_of_integers(random=0, seed=None, block=1)
def random_blocks(random: int, seed: int, block: int = 64) -> Mask:
    """For each block of queries `random` of the blocks of keys up to it, drawn by `seed`; all, while there are fewer.

    Which ones depends on (seed, the block of queries) alone, so that a longer sequence does not change them.
    """
    if random > MAX_RANDOM:
        raise ValueError(f"random is {MAX_RANDOM} blocks at most, not {random}: block_sparse takes a layout of any")
    bands = [Band(least=1 - block, q_begin=0)]
    mask = sink_tokens(0)
    for share in range(random):
        constants = (Constant(n) for n in (block, random, share))
        # Each share draws by a seed of its own, below what a mask's integers may be.
        own_seed = (seed * 0x9E3779B1 + share * 0x5BD1E995) % FAR
        one = Mask(is_random_block, *constants, own_seed, bands=bands, indexed=True)
        mask = one if share == 0 else mask | one
    return mask


@_of_integers(window=1, global_=0, random=0, seed=None, block=1)
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
    check_tensors(layout=layout)
    if layout.numel() > MAX_TABLE:
        raise ValueError(f"layout is a matrix of {MAX_TABLE} blocks at most, not {tuple(layout.shape)}")
    check_integer("block", block, 1, FAR, f"1 or more, and {FAR} at most")
    rows = _values("layout", layout != 0, 2)
    table = Table(int(shows) for row in rows for shows in row)
    return Mask(is_in_layout, int(block), *layout.shape, table)


def segment_ids(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Segment ids (1, T) int32 of documents packed end to end in one row.

    cu_seqlens (n + 1,): where each document begins and the last one ends, as in [0, 30, 31, 70]. What lies behind the
    last document, the padding, is a segment of its own.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is of shape (n + 1,), not {tuple(cu_seqlens.shape)}")
    check_integer("T", T, 0, FAR, f"0 or more, and {FAR} at most")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts != sorted(starts):
            raise ValueError("cu_seqlens begins with 0 and does not fall")
    positions = torch.arange(T, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    return torch.searchsorted(ends, positions, right=True).to(torch.int32)[None]

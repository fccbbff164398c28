"""The named masks: for each a predicate in plain operators, and the tiles it needs.

A mask says which keys a query may attend to. It is written once, as a function of positions, and the same function
runs in the Triton kernels, in the PyTorch reference and in the picture of the mask::

    def dilated_window(q, k, window, step):        # q, k: positions; True = may attend
        return (q >= k) & (q - k < window) & ((q - k) % step == 0)

    mask = Mask(dilated_window, 64, 2, bands=[Band(least=0, most=63)])

Query i of Tq is at position i + Tk - Tq, key j at position j: queries line up with the last keys. So a position may be
negative, and a mask may leave a query without any key.

**Tiles.** A mask also lists `Band`s whose union covers every True. A band is a strip along the diagonal, cut by a range
of keys and a range of queries, so it serves rows of tiles (forward pass, dQ) and columns (dK, dV) alike. `&` of two
masks intersects their bands, `|` joins the lists; both happen once, when the mask is built. Masks that bands cannot
describe (random blocks, layouts, strides) get lists of tiles from their predicate: see tile_lists.py.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable

import torch

from kernels.arguments import check_integer, check_tensors, kind
from kernels.mask import FAR, MAX_BANDS, Band, Constant, Mask, Table, lookup

MAX_TABLE = 1 << 24  # a table is kept until the process ends
MAX_RANDOM = 100  # the predicate's source grows with each share


def _of_integers(**least: int | None) -> Callable:
    """Decorate a builder of masks: check that its integers are from `least` (None: any) to FAR, and cache the masks."""

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
                    check_integer(name, value, least[name], FAR, f"from {least[name]} to {FAR}")
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
    """Show the last `window` keys, including the query's own position (Longformer, https://arxiv.org/abs/2004.05150)."""
    return Mask(within_window, window, bands=[Band(least=0, most=window - 1, exact=True)])


@_of_integers(n=0)
def sink_tokens(n: int) -> Mask:
    """Show the first `n` keys to every query, even an earlier one (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Meant for composition: `CAUSAL & (sliding_window(256) | sink_tokens(4))`.
    """
    return Mask(is_sink_token, n, bands=[Band(k_end=n, exact=True)])


def is_prefix(q, k, length):
    return k < length


def prefix(lengths: torch.Tensor) -> Mask:
    """Show the first keys of each row of the batch to every query: lengths (B,) int32, on the queries' device.

    `CAUSAL | prefix(lengths)` is the mask of a prefix language model (https://arxiv.org/abs/1910.10683).
    """
    check_tensors(lengths=lengths)
    if lengths.dtype != torch.int32 or lengths.ndim != 1:
        raise TypeError(f"lengths must be int32 of shape (B,), not {lengths.dtype} of {tuple(lengths.shape)}")
    return Mask(is_prefix, lengths, bands=[Band(k_end=lengths, exact=True)])


def is_global(q, k, table):
    return (lookup(table, q) != 0) | (lookup(table, k) != 0)


def global_tokens(positions: Iterable[int]) -> Mask:
    """Let all tokens attend to those at `positions`, and those to all (Longformer, https://arxiv.org/abs/2004.05150).

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
    """Return the distinct positions in order."""
    if isinstance(positions, str | bytes | dict) or not isinstance(positions, Iterable):
        raise TypeError(f"positions must be integers in a list, a set or a tensor, not {kind(positions)}")
    if isinstance(positions, torch.Tensor):
        positions = _values("positions", positions, 1)
    found = set()
    for n in positions:
        check_integer("each of positions", n, 0, MAX_TABLE - 1, f"from 0 to {MAX_TABLE - 1}")
        found.add(int(n))
    return sorted(found)


def _values(name: str, x: torch.Tensor, ndim: int) -> list:
    """Return the values of a tensor of `ndim` axes as lists; waits for a GPU."""
    check_tensors(**{name: x})
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, not shape {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError(f"{name} must have values, not be on the device meta")
    return x.tolist()


def is_strided(q, k, stride):
    return (q - k) % stride == 0


@_of_integers(stride=1)
def strided(stride: int) -> Mask:
    """Show the keys a multiple of `stride` away, before and after (Sparse Transformers, https://arxiv.org/abs/1904.10509).

    Meant for composition: `sliding_window(512) & strided(4)` is a dilated window, `CAUSAL & (sliding_window(128) |
    strided(128))` the strided pattern of that paper.
    """
    return Mask(is_strided, stride, bands=[Band(exact=True)] if stride == 1 else None)


def is_random_block(q, k, block, random, share, seed):
    # The n blocks up to the query's own are dealt in turn into `random` shares. This share gets `size` of them, and a
    # hash of (seed, n) draws one. No length matters, and all lines but the last depend on q alone.
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
    """Show each block of queries `random` blocks of keys up to it, drawn by `seed`, or all if there are fewer.

    The draw depends on (seed, the block of queries) alone, so a longer sequence does not change it.
    """
    if random > MAX_RANDOM:
        raise ValueError(f"random must be at most {MAX_RANDOM} blocks, not {random}: use block_sparse for more")
    bands = [Band(least=1 - block, q_begin=0)]
    mask = sink_tokens(0)
    for share in range(random):
        constants = (Constant(n) for n in (block, random, share))
        # Each share draws with its own seed, within the range of a mask's integers.
        own_seed = (seed * 0x9E3779B1 + share * 0x5BD1E995) % FAR
        one = Mask(is_random_block, *constants, own_seed, bands=bands, indexed=True)
        mask = one if share == 0 else mask | one
    return mask


@_of_integers(window=1, global_=0, random=0, seed=None, block=1)
def bigbird(window: int, global_: int, random: int, seed: int, block: int = 64) -> Mask:
    """Show what BigBird shows, causally (https://arxiv.org/abs/2007.14062): the last `window` keys, the first `global_`
    keys, and `random` blocks of `block` keys (see `random_blocks`).
    """
    return CAUSAL & (sliding_window(window) | sink_tokens(global_) | random_blocks(random, seed, block))


def is_in_layout(q, k, block, n_rows, n_columns, layout):
    row = q * (q >= 0) // block
    column = k // block
    inside = (q >= 0) & (row < n_rows) & (column < n_columns)
    return inside & (lookup(layout, row * n_columns + column) != 0)


def block_sparse(layout: torch.Tensor, block: int) -> Mask:
    """Show blocks of `block` queries by `block` keys where layout (rows, columns) is not 0, and nothing outside it.

    Row i of the layout holds the queries at positions i * block to (i + 1) * block - 1.
    """
    check_tensors(layout=layout)
    if layout.numel() > MAX_TABLE:
        raise ValueError(f"layout must have at most {MAX_TABLE} blocks, not shape {tuple(layout.shape)}")
    check_integer("block", block, 1, FAR, f"from 1 to {FAR}")
    rows = _values("layout", layout != 0, 2)
    table = Table(int(shows) for row in rows for shows in row)
    return Mask(is_in_layout, int(block), *layout.shape, table)


def segment_ids(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Return segment ids (1, T) int32 of documents packed end to end in one row.

    cu_seqlens (n + 1,): where each document begins and the last one ends, as in [0, 30, 31, 70]. The padding behind the
    last document is a segment of its own.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must have the shape (n + 1,), not {tuple(cu_seqlens.shape)}")
    check_integer("T", T, 0, FAR, f"from 0 to {FAR}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # do not wait for a GPU
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts != sorted(starts):
            raise ValueError("cu_seqlens must begin with 0 and not decrease")
    positions = torch.arange(T, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    return torch.searchsorted(ends, positions, right=True).to(torch.int32)[None]

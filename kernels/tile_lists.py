"""Lists of the (query, key) tiles that hold a True, for masks that bands cannot describe and for packed documents.

Tile m of queries holds the queries m * block_m to (m + 1) * block_m - 1, tile n of keys likewise.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.mask import Band, bands_of, evaluate, larger, smaller

PAIRS = 1 << 22  # of positions, on which the predicate is evaluated at a time
CLASSES = 64  # of segment ids: tiles without a common class share no document


class Pattern(NamedTuple):
    """Which query sees which key: a mask's operands (see Mask.from_operands), and segment ids or None."""

    key: str
    indexed: bool
    bands: tuple[int, ...]
    ints: tuple[int, ...]
    rows: tuple[Tensor, ...]
    segments_q: Tensor | None
    segments_k: Tensor | None

    @property
    def has_lists(self) -> bool:
        return self.indexed or self.segments_q is not None


class TileMap(NamedTuple):
    """Which tiles hold a True, and which hold nothing else: bool, (B or 1, tiles of queries, tiles of keys)."""

    needed: Tensor
    full: Tensor


def tile_lists(pattern: Pattern, Tq: int, Tk: int, block_m: int, block_n: int, over_keys: bool, device) -> Tensor:
    """Return for each tile of rows the number of full tiles, of partial tiles, then those tiles, each kind in order.

    int32 (B or 1, tiles of rows, 2 + tiles of columns). `over_keys`: rows are queries and columns keys; otherwise the
    other way round. A tile is full only if all of its columns exist. Lists that depend on integers alone are cached.
    """
    has_tensors = pattern.rows or pattern.segments_q is not None
    make = _kept_lists.__wrapped__ if has_tensors else _kept_lists
    return make(pattern, Tq, Tk, block_m, block_n, over_keys, device)


@functools.lru_cache(maxsize=128)
def _kept_lists(pattern: Pattern, Tq: int, Tk: int, block_m: int, block_n: int, over_keys: bool, device) -> Tensor:
    needed, full = tile_map(pattern, Tq, Tk, block_m, block_n, device)
    if not over_keys:
        needed, full = needed.mT, full.mT
    length, block = (Tk, block_n) if over_keys else (Tq, block_m)
    full = full & needed
    if length % block:
        full = full & (torch.arange(full.shape[2], device=full.device) < full.shape[2] - 1)
    kind = 2 - needed.int() - full.int()  # 0 full, 1 partial, 2 not needed
    counts = torch.stack([full.sum(2), (needed & ~full).sum(2)], dim=2)
    return torch.cat([counts, kind.argsort(dim=2, stable=True)], dim=2).int()


def tile_map(pattern: Pattern, Tq: int, Tk: int, block_m: int, block_n: int, device) -> TileMap:
    """Find the tiles: all that are needed, and no others unless two ids of one row fall into one class."""
    needed, full = _by_bands(bands_of(pattern.bands, pattern.rows), Tq, Tk, block_m, block_n, device)
    if pattern.indexed:
        needed, full = _by_predicate(pattern, Tq, Tk, block_m, block_n, device)
    if pattern.segments_q is not None:
        shared, same = _by_segments(pattern.segments_q, pattern.segments_k, block_m, block_n)
        needed, full = needed & shared, full & same
    return TileMap(needed, full)


def _by_bands(bands: Iterable[Band], Tq: int, Tk: int, block_m: int, block_n: int, device) -> TileMap:
    """Find tiles by their corners: the differences q - k within a tile have no gaps."""
    q_first = (torch.arange(0, Tq, block_m, device=device) + Tk - Tq)[:, None]
    k_first = torch.arange(0, Tk, block_n, device=device)[None, :]
    q_last, k_last = (q_first + block_m - 1).clamp(max=Tk - 1), (k_first + block_n - 1).clamp(max=Tk - 1)
    needed = torch.zeros(1, q_first.shape[0], k_first.shape[1], dtype=torch.bool, device=device)
    full = needed
    for band in bands:
        least, most, k_begin, k_end, q_begin, q_end, exact = (
            n.view(-1, 1, 1).long() if isinstance(n, Tensor) else n for n in band
        )
        q_low, q_high = larger(q_first, q_begin), smaller(q_last, q_end - 1)
        k_low, k_high = larger(k_first, k_begin), smaller(k_last, k_end - 1)
        touched = (q_low <= q_high) & (k_low <= k_high) & (q_high - k_low >= least) & (q_low - k_high <= most)
        needed = needed | touched
        if exact:
            inside = (q_low == q_first) & (q_high == q_last) & (k_low == k_first) & (k_high == k_last)
            full = full | (inside & (q_first - k_last >= least) & (q_last - k_first <= most))
    return TileMap(needed, full)


def _by_predicate(pattern: Pattern, Tq: int, Tk: int, block_m: int, block_n: int, device) -> TileMap:
    """Find tiles by evaluating the predicate on all pairs, some rows of tiles at a time."""
    n_tiles = -(-Tk // block_n)
    k = torch.arange(Tk, device=device, dtype=torch.int32)
    batch = pattern.rows[0].shape[0] if pattern.rows else 1
    rows = max(1, PAIRS // max(1, batch * Tk * block_m)) * block_m
    found = []
    for start in range(0, Tq, rows):
        q = torch.arange(start, min(start + rows, Tq), device=device, dtype=torch.int32)[:, None] + (Tk - Tq)
        seen = evaluate(pattern.key, q, k[None, :], pattern.ints, pattern.rows)
        seen = seen.expand(seen.shape[0] if seen.ndim == 4 else 1, 1, q.shape[0], Tk)[:, 0]
        tiles = seen.shape[0], -(-q.shape[0] // block_m), block_m, n_tiles, block_n
        beyond = n_tiles * block_n - Tk, -q.shape[0] % block_m
        needed = _padded(seen, *beyond, False).view(tiles).any(4).any(2)
        found.append((needed, _padded(seen, *beyond, True).view(tiles).all(4).all(2)))
    if not found:
        return TileMap(*torch.zeros(2, 1, 0, n_tiles, dtype=torch.bool, device=device))
    return TileMap(*(torch.cat(parts, dim=1) for parts in zip(*found)))


def _padded(seen: Tensor, columns: int, rows: int, fill: bool) -> Tensor:
    return torch.nn.functional.pad(seen, (0, columns, 0, rows), value=fill) if rows or columns else seen


def _by_segments(segments_q: Tensor, segments_k: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """Return which tiles share a document, and which hold only one."""
    low_q, high_q, classes_q = _segments_of_tiles(segments_q, block_m)
    low_k, high_k, classes_k = _segments_of_tiles(segments_k, block_n)
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    overlap = (low_q[q] <= high_k[k]) & (low_k[k] <= high_q[q])
    shared = overlap & (classes_q @ classes_k.mT > 0)
    same = (low_q[q] == high_q[q]) & (low_k[k] == high_k[k]) & (low_q[q] == low_k[k])
    return shared, same


def _segments_of_tiles(ids: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each tile's smallest and largest of the ids (B, T), and the classes in it (B, tiles, CLASSES)."""
    B, T = ids.shape
    tiles = -(-T // block)
    last = max(T - 1, 0)
    ids = ids[:, torch.arange(tiles * block, device=ids.device).clamp(max=last)].view(B, tiles, block)
    classes = torch.zeros(B, tiles, CLASSES, device=ids.device).scatter_(2, ids.long() % CLASSES, 1.0)
    if tiles == 0:
        return ids[..., 0:0].sum(2), ids[..., 0:0].sum(2), classes
    return ids.amin(2), ids.amax(2), classes

"""The tiles that masks need: checked against the predicates, and counted by the kernels."""

import random

import pytest
import torch
import triton
import triton.language as tl

from kernels import attention_backward, attention_forward, configs, tile_lists
from kernels.dispatch import INTERPRETED
from kernels.mask import BAND
from kernels.masks import (
    CAUSAL,
    FULL,
    Band,
    Mask,
    prefix,
    sink_tokens,
    sliding_window,
    strided,
)
from kernels.problem import Launch, Problem
from kernels.tiles import Sizes, count_full, count_partial, full_tile, partial_tile, visits
from tests.attention_checks import padded_tiles
from tests.mask_checks import BUILT_IN, COMPOSED, LATER, checkerboard, later_queries, lengths, problem_of

MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "window 1": sliding_window(1),
    "window 20": sliding_window(20),
    "window 100": sliding_window(100),
    "sinks 4": sink_tokens(4),
    "sinks 0": sink_tokens(0),
    "window & sinks": CAUSAL & (sliding_window(20) | sink_tokens(4)),
    "sinks, window": sink_tokens(17) | sliding_window(9),
    "three": sliding_window(7) | sink_tokens(3) | CAUSAL & LATER,
    "rectangle": Mask(later_queries, 30, bands=[Band(q_begin=30, exact=True)]) & sink_tokens(40),
    "no bands": Mask(checkerboard),
    "loose band": Mask(checkerboard) & sliding_window(30),
    "disjoint": sliding_window(5) & sink_tokens(3),
}  # fmt: skip
EXACT = [name for name in MASKS if name not in ("no bands", "loose band")]


@triton.jit
def list_tiles(tiles, masking, row, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr,
               LENGTH: tl.constexpr):  # fmt: skip
    """Fill tiles (2, LENGTH) with the tiles a program visits, without and with the predicate, padded with -1."""
    spans = visits(masking, 0, row, first, last, sizes, BLOCK, OVER_KEYS)
    for i in range(LENGTH):
        tl.store(tiles + i, tl.where(i < count_full(spans), full_tile(spans, i), -1))
        tl.store(tiles + LENGTH + i, tl.where(i < count_partial(spans), partial_tile(spans, i), -1))
    tl.store(tiles + 2 * LENGTH, count_full(spans))
    tl.store(tiles + 2 * LENGTH + 1, count_partial(spans))


def visited_tiles(mask: Mask, rows: range, Tq: int, Tk: int, block_rows: int, block: int, over_keys: bool):
    """Return the tiles, without and with the predicate, for rows at these indices (queries if over_keys, else keys)."""
    length = (Tk if over_keys else Tq) // block + 2
    out = torch.empty(2 * length + 2, dtype=torch.int32)
    shift = Tk - Tq if over_keys else 0
    blocks = (block_rows, block) if over_keys else (block, block_rows)
    masking = problem_of(mask, Tq, Tk).masking(*blocks, over_keys)
    row, first, last = rows[0] // block_rows, rows[0] + shift, rows[-1] + shift
    list_tiles[(1,)](out, masking, row, first, last, Sizes(Tq, Tk, 1, 1, 8, 8), block, over_keys, length)
    *tiles, n_full, n_partial = out.tolist()
    assert n_full <= length and n_partial <= length, "more tiles than there are"
    return tiles[:n_full], tiles[length : length + n_partial]


def prove_tiles(mask: Mask, Tq: int, Tk: int, block_rows: int, block: int, over_keys: bool) -> tuple[int, int]:
    """Check that each True is in one visited tile and full tiles are all True. Returns (visited, needed)."""
    dense = mask.dense(Tq, Tk)[0, 0]
    dense = dense if over_keys else dense.T
    n_rows, n_columns = dense.shape
    n_visited = n_needed = 0
    for start in range(0, n_rows, block_rows):
        rows = range(start, min(start + block_rows, n_rows))
        full, partial = visited_tiles(mask, rows, Tq, Tk, block_rows, block, over_keys)
        visited = full + partial
        assert len(set(visited)) == len(visited), "a tile is visited twice"
        strip = dense[rows.start : rows.stop]
        for tile in range((n_columns + block - 1) // block):
            seen = strip[:, tile * block : (tile + 1) * block]
            assert tile in visited or not seen.any(), "a True lies in no visited tile"
            if tile in full:
                assert seen.shape[1] == block and seen.all(), "a tile marked full is not all True"
            n_needed += bool(seen.any())
        assert all(0 <= tile < (n_columns + block - 1) // block for tile in visited)
        n_visited += len(visited)
    return n_visited, n_needed


# Only integers: a GPU would compile again for every set of numbers.
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="tiles are proved in the interpreter")
LENGTHS = [(100, 100), (64, 64), (1, 90), (33, 100), (100, 33), (37, 1)]


@in_the_interpreter
@pytest.mark.parametrize("over_keys", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_cover_the_mask(name, over_keys):
    """For rows of queries (forward, dq) and of keys (dkdv); masks of exact bands visit no unneeded tile."""
    visited, needed = 0, 0
    for Tq, Tk in LENGTHS:
        counts = prove_tiles(MASKS[name], Tq, Tk, 16, 32, over_keys)
        visited, needed = visited + counts[0], needed + counts[1]
    if name in EXACT:
        assert visited == needed
    counts = prove_tiles(MASKS[name], 70, 90, 32, 16, over_keys)
    assert counts[0] == counts[1] or name not in EXACT


@in_the_interpreter
def test_full_tiles_of_two_bands():
    """For keys up to 69 and the last 90, in tiles of 16, and queries 240 to 255."""
    mask = sink_tokens(70) | sliding_window(90)
    full, partial = visited_tiles(mask, range(240, 256), 256, 256, 16, 16, True)
    assert (full, sorted(partial)) == ([0, 1, 2, 3, 11, 12, 13, 14], [4, 9, 10, 15])
    counts = [prove_tiles(mask, 256, 256, 16, 16, over_keys) for over_keys in (True, False)]
    assert counts[0] == counts[1] and counts[0][0] == counts[0][1]


def random_mask(rng: random.Random, depth: int) -> Mask:
    if depth == 0:
        leaf = rng.choice(["causal", "window", "sinks", "rectangle", "full"])
        if leaf == "window":
            return sliding_window(rng.randint(1, 60))
        if leaf == "sinks":
            return sink_tokens(rng.randint(0, 40))
        if leaf == "rectangle":
            start = rng.randint(-20, 80)
            return Mask(later_queries, start, bands=[Band(q_begin=start, exact=True)])
        return CAUSAL if leaf == "causal" else FULL
    left, right = random_mask(rng, depth - 1), random_mask(rng, rng.randint(0, depth - 1))
    return left & right if rng.random() < 0.5 else left | right


@in_the_interpreter
@pytest.mark.parametrize("seed", range(12))
def test_tiles_of_random_compositions(seed):
    rng = random.Random(seed)
    mask = random_mask(rng, 2 + seed % 2)
    for over_keys in (True, False):
        visited, needed = prove_tiles(mask, rng.randint(1, 90), rng.randint(1, 90), 16, 16, over_keys)
        assert visited == needed or len(mask.bands) == 1


def count_tiles(problem: Problem, device) -> list[tuple[str, Launch, int]]:
    """Return what the three kernels report: name, launch and tiles visited by one head."""
    q, k = problem.call.q, problem.call.k
    B, Tq, H, D = q.shape
    out, lse = torch.zeros(B, Tq, H, D, device=device), torch.zeros(B, H, Tq, device=device)
    counts = torch.zeros(3, 1000, dtype=torch.int32, device=device)
    delta = torch.zeros_like(lse)
    launches = {
        "forward": attention_forward.forward_launch(problem, out, lse, counts[0]),
        "dkdv": attention_backward.dkdv_launch(problem, out, lse, delta, k.clone(), k.clone(), counts[1]),
        "dq": attention_backward.dq_launch(problem, out, lse, delta, q.clone(), counts[2]),
    }
    found = []
    for (name, launch), count in zip(launches.items(), counts):
        launch.run()
        heads = problem.H_kv if name == "dkdv" else problem.sizes.H
        found.append((name, launch, count.sum().item() / heads))
    return found


@in_the_interpreter
@pytest.mark.parametrize(
    ("name", "Tq"), [*((name, 130) for name in (*BUILT_IN, *COMPOSED)), *((name, 37) for name in BUILT_IN)]
)
def test_kernels_count_the_tiles_they_visit(name, Tq, monkeypatch):
    """Built-in masks visit exactly the tiles that hold a True in all kernels, composed ones at most 1.15 x that."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.Config(32, 16, 4, 1))
    mask = BUILT_IN.get(name) or COMPOSED[name]
    B, Tk = max([1, *(len(t) for t in mask.tensors)]), 130
    problem = problem_of(mask, Tq, Tk, B, H=2 if name == "window" else 1)
    dense = mask.dense(Tq, Tk).expand(B, 1, Tq, Tk)[:, 0]
    for kernel, launch, visited in count_tiles(problem, "cpu"):
        needed = sum(padded_tiles(row, launch).sum().item() for row in dense)
        limit = needed if name in BUILT_IN else 1.15 * needed
        assert needed <= visited <= limit, f"{kernel} visits {visited} tiles of {needed}"


@in_the_interpreter
@pytest.mark.parametrize("kind", ["packed", "padded", "any order", "pair"])
def test_other_documents_are_not_visited(kind, monkeypatch):
    """No tile between documents is visited, and no tile within one document needs the predicate."""
    monkeypatch.setattr(configs, "INTERPRETER", configs.Config(16, 16, 4, 1))
    T = 90
    packed = [[0] * 40 + [1] * 3 + [2] * 47, [n // 10 for n in range(T)]]
    rows = {
        "packed": packed,
        "padded": [[0] * 50 + [1] * 13 + [-1] * 27, [4] * 32 + [1] * 32 + [0] * 26],
        "any order": [[n // 20 % 3 for n in range(T)], [n // 20 * 77 % 11 for n in range(T)]],
        "pair": packed,
    }[kind]
    ids_k = torch.tensor(rows, dtype=torch.int32)
    ids_q = ids_k.flip(0)[:, 40:].contiguous() if kind == "pair" else ids_k
    Tq = ids_q.shape[1]
    for mask in (CAUSAL, sliding_window(24)):
        problem = problem_of(mask, Tq, T, 2, segment_ids=(ids_q, ids_k))
        same = ids_q[:, :, None] == ids_k[:, None, :]
        for kernel, launch, visited in count_tiles(problem, "cpu"):
            apart = [padded_tiles(row, launch) & padded_tiles(mask.dense(Tq, T)[0, 0], launch) for row in same]
            together = sum(padded_tiles(row & mask.dense(Tq, T)[0, 0], launch).sum().item() for row in same)
            assert together <= visited <= sum(tiles.sum().item() for tiles in apart), kernel
            if kind == "packed":
                assert visited <= (1 if mask is CAUSAL else 1.15) * together, kernel


@pytest.mark.parametrize("length", [1, 3])
def test_packed_documents_need_no_unneeded_tile(length):
    """Even if the ids of two documents fall into one class."""
    ids = torch.arange(600)[None] // length
    pattern = problem_of(FULL, 600, 600, segment_ids=ids.int()).call.pattern()
    found = tile_lists.tile_map(pattern, 600, 600, 8, 8, "cpu")
    tiles = (ids[0, :, None] == ids[0, None]).view(75, 8, 75, 8)
    assert torch.equal(found.needed[0], tiles.any(3).any(1)) and torch.equal(found.full[0], tiles.all(3).all(1))


def test_bands_with_tensors_are_read_from_them():
    mask = prefix(first := lengths(3, 5)) | prefix(second := lengths(7, 2))
    masking = problem_of(mask, 32, 32, 2).masking(16, 16, True)
    numbers = [(band, list(zip(Band._fields, range(BAND * band, BAND * (band + 1))))) for band in range(2)]
    rows = {(band, name): masking.band_rows[i] for band, fields in numbers for name, i in fields}
    ends = {band: row.tolist() for (band, name), row in rows.items() if name == "k_end"}
    assert [ends[0], ends[1]] == [band.k_end.tolist() for band in mask.bands]
    assert sorted(ends.values()) == sorted([first.tolist(), second.tolist()])
    assert all(row is None for (_, name), row in rows.items() if name != "k_end")
    assert [masking.bands[BAND * band + 3] for band in range(2)] == [0, 0]


@in_the_interpreter
def test_tiles_within_one_document_need_no_predicate():
    ids = torch.tensor([[0] * 64 + [1] * 32], dtype=torch.int32)
    masking = problem_of(CAUSAL, 96, 96, segment_ids=ids).masking(16, 16, True)
    assert masking.lists[0][0, :, :2].tolist() == [[0, 1], [1, 1], [2, 1], [3, 1], [0, 1], [1, 1]]


def test_tile_lists_are_cached():
    """For a mask of integers; lists that depend on the row of the batch are not cached."""
    tile_lists._kept_lists.cache_clear()
    problems = [problem_of(strided(50), 80, 80) for _ in range(2)]
    first, again = (problem.masking(16, 16, True).lists[0] for problem in problems)
    assert first is again
    assert problems[0].masking(16, 16, False).lists[0] is not first
    assert tile_lists._kept_lists.cache_info().misses == 2
    assert problem_of(CAUSAL | prefix(lengths(5)), 80, 80).masking(16, 16, True).lists == ()

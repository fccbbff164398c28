"""Masks: pinned to tables drawn by hand, and their tiles proved against their predicates."""

import copy
import random

import pytest
import torch
import triton
import triton.language as tl

from kernels import attention_backward, attention_forward, masks
from kernels.attention_triton import INTERPRETED
from kernels.masks import CAUSAL, FULL, Band, Mask, sink_tokens, sliding_window
from kernels.problem import Problem
from kernels.tiles import Sizes, count_full, count_partial, full_tile, partial_tile, visits
from tests.attention_checks import Case, make_inputs

TABLES = {
    "full": (FULL, 3, 4, "#### #### ####"),
    "causal": (CAUSAL, 4, 4, "#... ##.. ###. ####"),
    "causal, last queries": (CAUSAL, 2, 5, "####. #####"),
    "causal, more queries": (CAUSAL, 5, 3, "... ... #.. ##. ###"),
    "window": (sliding_window(2), 4, 4, "#... ##.. .##. ..##"),
    "window of one": (sliding_window(1), 2, 3, ".#. ..#"),
    "sinks": (sink_tokens(2), 2, 4, "##.. ##.."),
    "window and sinks": (CAUSAL & (sliding_window(2) | sink_tokens(1)), 5, 5, "#.... ##... ###.. #.##. #..##"),
    "causal and window, later sinks": (
        CAUSAL & (sliding_window(5) | sink_tokens(2)), 8, 8,
        "#....... ##...... ###..... ####.... #####... ######.. #######. ##.#####",
    ),
    "either": (sliding_window(1) | sink_tokens(1), 3, 3, "#.. ##. #.#"),
    "nothing": (sink_tokens(0), 2, 2, ".. .."),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    mask, Tq, Tk, drawing = TABLES[name]
    rows = ["".join("#" if seen else "." for seen in row) for row in mask.dense(Tq, Tk)[0, 0].tolist()]
    assert rows == drawing.split()


def checkerboard(q, k):
    return (q + k) % 2 == 0


def later_queries(q, k, start):
    return q >= start


LATER = Mask(later_queries, 50, bands=[Band(q_begin=50, exact=True)])
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
def list_tiles(tiles, bands, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr, LENGTH: tl.constexpr):
    """tiles (2, LENGTH): what a program of the kernels visits, without and with the predicate; padded with -1."""
    spans = visits(bands, first, last, sizes, BLOCK, OVER_KEYS)
    for i in range(LENGTH):
        tl.store(tiles + i, tl.where(i < count_full(spans), full_tile(spans, i), -1))
        tl.store(tiles + LENGTH + i, tl.where(i < count_partial(spans), partial_tile(spans, i), -1))
    tl.store(tiles + 2 * LENGTH, count_full(spans))
    tl.store(tiles + 2 * LENGTH + 1, count_partial(spans))


def visited_tiles(mask: Mask, rows: range, Tq: int, Tk: int, block: int, over_keys: bool):
    """The tiles, without and with the predicate, for rows at these indices (queries if over_keys, else keys)."""
    length = (Tk if over_keys else Tq) // block + 2
    out = torch.empty(2 * length + 2, dtype=torch.int32)
    shift = Tk - Tq if over_keys else 0
    bands = mask.operands[: 7 * len(mask.bands)]
    list_tiles[(1,)](out, bands, rows[0] + shift, rows[-1] + shift, Sizes(Tq, Tk, 1, 1, 8, 8), block, over_keys, length)
    *tiles, n_full, n_partial = out.tolist()
    assert n_full <= length and n_partial <= length, "more tiles than there are"
    return tiles[:n_full], tiles[length : length + n_partial]


def prove_tiles(mask: Mask, Tq: int, Tk: int, block_rows: int, block: int, over_keys: bool) -> tuple[int, int]:
    """Each True lies in a tile that is visited, once; each full tile is all True. Returns (visited, needed)."""
    dense = mask.dense(Tq, Tk)[0, 0]
    dense = dense if over_keys else dense.T
    n_rows, n_columns = dense.shape
    n_visited = n_needed = 0
    for start in range(0, n_rows, block_rows):
        rows = range(start, min(start + block_rows, n_rows))
        full, partial = visited_tiles(mask, rows, Tq, Tk, block, over_keys)
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


# Integers alone: a GPU would only compile anew for every set of numbers.
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="tiles are proved in the interpreter")
LENGTHS = [(100, 100), (64, 64), (1, 90), (33, 100), (100, 33), (37, 1)]


@in_the_interpreter
@pytest.mark.parametrize("over_keys", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_cover_the_mask(name, over_keys):
    """For rows of queries (forward, dq) and of keys (dkdv); masks made of exact bands visit nothing in vain."""
    visited, needed = 0, 0
    for Tq, Tk in LENGTHS:
        counts = prove_tiles(MASKS[name], Tq, Tk, 16, 32, over_keys)
        visited, needed = visited + counts[0], needed + counts[1]
    if name in EXACT:
        assert visited == needed
    counts = prove_tiles(MASKS[name], 70, 90, 32, 16, over_keys)
    assert counts[0] == counts[1] or name not in EXACT


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


@pytest.mark.parametrize("name", ["causal", "window 20", "window & sinks", "full"])
def test_kernels_count_the_tiles_they_visit(name, device):
    """What the three kernels themselves report is what the mask needs, for all heads."""
    mask, T, H, H_kv = MASKS[name], 150, 2, 1
    inputs = make_inputs(Case(T, T, H=H, H_kv=H_kv), device)
    q, k, v = inputs.differentiable.values()
    problem = Problem(q, k, v, mask.key, len(mask.bands), list(mask.operands), [], None, None, 0.25, 0.0, None, None,
                      None, 0.0, None)  # fmt: skip
    out, lse = attention_forward.forward(problem)
    counts = torch.zeros(3, 1000, dtype=torch.int32, device=device)
    delta = torch.zeros_like(lse)
    launches = (
        (attention_forward.forward_launch(problem, out, lse, counts[0]), H, True),
        (attention_backward.dkdv_launch(problem, out, lse, delta, k.clone(), v.clone(), counts[1]), H_kv, False),
        (attention_backward.dq_launch(problem, out, lse, delta, q.clone(), counts[2]), H, True),
    )
    dense = mask.dense(T, T)[0, 0]
    for (launch, heads, is_by_query), count in zip(launches, counts):
        launch.run()
        m, n = launch.args["BLOCK_M"], launch.args["BLOCK_N"]
        padded = torch.zeros(-(-T // m) * m, -(-T // n) * n, dtype=torch.bool)
        padded[:T, :T] = dense
        needed = padded.view(padded.shape[0] // m, m, padded.shape[1] // n, n).any(3).any(1).sum().item()
        assert count.sum().item() == needed * heads, "by query" if is_by_query else "by key"


def test_bands_compose():
    """Intersections and unions are arithmetic on integers; what is empty or covered goes."""
    assert (CAUSAL & sliding_window(5)).bands == sliding_window(5).bands
    assert (CAUSAL | sliding_window(5)).bands == CAUSAL.bands
    assert (FULL & CAUSAL).bands == CAUSAL.bands
    assert len((CAUSAL & (sliding_window(5) | sink_tokens(2))).bands) == 2
    assert all(band.is_empty() for band in (sink_tokens(3) & Mask(later_keys, 3, bands=[Band(k_begin=3)])).bands)
    many = [Mask(later_queries, n, bands=[Band(q_begin=n, q_end=n + 1)]) for n in range(masks.MAX_BANDS + 1)]
    union = many[0]
    for mask in many[1:]:
        union = union | mask
    assert union.bands == (Band(q_begin=0, q_end=masks.MAX_BANDS + 1),)


def later_keys(q, k, start):
    return k >= start


def test_names_stay_apart():
    """Two predicates of one name are two masks; equal masks share their compiled predicate."""

    def make(sign):
        def same_name(q, k):
            return q > k

        def other(q, k):
            return q < k

        other.__name__ = "same_name"
        return Mask(same_name if sign > 0 else other)

    above, below = make(1), make(-1)
    assert above.key != below.key
    assert torch.equal(above.dense(3, 3), below.dense(3, 3).transpose(2, 3))
    assert sliding_window(3).key == sliding_window(4).key
    assert copy.deepcopy(CAUSAL) is CAUSAL


def test_any_name_will_do():
    """Also one that the compiled function uses itself."""

    def mask(q, k):
        return q - k > 1

    assert Mask(mask).dense(3, 3).sum() == 1 and (Mask(mask) | CAUSAL).dense(3, 3).sum() == 6


def test_what_a_mask_refuses():
    with pytest.raises(TypeError, match="integers and int32 tensors"):
        Mask(later_keys, 0.5)
    with pytest.raises(TypeError, match="integers and int32 tensors"):
        Mask(later_keys, torch.zeros(2))
    with pytest.raises(ValueError, match="unlike"):
        Mask(later_keys, 2**30)
    with pytest.raises(ValueError, match="unlike"):
        Mask(later_keys, 1, bands=[Band(most=2**30)])
    with pytest.raises(ValueError, match="lambda"):
        Mask(lambda q, k: q > k)
    with pytest.raises(ValueError, match="window 0"):
        sliding_window(0)
    with pytest.raises(ValueError, match="sink_tokens"):
        sink_tokens(-1)

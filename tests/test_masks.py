"""Masks: pinned to tables drawn by hand, and their tiles proved against their predicates."""

import copy
import functools
import random

import pytest
import torch
import triton
import triton.language as tl

from kernels import attention, attention_backward, attention_forward, configs, masks, tile_lists
from kernels.attention_triton import INTERPRETED
from kernels.masks import (
    CAUSAL,
    FULL,
    Band,
    Mask,
    bigbird,
    block_sparse,
    global_tokens,
    prefix,
    random_blocks,
    sink_tokens,
    sliding_window,
    strided,
)
from kernels.operators import call_of
from kernels.problem import Launch, Problem
from kernels.tiles import Sizes, count_full, count_partial, full_tile, partial_tile, visits
from tests.attention_checks import Case, check, padded_tiles

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
    "prefix": (prefix(torch.tensor([2], dtype=torch.int32)), 2, 4, "##.. ##.."),
    "global": (global_tokens([1]), 4, 4, ".#.. #### .#.. .#.."),
    "no global": (global_tokens([]), 2, 2, ".. .."),
    "many global": (global_tokens([0, 2, 4, 6]), 3, 7, "####### #.#.#.# #######"),
    "strided": (strided(3), 3, 7, ".#..#.. ..#..#. #..#..#"),
    "strided, more queries": (strided(2), 5, 3, "#.# .#. #.# .#. #.#"),
    "layout": (block_sparse(torch.tensor([[1, 0], [0, 2]]), 2), 5, 5, "##... ##... ..##. ..##. ....."),
    "layout, more queries": (block_sparse(torch.ones(1, 1), 2), 4, 2, ".. .. ## ##"),
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
def list_tiles(tiles, masking, row, first, last, sizes, BLOCK: tl.constexpr, OVER_KEYS: tl.constexpr,
               LENGTH: tl.constexpr):  # fmt: skip
    """tiles (2, LENGTH): what a program of the kernels visits, without and with the predicate; padded with -1."""
    spans = visits(masking, 0, row, first, last, sizes, BLOCK, OVER_KEYS)
    for i in range(LENGTH):
        tl.store(tiles + i, tl.where(i < count_full(spans), full_tile(spans, i), -1))
        tl.store(tiles + LENGTH + i, tl.where(i < count_partial(spans), partial_tile(spans, i), -1))
    tl.store(tiles + 2 * LENGTH, count_full(spans))
    tl.store(tiles + 2 * LENGTH + 1, count_partial(spans))


def visited_tiles(mask: Mask, rows: range, Tq: int, Tk: int, block_rows: int, block: int, over_keys: bool):
    """The tiles, without and with the predicate, for rows at these indices (queries if over_keys, else keys)."""
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


def problem_of(mask: Mask, Tq: int, Tk: int, B: int = 1, H: int = 1, device="cpu", segment_ids=None) -> Problem:
    q, k = torch.randn(B, Tq, H, 16, device=device), torch.randn(B, Tk, 1, 16, device=device)
    return Problem(
        call_of(q, k, k, mask=mask, segment_ids=segment_ids, scale=None, softcap=None, alibi_slopes=None, bias=None,
                sinks=None, dropout_p=0.0, seed=None)
    )  # fmt: skip


def prove_tiles(mask: Mask, Tq: int, Tk: int, block_rows: int, block: int, over_keys: bool) -> tuple[int, int]:
    """Each True lies in a tile that is visited, once; each full tile is all True. Returns (visited, needed)."""
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


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def some_layout() -> torch.Tensor:
    return torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) < 0.4


# Built-in masks, which visit exactly the tiles that hold a True, and compositions, which visit at most 1.15 x as many.
BUILT_IN = {
    "full": FULL,
    "causal": CAUSAL,
    "window": sliding_window(20),
    "sinks": sink_tokens(20),
    "prefix": prefix(lengths(0, 33, 150)),
    "global": global_tokens([0, 1, 77]),
    "many global": global_tokens([3, 40, 41, 79, 120, 148]),
    "strided": strided(70),
    "random blocks": random_blocks(2, 5, 16),
    "bigbird": bigbird(20, 3, 2, 5, 16),
    "block sparse": block_sparse(some_layout(), 25),
}
COMPOSED = {
    "window & sinks": CAUSAL & (sliding_window(20) | sink_tokens(4)),
    "prefix LM": CAUSAL | prefix(lengths(0, 33, 150)),
    "prefix & window": prefix(lengths(0, 33, 150)) & sliding_window(30) | sink_tokens(2),
    "Longformer": CAUSAL & (sliding_window(20) | global_tokens([0, 77])),
    "strided window": sliding_window(90) & strided(40),
    "strided pattern": CAUSAL & (sliding_window(16) | strided(64)),
    "causal layout": CAUSAL & block_sparse(some_layout(), 25),
    "layout or window": block_sparse(some_layout(), 25) | sliding_window(8),
    "bigbird prefix": bigbird(10, 0, 1, 3, 16) | prefix(lengths(0, 7, 20)),
    "many bands": functools.reduce(Mask.__or__, [sink_tokens(20 * n) & LATER for n in range(1, 4)], CAUSAL)
    | functools.reduce(Mask.__or__, [global_tokens([9 * n]) & CAUSAL for n in range(6)]),
}


def count_tiles(problem: Problem, device) -> list[tuple[str, Launch, int]]:
    """What the three kernels themselves report: name, launch and tiles visited by one head."""
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
    """Exactly the tiles that hold a True, in all three kernels, for built-in masks; at most 1.15 x if composed."""
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
    """Not a tile that lies wholly in other documents, and of those within one document none needs the predicate."""
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


@in_the_interpreter
def test_tiles_within_one_document_need_no_predicate():
    ids = torch.tensor([[0] * 64 + [1] * 32], dtype=torch.int32)
    masking = problem_of(CAUSAL, 96, 96, segment_ids=ids).masking(16, 16, True)
    assert masking.lists[0][0, :, :2].tolist() == [[0, 1], [1, 1], [2, 1], [3, 1], [0, 1], [1, 1]]


def test_lists_are_made_once():
    """For a mask of integers; what depends on a row of the batch is made anew."""
    tile_lists._kept_lists.cache_clear()
    problems = [problem_of(strided(50), 80, 80) for _ in range(2)]
    first, again = (problem.masking(16, 16, True).lists[0] for problem in problems)
    assert first is again
    assert problems[0].masking(16, 16, False).lists[0] is not first
    assert tile_lists._kept_lists.cache_info().misses == 2
    assert problem_of(CAUSAL | prefix(lengths(5)), 80, 80).masking(16, 16, True).lists == ()


@pytest.mark.parametrize("name", [*BUILT_IN, *COMPOSED])
def test_every_mask_in_the_kernels(name, device):
    """Output and gradients, with few queries and with more queries than keys."""
    mask = BUILT_IN.get(name) or COMPOSED[name]
    mask = on_device(mask, device)
    B = max([1, *(len(t) for t in mask.tensors)])
    check(Case(130, 130, B=B, mask=mask, H=1), device)
    if name in BUILT_IN:
        check(Case(33, 90, B=B, mask=mask, H=1, dtype=torch.bfloat16), device)


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_lists_of_nothing(B, Tq, Tk, impl, device):
    """No rows, queries or keys where tiles come as lists, from a predicate, from tensors and from segments."""
    q, k = (torch.randn(B, T, 1, 16, device=device, requires_grad=True) for T in (Tq, Tk))
    ids = tuple(torch.zeros(B, T, dtype=torch.int32, device=device) for T in (Tq, Tk))
    bias = torch.zeros(1, Tk, device=device, requires_grad=True)
    rows = torch.full((B,), 3, dtype=torch.int32, device=device)
    for mask in (CAUSAL, strided(3), CAUSAL | prefix(rows), strided(3) & prefix(rows)):
        for segments in (None, ids):
            out = attention(q, k, k, mask=mask, segment_ids=segments, bias=bias, impl=impl)
            grads = torch.autograd.grad(out.sum(), (q, k, bias))
            assert out.shape == q.shape and all(torch.isfinite(grad).all() for grad in grads)


def on_device(mask: Mask, device: str) -> Mask:
    """The same mask with its tensors on the device."""
    moved = copy.copy(mask)
    moved.tensors = tuple(t.to(device) for t in mask.tensors)
    return moved


def test_random_blocks():
    """As many as asked for, in the past, no matter how long the sequence; another seed draws others."""
    seen = random_blocks(3, 1, 8).dense(160, 160)[0, 0]
    blocks = seen.view(20, 8, 20, 8)
    assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
    drawn = blocks.all(3).all(1)
    assert drawn.sum(1).tolist() == [min(n + 1, 3) for n in range(20)]
    assert not drawn.triu(1).any()
    assert torch.equal(seen[:100, :100], random_blocks(3, 1, 8).dense(100, 100)[0, 0])
    assert not torch.equal(seen, random_blocks(3, 2, 8).dense(160, 160)[0, 0])
    # Of many queries each key block within a share is drawn about as often.
    many = torch.stack([random_blocks(1, seed, 1).dense(64, 64)[0, 0, -1] for seed in range(3000)]).float().mean(0)
    assert (many * 64 - 1).abs().max() < 5 * (63 / 3000) ** 0.5


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

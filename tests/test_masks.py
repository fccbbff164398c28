"""Masks: compared with drawings, run in the kernels, combined and refused."""

import copy

import pytest
import torch

from kernels import attention, masks
from kernels.masks import (
    CAUSAL,
    FULL,
    Band,
    Constant,
    Mask,
    block_sparse,
    global_tokens,
    prefix,
    random_blocks,
    sink_tokens,
    sliding_window,
    strided,
)
from tests.attention_checks import Case, check
from tests.mask_checks import BUILT_IN, COMPOSED, later_queries

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
def test_masks_match_drawings(name):
    mask, Tq, Tk, drawing = TABLES[name]
    rows = ["".join("#" if seen else "." for seen in row) for row in mask.dense(Tq, Tk)[0, 0].tolist()]
    assert rows == drawing.split()


@pytest.mark.parametrize("name", [*BUILT_IN, *COMPOSED])
def test_every_mask_in_the_kernels(name, device):
    """Output and gradients, with as many queries as keys and with fewer."""
    mask = BUILT_IN.get(name) or COMPOSED[name]
    mask = on_device(mask, device)
    B = max([1, *(len(t) for t in mask.tensors)])
    check(Case(130, 130, B=B, mask=mask, H=1), device)
    if name in BUILT_IN:
        check(Case(33, 90, B=B, mask=mask, H=1, dtype=torch.bfloat16), device)


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_tile_lists_of_empty_tensors(B, Tq, Tk, impl, device):
    """Without rows, queries or keys, for lists from a predicate, from tensors and from segments."""
    q, k = (torch.randn(B, T, 1, 16, device=device, requires_grad=True) for T in (Tq, Tk))
    ids = tuple(torch.zeros(B, T, dtype=torch.int32, device=device) for T in (Tq, Tk))
    bias = torch.zeros(1, Tk, device=device, requires_grad=True)
    rows = torch.full((B,), 3, dtype=torch.int32, device=device)
    for mask in (CAUSAL, strided(3), CAUSAL | prefix(rows), strided(3) & prefix(rows)):
        for segments in (None, ids):
            out = attention(q, k, k, mask=mask, segment_ids=segments, bias=bias, impl=impl)
            grads = torch.autograd.grad(out.sum(), (q, k, bias))
            assert out.shape == q.shape and all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", [*BUILT_IN, *COMPOSED])
def test_from_operands_rebuilds_the_mask(name):
    mask = BUILT_IN.get(name) or COMPOSED[name]
    again = Mask.from_operands(*mask.operands)
    assert again.operands == mask.operands and again.bands == mask.bands
    assert torch.equal(again.dense(33, 90), mask.dense(33, 90))


def test_of_rows_takes_a_part_of_the_batch():
    mask = CAUSAL & COMPOSED["prefix LM"]
    assert torch.equal(mask.of_rows(1, 3).dense(33, 90), mask.dense(33, 90)[1:3])
    assert CAUSAL.of_rows(1, 3) is CAUSAL


def on_device(mask: Mask, device: str) -> Mask:
    """Copy a mask with its tensors on the device."""
    moved = copy.copy(mask)
    moved.tensors = tuple(t.to(device) for t in mask.tensors)
    return moved


def test_a_constant_is_part_of_the_key():
    """It acts like an integer, but each value compiles its own kernel."""
    constant, integer = (Mask(later_keys, kind(3), bands=[Band(k_begin=3)]) for kind in (Constant, int))
    assert torch.equal(constant.dense(9, 9), integer.dense(9, 9))
    assert constant.key == "later_keys(q, k, 3)" and constant.ints == () and integer.ints == (3,)
    mixed = constant & integer & Mask(later_queries, Constant(2), bands=[Band(q_begin=2)])
    assert mixed.key == "((later_keys(q, k, 3) & later_keys(q, k, p[0])) & later_queries(q, k, 2))"


def test_random_blocks():
    """The number of blocks is as requested, all in the past, for any length; another seed draws others."""
    seen = random_blocks(3, 1, 8).dense(160, 160)[0, 0]
    blocks = seen.view(20, 8, 20, 8)
    assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
    drawn = blocks.all(3).all(1)
    assert drawn.sum(1).tolist() == [min(n + 1, 3) for n in range(20)]
    assert not drawn.triu(1).any()
    assert torch.equal(seen[:100, :100], random_blocks(3, 1, 8).dense(100, 100)[0, 0])
    assert not torch.equal(seen, random_blocks(3, 2, 8).dense(160, 160)[0, 0])
    blocks = random_blocks(2, 5, 2).dense(24, 24)[0, 0, ::2, ::2]  # as in earlier versions, whose models learned so
    drawn = [[0], [0, 1], [1, 2], [0, 3], [3, 4], [0, 3], [1, 6], [0, 7], [0, 7], [1, 6], [1, 2], [3, 10]]
    assert [row.nonzero().flatten().tolist() for row in blocks] == drawn
    # Over many queries, each key block of a share is drawn about equally often.
    many = torch.stack([random_blocks(1, seed, 1).dense(64, 64)[0, 0, -1] for seed in range(3000)]).float().mean(0)
    assert (many * 64 - 1).abs().max() < 5 * (63 / 3000) ** 0.5


def test_bands_compose():
    """Intersections and unions are arithmetic on integers; empty and covered bands are dropped."""
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


def test_predicates_with_equal_names_stay_apart():
    """Two predicates with one name give two masks; equal masks share their compiled predicate."""

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


def test_a_predicate_may_have_any_name():
    """Even one that the compiled function uses itself."""

    def mask(q, k):
        return q - k > 1

    assert Mask(mask).dense(3, 3).sum() == 1 and (Mask(mask) | CAUSAL).dense(3, 3).sum() == 6


def test_invalid_masks_are_refused():
    with pytest.raises(TypeError, match="integers and int32 tensors"):
        Mask(later_keys, 0.5)
    with pytest.raises(TypeError, match="integers and int32 tensors"):
        Mask(later_keys, torch.zeros(2))
    with pytest.raises(ValueError, match="params must be between"):
        Mask(later_keys, 2**30)
    with pytest.raises(ValueError, match="bands must be between"):
        Mask(later_keys, 1, bands=[Band(most=2**30)])
    with pytest.raises(ValueError, match="lambda"):
        Mask(lambda q, k: q > k)
    with pytest.raises(ValueError, match=r"window must be from 1 to \d+, not 0"):
        sliding_window(0)
    with pytest.raises(ValueError, match=r"n must be from 0 to \d+, not -1"):
        sink_tokens(-1)
    lengths = [torch.zeros(n, dtype=torch.int32) for n in (2, 3)]
    with pytest.raises(ValueError, match="one length and be on one device"):
        prefix(lengths[0]) & prefix(lengths[1])
    with pytest.raises(TypeError, match="'Mask' and 'int'"):
        CAUSAL | 3
    with pytest.raises(ValueError, match="not decrease"):
        masks.segment_ids(torch.tensor([0, 3, 2]), 5)


def test_masks_of_many_parts():
    """150 parts can be combined one after another, and any number in pairs."""
    union = CAUSAL
    for n in range(150):
        union = union | sink_tokens(n)
    assert union.dense(3, 3).all()
    with pytest.raises(ValueError, match="150 parts"):
        union | CAUSAL
    with pytest.raises(ValueError, match="random must be at most 100 blocks"):
        random_blocks(101, 0)
    assert random_blocks(100, 0, 1).dense(100, 100).sum() == 5050


def test_a_layout_has_at_most_two_to_the_24_blocks():
    with pytest.raises(ValueError, match=rf"at most {2**24} blocks, not shape \(4096, 4097\)"):
        block_sparse(torch.ones(1).expand(4096, 4097), 64)


def test_segment_ids_are_on_the_device_of_the_lengths():
    assert masks.segment_ids(torch.tensor([0, 2, 3]), 5).tolist() == [[0, 0, 1, 2, 2]]
    ids = masks.segment_ids(torch.empty(4, dtype=torch.int32, device="meta"), 5)
    assert (ids.device.type, ids.dtype, ids.shape) == ("meta", torch.int32, (1, 5))


def test_a_table_takes_numbers_of_32_bits():
    least, most = -(2**31), 2**31 - 1
    assert repr(masks.Table([least, most])) != repr(masks.Table([least, most - 1]))
    for n in (least - 1, most + 1):
        with pytest.raises(TypeError, match="a list of 32-bit ints"):
            masks.Table([0, n])


def test_few_global_tokens_are_bands_and_many_are_a_list():
    assert len(masks.global_tokens([3, 4, 9]).bands) == 4
    assert masks.global_tokens(range(0, 2 * masks.MAX_BANDS, 2)).bands == (Band(),)

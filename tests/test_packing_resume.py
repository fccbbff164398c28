"""The order of packed rows: after a resume and a rollback, over ranks, and as earlier versions had it."""

import numpy as np
import pytest
import torch

from gpt.data.packing import BestFitLoader, make_loader
from gpt.errors import UserError
from tests.packing_checks import APART, DOCUMENT, corpus, lengths_of


@pytest.fixture
def small_pools(monkeypatch):
    monkeypatch.setattr("gpt.data.packing.POOL", 16)


def loader_of(packing, **changes):
    options = {"batch_size": 12, "seq_len": 12, "seed": 5} | changes
    return make_loader(corpus(lengths_of(90)), packing, DOCUMENT, **options)


@pytest.mark.parametrize("at", [0, 1, 5, 30])
@pytest.mark.parametrize("packing", APART)
def test_resume_is_exact_across_epochs(packing, at, small_pools):
    straight, before, after = (loader_of(packing) for _ in range(3))
    for _ in range(at):
        straight.next_batch()
        before.next_batch()
    after.next_batch()
    after.load_state_dict(before.state_dict())
    for _ in range(20):
        for ours, theirs in zip(after.next_batch(), straight.next_batch(), strict=True):
            assert ours.equal(theirs)
    assert after.state_dict() == straight.state_dict()
    assert after.state_dict()["epoch"] > 0


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("packing", APART)
def test_ranks_together_read_what_one_process_would(packing, world_size, small_pools):
    one = loader_of(packing)
    ranks = [loader_of(packing, batch_size=12 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(30):
        parts = [loader.next_batch() for loader in ranks]
        for whole, pieces in zip(one.next_batch(), zip(*parts), strict=True):
            assert whole.equal(torch.cat(pieces))
    assert all(loader.state_dict() == one.state_dict() for loader in ranks)


@pytest.mark.parametrize("row", [0, 2])
def test_a_rollback_changes_the_rows(row, small_pools):
    """At the next row already, even in mid-pool: what a batch has of the pool is less than what is left of it."""
    loader, other = (loader_of("best_fit", batch_size=2) for _ in range(2))
    state = loader.state_dict() | {"epoch": 1, "pool": 2, "row": row}
    loader.load_state_dict(state)
    left = len(loader._packed) - row
    assert left > 2
    other.load_state_dict(state)
    again = other.next_batch()
    other.load_state_dict(state | {"rollbacks": 1})
    assert other.state_dict() == state | {"rollbacks": 1}
    changed = other.next_batch()
    following = loader.next_batch()
    assert all(a.equal(b) for a, b in zip(again, following, strict=True))
    assert not changed[0].equal(following[0])
    assert other.state_dict()["pool"] == state["pool"] and other.state_dict()["row"] == row + 2


def test_a_pool_that_makes_fewer_rows_after_a_rollback_is_left_for_the_next(small_pools):
    loader = loader_of("best_fit", batch_size=2)
    state = loader.state_dict() | {"rollbacks": 2}
    loader.load_state_dict(state | {"row": 16})
    assert loader.state_dict()["row"] == len(loader._packed) < 16
    loader.next_batch()
    assert (loader.state_dict()["pool"], loader.state_dict()["row"]) == (1, 2)


@pytest.mark.parametrize("change", [{"pool": 100}, {"row": -1}, {"epoch": -1}, {"row": 17}], ids=str)
def test_an_invalid_position_is_refused(change, small_pools):
    loader = loader_of("best_fit")
    with pytest.raises(UserError, match="data position is invalid"):
        loader.load_state_dict(loader.state_dict() | change)


def test_two_tokens_are_the_fewest_that_pack():
    options = {"batch_size": 2, "seq_len": 4, "seed": 1}
    x, y, *_ = BestFitLoader(np.array([DOCUMENT, 7]), DOCUMENT, **options).next_batch()
    assert (x.tolist(), y.tolist()) == ([[DOCUMENT, 0, 0, 0]] * 2, [[7, -100, -100, -100]] * 2)
    for tokens in ([], [DOCUMENT]):
        with pytest.raises(UserError, match=f"{len(tokens)} training tokens are too few to predict any"):
            BestFitLoader(np.array(tokens), DOCUMENT, **options)


@pytest.mark.parametrize(("saved", "now"), [("stream", "best_fit"), ("best_fit", "stream"), ("best_fit", "documents")])
def test_another_packing_has_another_order(saved, now):
    with pytest.raises(UserError, match="data order has packing"):
        loader_of(now).load_state_dict(loader_of(saved).state_dict())


def test_a_best_fit_state_holds_the_position_and_the_order(small_pools):
    loader = loader_of("best_fit", batch_size=3)
    for _ in range(2):
        loader.next_batch()
    order = {"seed": 5, "seq_len": 12, "tokens": len(corpus(lengths_of(90))), "packing": "best_fit"}
    assert loader.state_dict() == {"epoch": 0, "pool": 0, "row": 6, "rollbacks": 0, **order}


STREAM = [[100077, 0, 102633, 0], [247, 24055, 57715, 117295], [110767, 113479, 0, 125575]]
ORDERS = {
    "stream": ({"epoch": 2, "index": 3}, STREAM),
    "documents": ({"epoch": 2, "index": 3}, STREAM),
    "best_fit": (
        {"epoch": 2, "pool": 1, "row": 3},
        [[135960, 107318, 42862, 3231], [22263, 118018, 131423, 82138], [2687, 114304, 21693, 127128]],
    ),
}


@pytest.mark.parametrize("packing", ORDERS)
def test_the_order_equals_that_of_earlier_versions(packing):
    """Or a run that goes on under this one would see other text: at the start, at a place, and after rollbacks."""
    place, expected = ORDERS[packing]
    loader = make_loader(corpus(lengths_of(9000)), packing, DOCUMENT, batch_size=4, seq_len=12, seed=5)
    for change, second in zip(({}, place, place | {"rollbacks": 2}), expected, strict=True):
        loader.load_state_dict(loader.state_dict() | {"rollbacks": 0} | change)
        assert loader.next_batch()[0][:, 1].tolist() == second

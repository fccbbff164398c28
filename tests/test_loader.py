"""Batches: every token once per epoch, exact resume, shards that join, and a validation pass that counts."""

import timeit
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt.data.loader import Batches, TrainLoader, permuted, target_bytes
from gpt.data.packing import validation_batches
from gpt.data.token_files import TokenWriter, read_tokens
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.errors import UserError

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

KEYS = np.arange(1, 7, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def numbered(n: int) -> np.ndarray:
    """Tokens that are their own positions, so that a batch shows where it was cut."""
    return np.arange(n, dtype=np.uint32)


def epoch_of(loader: TrainLoader) -> list[np.ndarray]:
    """The windows (seq_len + 1,) of the epoch that the loader is in, one batch row each."""
    rows, epoch = [], loader.state_dict()["epoch"]
    while True:
        x, y = loader.next_batch()
        if loader.state_dict()["epoch"] != epoch:
            return rows
        rows += [np.append(a, b[-1]) for a, b in zip(x.numpy(), y.numpy())]


# --- the permutation --------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@calm
def test_permutation_is_a_permutation(count, key):
    keys = KEYS ^ np.uint64(key)
    assert sorted(permuted(np.arange(count), count, keys).tolist()) == list(range(count))


@calm
@given(count=st.integers(1, 2**40), parts=st.lists(st.integers(0, 50), max_size=5))
def test_permutation_computes_any_part_by_itself(count, parts):
    indices = np.array(sorted({part % count for part in parts}), np.int64)
    together = permuted(indices, count, KEYS)
    assert ((together >= 0) & (together < count)).all()
    assert together.tolist() == [int(permuted(np.array([i]), count, KEYS)[0]) for i in indices]
    assert len(set(together.tolist())) == len(indices)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_permutations_are_even(count):
    """Over many keys each index goes to each place about equally often."""
    trials, seen = 1500, np.zeros((count, count))
    rng = np.random.default_rng(0)
    for _ in range(trials):
        seen[np.arange(count), permuted(np.arange(count), count, rng.integers(0, 2**63, 6, dtype=np.uint64))] += 1
    expected = trials / count
    assert np.abs(seen - expected).max() < 6 * np.sqrt(expected)


def test_permutation_leaves_no_order():
    order = permuted(np.arange(100_000), 100_000, KEYS)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert (np.diff(order) == 1).sum() < 20


# --- training batches -------------------------------------------------------------------------------------------------


@given(
    n=st.integers(2, 400),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    world_size=st.integers(1, 3),
)
@settings(calm, max_examples=60)
def test_each_token_is_predicted_once_per_epoch(n, seq_len, batch_size, seed, world_size):
    """Over all ranks and three epochs: every window whole, no token twice, only the ends left out."""
    n = max(n, seq_len + 1)
    options = {"batch_size": batch_size, "seq_len": seq_len, "seed": seed, "world_size": world_size}
    loaders = [TrainLoader(numbered(n), rank=rank, **options) for rank in range(world_size)]
    stream = []  # the windows' starts, in the order in which the ranks together take them
    sizes = [TrainLoader(numbered(n), **options)._count]
    while len(stream) < sum(sizes):
        for loader in loaders:
            x, y = loader.next_batch()
            assert x.shape == y.shape == (batch_size, seq_len)
            assert (y == x + 1).all()
            assert (x == x[:, :1] + torch.arange(seq_len)).all()
            stream += x[:, 0].tolist()
        if loaders[0]._epoch == len(sizes) < 3:
            sizes.append(loaders[0]._count)
    for size in sizes:
        epoch, stream = stream[:size], stream[size:]
        assert len(epoch) == size
        targets = Counter(start + 1 + j for start in epoch for j in range(seq_len))
        assert set(targets.values()) == {1}
        assert len(targets) == size * seq_len
        first, last = min(targets), max(targets)
        assert last - first + 1 == len(targets)  # in one piece
        assert (first - 1) < seq_len
        assert n - 1 - last < seq_len


def test_epochs_differ_in_phase_and_order():
    loader = TrainLoader(numbered(64 * 100), batch_size=1, seq_len=64, seed=3)
    epochs = [epoch_of(loader) for _ in range(4)]
    phases = [min(row[0] for row in epoch) % 64 for epoch in epochs]
    assert len(set(phases)) > 1
    orders = [tuple(int(row[0]) // 64 for row in epoch) for epoch in epochs]
    assert len(set(orders)) == 4
    assert all(list(order) != sorted(order) for order in orders)


def test_order_depends_on_the_seed_alone():
    def first(seed):
        return TrainLoader(numbered(5000), batch_size=8, seq_len=16, seed=seed).next_batch()[0]

    assert first(1).equal(first(1))
    assert not first(1).equal(first(2))


def test_all_phases_occur_so_that_every_token_is_seen():
    loader = TrainLoader(numbered(50), batch_size=1, seq_len=8, seed=0)
    seen = {int(token) for _ in range(600) for token in loader.next_batch()[1].ravel()}
    assert seen == set(range(1, 50))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_batches_are_int64_contiguous_copies(dtype):
    tokens = np.full(1000, np.iinfo(dtype).max, dtype)
    x, y = TrainLoader(tokens, batch_size=4, seq_len=9, seed=0).next_batch()
    for batch in (x, y):
        assert batch.dtype == torch.int64
        assert batch.is_contiguous()
        assert (batch == int(np.iinfo(dtype).max)).all()
        batch.zero_()
    assert tokens.min() == np.iinfo(dtype).max


def test_tokens_of_a_file(tmp_path):
    tokenizer = ByteTokenizer()
    with TokenWriter(tmp_path / "x.tokens", tokenizer) as writer:
        writer.append(np.arange(200))
    tokens = read_tokens(tmp_path / "x.tokens", tokenizer)
    x, y = TrainLoader(tokens, batch_size=8, seq_len=20, seed=0).next_batch()
    assert (y == x + 1).all()


@pytest.mark.parametrize("n", [8, 9, 10, 15, 16, 17])
def test_shortest_texts(n):
    if n == 8:
        with pytest.raises(UserError, match="8 training tokens fill no window: seq_len 8 needs 9"):
            TrainLoader(numbered(n), batch_size=4, seq_len=8, seed=0)
        return
    loader = TrainLoader(numbered(n), batch_size=4, seq_len=8, seed=0)
    for _ in range(20):
        x, y = loader.next_batch()
        assert (y == x + 1).all()
        assert y.max() < n


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 12, 13, 40])
def test_resume_is_exact_across_epochs(at):
    """63 windows of 10 in an epoch, 10 rows a batch: the batches run over the epochs' ends."""

    def make():
        return TrainLoader(numbered(640), batch_size=10, seq_len=10, seed=5)

    straight, before, after = make(), make(), make()
    for _ in range(at):
        straight.next_batch()
        before.next_batch()
    after.next_batch()  # whatever it did before
    after.load_state_dict(before.state_dict())
    for _ in range(20):
        for ours, theirs in zip(after.next_batch(), straight.next_batch()):
            assert ours.equal(theirs)
    assert after.state_dict() == straight.state_dict()
    assert after.state_dict()["epoch"] > 0


def test_state_holds_the_position_and_the_order():
    loader = TrainLoader(numbered(1000), batch_size=4, seq_len=10, seed=7)
    for _ in range(3):
        loader.next_batch()
    assert loader.state_dict() == {"epoch": 0, "index": 12, "rollbacks": 0, "seed": 7, "seq_len": 10, "tokens": 1000}


def test_resume_with_another_batch_size_continues_at_the_same_window():
    old = TrainLoader(numbered(1000), batch_size=4, seq_len=10, seed=7)
    old.next_batch()
    new = TrainLoader(numbered(1000), batch_size=2, seq_len=10, seed=7, world_size=2, rank=0)
    new.load_state_dict(old.state_dict())
    assert new.next_batch()[0].equal(old.next_batch()[0][:2])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 8}, "seed 8"),
        ({"seq_len": 11}, "seq_len 11"),
        ({"tokens": 999}, "tokens 999"),
        ({"tokens": None}, "tokens"),
    ],
    ids=str,
)
def test_resume_in_another_order_is_refused(change, name):
    loader = TrainLoader(numbered(1000), batch_size=4, seq_len=10, seed=7)
    with pytest.raises(UserError, match=f"data order has {name}"):
        loader.load_state_dict(loader.state_dict() | change)


@pytest.mark.parametrize("place", [{"index": 100}, {"index": -1}, {"epoch": -1}, {"index": 10**9}], ids=str)
def test_an_invalid_position_is_refused_and_changes_nothing(place):
    loader, twin = (TrainLoader(numbered(1000), batch_size=4, seq_len=10, seed=7) for _ in range(2))
    with pytest.raises(UserError, match="data position is invalid"):
        loader.load_state_dict(loader.state_dict() | place)
    assert loader.next_batch()[0].equal(twin.next_batch()[0])


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_read_what_one_process_would(world_size):
    options = {"seq_len": 7, "seed": 1}
    one = TrainLoader(numbered(500), batch_size=12, **options)
    ranks = [
        TrainLoader(numbered(500), batch_size=12 // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for _ in range(30):  # several epochs
        parts = [loader.next_batch() for loader in ranks]
        for whole, pieces in zip(one.next_batch(), zip(*parts)):
            assert whole.equal(torch.cat(pieces))
    assert all(loader.state_dict() == one.state_dict() for loader in ranks)


@pytest.mark.parametrize(("rank", "world_size"), [(1, 1), (-1, 2), (0, 0)])
def test_an_invalid_rank_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="is not below world_size"):
        TrainLoader(numbered(100), batch_size=1, seq_len=5, seed=0, rank=rank, world_size=world_size)


# --- validation -------------------------------------------------------------------------------------------------------


@calm
@given(
    n=st.integers(2, 300),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    max_tokens=st.none() | st.integers(1, 400),
)
def test_validation_predicts_each_token_but_the_first_once(n, seq_len, batch_size, max_tokens):
    tokens, targets = numbered(n), []
    batches = list(validation_batches(tokens, batch_size=batch_size, seq_len=seq_len, max_tokens=max_tokens))
    for x, y in batches:
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape
        assert x.shape[1] == seq_len
        given_ = y != -100
        assert (y[given_] == x[given_] + 1).all()
        assert (x[~given_] == 0).all()
        targets += y[given_].tolist()
    assert targets == list(range(1, min(n - 1, max_tokens or n) + 1))
    assert [len(x) for x, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1][0]) <= batch_size
    assert (torch.cat([y for _, y in batches])[:-1] != -100).all()  # only the last row is filled up


def test_validation_is_the_same_each_time():
    passes = [list(validation_batches(numbered(100), batch_size=3, seq_len=7)) for _ in range(2)]
    assert all(a.equal(b) for one, two in zip(*passes) for a, b in zip(one, two))


def test_validation_of_too_few_tokens_is_refused():
    with pytest.raises(UserError, match="validation part has 1 tokens"):
        next(validation_batches(numbered(1), batch_size=1, seq_len=4))


def test_target_bytes_counts_the_text_behind_the_targets():
    tokenizer = CharTokenizer("aé日🙂", document_token=True)
    document = tokenizer.document_token
    tokens = np.array([document, *tokenizer.encode("é日🙂"), document, *tokenizer.encode("aa")], np.uint16)
    assert target_bytes(tokens, tokenizer) == len("é日🙂aa".encode())
    assert target_bytes(tokens[1:], tokenizer) == len("日🙂aa".encode())  # the first is never a target
    assert [target_bytes(tokens, tokenizer, max_tokens=n) for n in range(1, 9)] == [2, 5, 9, 9, 10, 11, 11, 11]
    many = np.tile(tokens, 400_000)  # more than is summed at a time
    assert target_bytes(many, tokenizer) == 11 * 400_000
    assert target_bytes(many, tokenizer, max_tokens=len(many) - 8) == 11 * 399_999


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_cheap():
    """Some 15 microseconds at B 16, T 64; the bound allows for a busy machine."""
    loader = TrainLoader(numbered(1_000_000), batch_size=16, seq_len=64, seed=0)
    loader.next_batch()
    assert min(timeit.repeat(loader.next_batch, number=100, repeat=20)) / 100 < 150e-6


def test_a_large_corpus_costs_no_memory_to_shuffle():
    """2**36 tokens, all one: the order of 67 million windows is computed as it is needed."""
    tokens = np.lib.stride_tricks.as_strided(np.ones(1, np.uint16), (1 << 36,), (0,), writeable=False)
    loader = TrainLoader(tokens, batch_size=16, seq_len=1024, seed=0)
    assert loader.next_batch()[0].eq(1).all()
    assert len(loader._ahead) == 4096


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_track_the_position_of_training(ahead):
    """Reading ahead changes neither the batches nor what is saved."""
    plain = TrainLoader(np.arange(200) % 50, batch_size=3, seq_len=7, seed=1)
    batches = Batches(
        TrainLoader(np.arange(200) % 50, batch_size=3, seq_len=7, seed=1), torch.device("cpu"), ahead=ahead
    )
    for _ in range(12):  # beyond an epoch of at most 28 windows
        assert batches.state_dict() == plain.state_dict()
        for one, other in zip(batches.next_batch(), plain.next_batch()):
            assert torch.equal(one, other)
    batches.close()


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_validation_batches(world_size):
    whole = list(validation_batches(np.arange(100), batch_size=2, seq_len=8))
    parts = [
        list(validation_batches(np.arange(100), batch_size=2, seq_len=8, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    dealt = [batch for together in zip(*parts) for batch in together]
    for (x, y), (x_part, y_part) in zip(whole, dealt):
        assert torch.equal(x, x_part) and torch.equal(y, y_part)
    assert all((y == -100).all() and len(y) == 1 for _, y in dealt[len(whole) :])


def test_a_rollback_changes_the_windows_at_once():
    """In the middle of an epoch too: the phase stays, so that the windows left are of the same cut."""
    loader = TrainLoader(numbered(1000), batch_size=4, seq_len=10, seed=7)
    for _ in range(3):
        loader.next_batch()
    state = loader.state_dict()
    going_on = [loader.next_batch()[0] for _ in range(5)]
    loader.load_state_dict(state | {"rollbacks": 1})
    assert loader.state_dict() == state | {"rollbacks": 1}
    changed = [loader.next_batch()[0] for _ in range(5)]
    assert not any(ours.equal(theirs) for ours, theirs in zip(changed, going_on))
    assert {int(x) % 10 for x in torch.cat(changed)[:, 0]} == {int(x) % 10 for x in torch.cat(going_on)[:, 0]}
    loader.load_state_dict(state)
    assert all(loader.next_batch()[0].equal(x) for x in going_on)


@pytest.mark.parametrize(("ahead", "device", "threads"), [(None, "cpu", 0), (None, "cuda", 1), (True, "cpu", 1)])
def test_batches_are_read_ahead_for_a_gpu(ahead, device, threads):
    loader = TrainLoader(np.arange(200) % 50, batch_size=3, seq_len=7, seed=1)
    batches = Batches(loader, torch.device(device), ahead=ahead)
    assert (batches._thread is not None) == threads
    batches.close()

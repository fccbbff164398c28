"""Documents kept apart: counts, boundaries, positions, and the loss of each document alone."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt
from gpt.config import ModelConfig
from gpt.data.loader import DOCUMENT_INPUTS, TrainLoader
from gpt.data.packing import (
    BestFitLoader,
    DocumentLoader,
    check_packing,
    document_inputs,
    pack,
    piece_starts,
    read_pieces,
    validation_batches,
)
from gpt.data.token_files import read_tokens
from gpt.errors import UserError
from gpt.model import GPT
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from tests.corpus_checks import calm
from tests.packing_checks import APART, DOCUMENT, corpus, lengths_of
from tests.run_checks import FLAGS
from train import main


def epoch_of(loader: BestFitLoader) -> list[tuple[torch.Tensor, ...]]:
    """The rows of the epoch that the loader is in; it is then in the next one."""
    rows, epoch = [], loader.state_dict()["epoch"]
    while True:
        batch = loader.next_batch()
        if loader.state_dict()["epoch"] != epoch:
            return rows
        rows += list(zip(*batch))


def segments(batch: tuple[torch.Tensor, ...]):
    """Of every segment of a batch with a target: inputs, targets and positions."""
    for x, y, positions, ids in zip(*batch):
        for i in ids.unique():
            here = (ids == i) & (y >= 0)
            if here.any():
                yield x[here], y[here], positions[here]


# --- places -----------------------------------------------------------------------------------------------------------


def test_positions_and_segments_of_a_row():
    x = torch.tensor([[7, 8, 0, 5, 0, 0, 6, 9], [0, 1, 2, 3, 4, 5, 6, 0]])
    positions, ids = document_inputs(x, DOCUMENT)
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert ids.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 1]]
    assert (positions.dtype, ids.dtype) == (torch.int64, torch.int32)


def test_documents_are_the_streams_windows():
    tokens = corpus(lengths_of(80))
    options = {"batch_size": 3, "seq_len": 16, "seed": 4}
    stream, documents = TrainLoader(tokens, **options), DocumentLoader(tokens, DOCUMENT, **options)
    for _ in range(60):  # over an epoch's end
        x, y, *rest = documents.next_batch()
        for ours, theirs in zip((x, y), stream.next_batch()):
            assert ours.equal(theirs)
        assert all(a.equal(b) for a, b in zip(rest, document_inputs(x, DOCUMENT)))
        assert documents.state_dict() == stream.state_dict()


# --- pieces and rows --------------------------------------------------------------------------------------------------


@calm
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(1, 12),
    headed=st.booleans(),
    block=st.integers(1, 50),
)
def test_pieces_are_documents_cut_at_the_context(lengths, seq_len, headed, block):
    """Also where the text is searched in parts, and begins within a document."""
    lengths[-1] += 2
    tokens = corpus(lengths, headed=headed)
    starts, begin = [], 0
    for length in lengths:
        stop = min(begin + length, len(tokens) - 1)
        starts += range(begin, stop, seq_len)
        begin += length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.data.packing._BLOCK", block)
        assert piece_starts(tokens, DOCUMENT, seq_len).tolist() == [*starts, len(tokens) - 1]


def test_rows_take_the_longest_piece_that_fits():
    assert pack(range(8), [9, 4, 4, 3, 2, 7, 1, 10], 10) == [
        [(7, 10)],
        [(0, 9), (6, 1)],
        [(5, 7), (3, 3)],
        [(2, 4), (1, 4), (4, 2)],
    ]


@settings(calm, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    seq_len=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    pool=st.integers(1, 30),
)
def test_best_fit_has_each_target_once_per_epoch(lengths, seq_len, seed, pool):
    lengths[-1] += 2
    tokens = corpus(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt.data.packing.POOL", pool)
        loader = BestFitLoader(tokens, DOCUMENT, batch_size=1, seq_len=seq_len, seed=seed)
        for _ in range(2):
            rows = [loader.next_batch()]
            while loader.state_dict()["row"] < len(loader._packed) or (loader._pool + 1) * pool < loader._count:
                rows.append(loader.next_batch())
            pieces = [piece for row in rows for piece in segments(row)]
            inputs = Counter(int(v) for x, _, _ in pieces for v in x)
            assert inputs == Counter(tokens[:-1].tolist())
            assert Counter(int(v) for _, y, _ in pieces for v in y) == Counter(tokens[1:].tolist())
            whole = 0
            for x, y, positions in pieces:
                assert positions.equal(torch.arange(len(x)))
                assert (x[1:] != DOCUMENT).all()  # one document, or a part of one
                assert x[1:].equal(y[:-1])
                whole += len(x) < seq_len
            assert whole <= len(lengths)  # only what a document leaves is shorter than a row


def test_best_fit_cuts_fewer_documents_and_leaves_little_free():
    lengths = lengths_of(3000, most=100)
    tokens = corpus(lengths)
    loader = BestFitLoader(tokens, DOCUMENT, batch_size=1, seq_len=128, seed=0)
    rows = epoch_of(loader)
    free = sum(int((y < 0).sum()) for _, y, _, _ in rows) / (128 * len(rows))
    assert free < 0.005
    pieces = [piece for row in rows for piece in segments(tuple(part[None] for part in row))]
    assert all(int(x[0]) == DOCUMENT for x, _, _ in pieces)  # none is cut


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["rotary", "learned", "alibi"])
@pytest.mark.parametrize("packing", APART)
@torch.no_grad()
def test_a_packed_pass_has_the_loss_of_each_document_alone(packing, position):
    """Every document runs by itself, in the parts that its rows have, up to the document token that ends it."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 24, "vocab_size": 30}
    model = GPT(ModelConfig(**sizes, position=position, init="gpt2")).double().eval()
    for weight in model.parameters():
        weight *= 4 if weight.ndim > 1 else 1  # so that it matters what a token sees
    tokens = corpus(lengths_of(40), numbered=False)
    batches = list(validation_batches(tokens, packing, DOCUMENT, batch_size=4, seq_len=24))
    packed = sum(
        model.loss(x, y, reduction="sum", **dict(zip(DOCUMENT_INPUTS, rest, strict=True))).item()
        for x, y, *rest in batches
    )
    cuts = {0, len(tokens) - 1, *np.flatnonzero(tokens[:-1] == DOCUMENT).tolist()}
    cuts |= set(range(0, len(tokens) - 1, 24)) if packing == "documents" else set(piece_starts(tokens, 0, 24).tolist())
    cuts, alone = sorted(cuts), 0.0
    for begin, end in pairwise(cuts):
        part = torch.from_numpy(tokens[begin : end + 1].astype(np.int64))[None]
        alone += model.loss(part[:, :-1], part[:, 1:], reduction="sum").item()
    targets = len(tokens) - 1
    assert sum(int((y >= 0).sum()) for _, y, *_ in batches) == targets
    assert packed / targets == pytest.approx(alone / targets, abs=1e-6)
    plain = sum(
        model.loss(x, y, reduction="sum").item() for x, y in validation_batches(tokens, batch_size=4, seq_len=24)
    )
    assert abs(plain - packed) / targets > 1e-3  # the test could tell


# --- validation -------------------------------------------------------------------------------------------------------


@settings(calm, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    max_tokens=st.none() | st.integers(1, 200),
    packing=st.sampled_from(APART),
)
def test_validation_has_the_streams_targets_once(lengths, seq_len, batch_size, world_size, max_tokens, packing):
    """Over all ranks, which get equally many batches."""
    lengths[-1] += 2
    tokens = corpus(lengths)
    options = {"batch_size": batch_size, "seq_len": seq_len, "max_tokens": max_tokens, "world_size": world_size}
    ranks = [list(validation_batches(tokens, packing, DOCUMENT, rank=r, **options)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    pairs = Counter()
    for batches in ranks:
        for x, y, positions, ids in batches:
            assert x.shape == y.shape == positions.shape == ids.shape
            assert len(x) <= batch_size
            pairs.update(zip(x[y >= 0].tolist(), y[y >= 0].tolist()))
    count = min(len(tokens) - 1, max_tokens or len(tokens))
    assert pairs == Counter(zip(tokens[:count].tolist(), tokens[1 : count + 1].tolist()))


# --- what cannot be packed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", APART)
def test_packing_without_documents_is_refused(packing):
    check_packing("stream", None, 1)
    check_packing(packing, 0, 2)
    with pytest.raises(UserError, match="the corpus is one document"):
        check_packing(packing, 0, 1)
    with pytest.raises(UserError, match="the tokenizer has no document token"):
        check_packing(packing, None, 2)


@pytest.mark.parametrize("packing", ["stream", *APART])
def test_a_run_keeps_documents_apart_in_training_and_validation(packing, tmp_path, monkeypatch):
    """What the model gets; and the loss in the metrics is that of the validation documents one at a time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for i in range(30):
        (tmp_path / f"docs/{i}.txt").write_text("".join("abcd"[(i * j + j * j) % 4] for j in range(1, 5 + i % 9)))
    got, loss = Counter(), GPT.loss

    def spy(self, x, y, *, positions=None, segment_ids=None, **options):
        got[self.training, positions is not None, segment_ids is not None] += 1
        return loss(self, x, y, positions=positions, segment_ids=segment_ids, **options)

    monkeypatch.setattr(GPT, "loss", spy)
    words = ["--corpus", "docs", "--packing", packing, "--val-fraction", "0.5", "--learning-rate", "0.05"]
    assert main(load_config([*FLAGS, *words, "--max-steps", "6", "--warmup-steps", "0", "--batch-size", "4"])) == 0
    apart = packing != "stream"
    assert got.keys() == {(True, apart, apart), (False, apart, apart)}
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    model, tokenizer = gpt.load("run", device="cpu")
    corpus = json.loads((tmp_path / "run/corpus.json").read_text())
    tokens = read_tokens(tmp_path / f"cache/corpora/{corpus['digest'][:32]}/val.tokens", tokenizer)
    cuts = np.append(np.flatnonzero(tokens[:-1] == tokenizer.document_token), len(tokens) - 1)
    assert len(cuts) > 5 and np.diff(cuts).max() <= 16
    if packing == "documents":  # whose rows cut some
        cuts = sorted({*cuts.tolist(), *range(0, len(tokens) - 1, 16)})
    nats = 0.0
    with torch.no_grad():
        for begin, end in pairwise(cuts):
            part = torch.from_numpy(tokens[begin : end + 1].astype(np.int64))[None]
            nats += model.loss(part[:, :-1], part[:, 1:], reduction="sum").item()
    val_loss = read_metrics(tmp_path / "run/metrics.jsonl")[-1]["val_loss"]
    assert (val_loss == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)) == apart


def test_a_packed_row_piece_by_piece():
    x, y, positions, ids = read_pieces(np.arange(10, 30), [[(3, 2), (12, 3)], [(0, 7)], []], 7)
    assert x.tolist() == [[13, 14, 22, 23, 24, 0, 0], [10, 11, 12, 13, 14, 15, 16], [0] * 7]
    assert y.tolist() == [[14, 15, 23, 24, 25, -100, -100], [11, 12, 13, 14, 15, 16, 17], [-100] * 7]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert ids.tolist() == [[0, 0, 1, 1, 1, 2, 2], [0] * 7, [0] * 7]
    assert [part.dtype for part in (x, y, positions, ids)] == [torch.int64] * 3 + [torch.int32]

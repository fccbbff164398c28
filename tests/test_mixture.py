"""Several corpora in given shares: what each row comes from, resume, ranks, one tokenizer, a loss for each."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.loader import TrainLoader
from gpt.data.mixture import Mixture, prepare_all, together
from gpt.data.packing import make_loader
from gpt.data.token_files import read_tokens
from gpt.errors import UserError
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from tests.run_checks import FLAGS, status_of
from train import main

WEIGHTS = (0.5, 0.3, 0.2)


def mixture(weights=WEIGHTS, packing="stream", **changes) -> Mixture:
    """Corpora of 1,000, 2,000, ... tokens: 1 to 7, document tokens among them, and 10 times the corpus's number."""
    options = {"batch_size": 6, "seq_len": 10, "seed": 3} | changes
    texts = [
        np.where(np.arange(1000 * (i + 1)) % 7, 10 * (i + 1) + np.arange(1000 * (i + 1)) % 7, 0)
        for i in range(len(weights))
    ]
    return Mixture([make_loader(text, packing, 0, **options) for text in texts], weights, **options)


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), WEIGHTS, (1e-3, 1), (3, 2, 2, 90), (5,)], ids=str)
@pytest.mark.parametrize("seed", [0, 1337])
def test_proportions_hold_over_any_stretch(weights, seed):
    """By a few rows, where independent draws would be off by hundreds."""
    chosen = mixture(weights, seed=seed).chosen(100_000)
    for number, weight in enumerate(weights):
        # How far the count runs ahead, so that the difference of two is that of the stretch between.
        ahead = np.concatenate(([0], np.cumsum(chosen == number))) - weight / sum(weights) * np.arange(100_001)
        for length in (1, 10, 1000, 30_000, 100_000):
            assert np.abs(ahead[length:] - ahead[:-length]).max() < 3 + math.log2(length) / 2


def test_choice_depends_on_seed_and_row_alone():
    assert not np.array_equal(mixture(seed=1).chosen(100), mixture(seed=2).chosen(100))
    whole, parts, moving = mixture().chosen(600), [], mixture()
    for _ in range(100):
        parts.append(moving.chosen(6))
        moving.next_batch()
    assert np.array_equal(whole, np.concatenate(parts))


def test_rows_are_each_corpus_own_stream():
    """In its own order, through its own epochs."""
    loader, options = mixture(), {"batch_size": 1, "seq_len": 10, "seed": 3}
    alone = [TrainLoader(part._tokens, **options) for part in loader._loaders]
    chosen = mixture().chosen(900)
    rows = torch.cat([torch.stack(loader.next_batch(), 1) for _ in range(150)])
    for number, row in zip(chosen, rows, strict=True):
        assert row.equal(torch.cat(alone[number].next_batch()))
    epochs = [state["epoch"] for state in loader.state_dict()["corpora"]]
    assert epochs == [state["epoch"] for state in (part.state_dict() for part in alone)]
    assert epochs[0] > epochs[1] > epochs[2] == 0


@pytest.mark.parametrize("packing", ["stream", "documents", "best_fit"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_resume(packing, world_size):
    """What one process sees, also from the middle and through JSON, with another world."""
    one = mixture(packing=packing)
    for _ in range(40):
        one.next_batch()
    state = json.loads(json.dumps(one.state_dict()))
    ranks = [
        mixture(packing=packing, batch_size=6 // world_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for loader in ranks:
        loader.next_batch()
        loader.load_state_dict(state)
    for _ in range(40):
        parts = [loader.next_batch() for loader in ranks]
        for whole, pieces in zip(one.next_batch(), zip(*parts), strict=True):
            assert whole.equal(torch.cat(pieces))
    assert all(loader.state_dict() == one.state_dict() for loader in ranks)


def test_a_rollback_changes_the_rows_but_not_the_shares():
    loader, other = mixture(), mixture()
    other.load_state_dict(other.state_dict() | {"rollbacks": 1})
    assert np.array_equal(loader.chosen(50), other.chosen(50))
    assert not loader.next_batch()[0].equal(other.next_batch()[0])
    assert [state["rollbacks"] for state in other.state_dict()["corpora"]] == [1, 1, 1]


def test_another_number_of_corpora_is_refused():
    with pytest.raises(UserError, match="has 3 weighted corpora, this run has 2"):
        mixture((1, 1)).load_state_dict(mixture().state_dict())
    with pytest.raises(UserError, match="has 1 weighted corpora, this run has 2"):
        mixture((1, 1)).load_state_dict(TrainLoader(np.arange(99), batch_size=1, seq_len=5, seed=3).state_dict())
    with pytest.raises(UserError, match="data order has"):
        TrainLoader(np.arange(99), batch_size=1, seq_len=5, seed=3).load_state_dict(mixture().state_dict())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text("jack and jill went up the hill. " * 60)
    (tmp_path / "numbers").mkdir()
    for i in range(12):
        (tmp_path / f"numbers/{i}.txt").write_text(f"{i} {i * i} {i**3} " * (2 * i + 3))
    return tmp_path


@pytest.mark.parametrize("name", ["char", "byte", "bpe"])
def test_corpora_have_one_tokenizer(folder, name):
    data = DataConfig(("prose.txt", "numbers"), folder / "cache", corpus_weights=(1, 2))
    told: list[tuple[str, int, int]] = []
    corpora = prepare_all(data, TokenizerConfig(name, 300), progress=lambda *progress: told.append(progress))
    sizes = [sum(path.stat().st_size for path in folder.glob(glob)) for glob in ("prose.txt", "numbers/*")]
    learned = {sum(sizes)} if name != "byte" else set()
    assert {total for _, _, total in told} == {*sizes, *learned}  # also while all of them are read for a tokenizer
    assert len({corpus.tokenizer.fingerprint for corpus in corpora}) == 1
    assert [corpus.documents for corpus in corpora] == [1, 12]
    whole = together(corpora)
    assert whole.documents == 13 and len(whole.sources) == 13
    assert whole.train_tokens == sum(len(read_tokens(corpus.train, corpus.tokenizer)) for corpus in corpora)
    assert whole.digest not in {corpus.digest for corpus in corpora}
    assert prepare_all(data, TokenizerConfig(name, 300), fixed_tokenizer=whole.tokenizer)[1].documents == 12


WORDS = "--corpus prose.txt numbers --corpus-weights 0.75 0.25 --packing documents --eval-interval 2"
MIX = WORDS.split()


def test_a_run_of_two_corpora(folder, capsys):
    assert main(load_config([*FLAGS, *MIX, "--max-steps", "4"])) == 0
    assert "13 documents: " in capsys.readouterr().out
    records = [r for r in read_metrics(folder / "run/metrics.jsonl") if "val_loss" in r]
    for r in records:
        assert r["val_loss"] == pytest.approx(0.75 * r["val_loss_1"] + 0.25 * r["val_loss_2"])
        assert r["val_loss_1"] != r["val_loss_2"]
    weights = (folder / "run/checkpoints/step_00000004/model.safetensors").read_bytes()
    assert main(load_config([*FLAGS, *MIX, "--max-steps", "2", "--run-dir", "half"])) == 0
    again = [*FLAGS, *MIX, "--run-dir", "half", "--resume", "--schedule", "constant", "--max-steps", "4"]
    capsys.readouterr()
    assert main(load_config([*again, "--corpus-weights", "1", "3"])) == 0
    assert "corpus_weights is [1.0, 3.0], was [0.75, 0.25] (a step sees other text)" in capsys.readouterr().out
    assert (folder / "half/checkpoints/step_00000004/model.safetensors").read_bytes() != weights


def test_a_run_of_two_corpora_resumes_exactly(folder, capsys):
    words = [*FLAGS, *MIX, "--max-steps", "4", "--keep-checkpoints", "9"]
    assert main(load_config(words)) == 0
    last = folder / "run/checkpoints/step_00000004/model.safetensors"
    weights = last.read_bytes()
    for name in ("step_00000004", "best_00000004"):
        shutil.rmtree(folder / "run/checkpoints" / name)
    assert main(load_config([*words, "--resume"])) == 0
    assert last.read_bytes() == weights


def test_an_error_names_the_corpus(folder, capsys):
    (folder / "short.txt").write_text("jack")
    assert status_of("--corpus", "prose.txt", "short.txt", "--corpus-weights", "1", "1") == 2
    assert "error: short.txt: the corpus is too short: its training part has" in capsys.readouterr().err


def test_dry_run_reports_packing_and_counts_all_corpora(folder, capsys):
    assert main(load_config([*FLAGS, *MIX, "--max-steps", "2", "--dry-run"])) == 0
    assert "epochs of" in capsys.readouterr().out
    assert status_of("--corpus", "prose.txt", "--packing", "documents", "--dry-run") == 2
    assert "packing documents keeps documents apart, but the corpus is one document" in capsys.readouterr().err


def test_order_and_digests_equal_those_of_earlier_versions(tmp_path):
    """Or a run that goes on would see other text, and every corpus would be tokenized again."""
    assert mixture().chosen(20).tolist() == [2, 0, 0, 1, 0, 2, 1, 0, 1, 0, 0, 1, 0, 2, 1, 0, 1, 0, 2, 1]
    (tmp_path / "a.txt").write_text("one text\n" * 20)
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n' * 9)
    names = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    data = DataConfig(names, tmp_path / "cache", corpus_weights=(1.0, 2.0))
    corpora = prepare_all(data, TokenizerConfig("byte"))
    digests = [made.digest[:16] for made in (*corpora, together(corpora))]
    assert digests == ["9fecfa09e0c2b929", "d0e2d6aecd5b1810", "b931c282e014546b"]

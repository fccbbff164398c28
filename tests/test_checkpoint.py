"""Checkpoints are complete or absent, verified before use, and contain nothing executable."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.run import checkpoint as ck
from gpt.run.layout import MANIFEST, REQUIRED
from gpt.training.config import OptimConfig
from gpt.training.optim import build_optimizers
from gpt.training.optimizer_state import optimizer_tensors
from gpt.training.state import load_training_state, read_state, training_tensors


def trained(optimizer: str = "adamw", steps: int = 2, **options):
    """Train a model for a few steps; return it and its optimizers."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 8, "vocab_size": 11, **options}))
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer))
    for _ in range(steps):
        model.loss(torch.randint(11, (2, 8)), torch.randint(11, (2, 8))).backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
    return model, optimizers


def save_checkpoint(directory: Path, model, optimizers, state: dict, *, keep: int, best: bool = False) -> Path:
    """Store a model and its optimizers as a checkpoint of state["step"]."""
    kind = "best" if best else "step"
    ck.store(directory, training_tensors(model, optimizers), state, keep=keep, kinds=(kind,))
    return directory / f"{kind}_{state['step']:08d}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("options", [{}, {"tied_embeddings": True, "bias": True}], ids=["untied", "tied"])
def test_a_checkpoint_restores_everything_bit_for_bit(tmp_path, optimizer, options):
    model, optimizers = trained(optimizer, **options)
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 7, "note": [1, "x"]}, keep=2)
    other, others = trained(optimizer, steps=0, **options)
    assert load_training_state(path, other, others) == {"step": 7, "note": [1, "x"]}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    saved, restored = optimizer_tensors(model, optimizers), optimizer_tensors(other, others)
    assert saved.keys() == restored.keys()
    assert all(torch.equal(saved[key], restored[key]) for key in saved)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    model, optimizers = trained()
    for step in (5, 10, 200):
        save_checkpoint(tmp_path, model, optimizers, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000200"]


def test_leftovers_of_a_killed_save_are_deleted_and_never_loaded(tmp_path):
    model, optimizers = trained()
    (tmp_path / ".step_00000009.123.tmp").mkdir()
    save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_failed_write_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    model, optimizers = trained()
    good = save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=1)

    def no_space(tensors, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(ck, "save_file", no_space)
    with pytest.raises(UserError, match=r"step_00000006.*No space left on device"):
        save_checkpoint(tmp_path, model, optimizers, {"step": 6}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]
    assert ck.verify(good) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "deleted"]
)
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_used(tmp_path, name, damage):
    model, optimizers = trained()
    older = save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=2)
    newer = save_checkpoint(tmp_path, model, optimizers, {"step": 6}, keep=2)
    damage(newer / name)
    said = []
    assert ck.newest_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1 and name in said[0] and "step_00000006" in said[0]
    shutil.rmtree(older)
    with pytest.raises(UserError, match=name):
        ck.newest_checkpoint(tmp_path, said.append)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model.safetensors": 3}', "not json"], ids=["empty", "list", "short", "text"]
)
def test_a_damaged_manifest_is_a_fault_not_a_traceback(tmp_path, text):
    model, optimizers = trained()
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=2)
    (path / MANIFEST).write_text(text)
    assert "manifest.json" in ck.verify(path)


def test_weights_of_another_model_are_refused(tmp_path):
    model, optimizers = trained()
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=2)
    with pytest.raises(UserError, match=r"blocks\.1"):
        ck.load_weights(path, trained(n_layer=2)[0])
    with pytest.raises(UserError, match=r"embed\.weight has shape \(11, 16\), the model wants \(13, 16\)"):
        ck.load_weights(path, trained(vocab_size=13, steps=0)[0])


def test_the_files_are_safetensors_and_json(tmp_path):
    model, optimizers = trained()
    path = save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=2)
    assert sorted(p.name for p in path.iterdir()) == sorted([*REQUIRED, MANIFEST])
    for name in ("state.json", MANIFEST):
        json.loads((path / name).read_text())


PLACE = {"epoch": 0, "index": 3, "seed": 1}
ODD_STATES = {
    "step": [None, -1, 1.0, True, "1", 1 << 53],
    "tokens": [None, -1, 2.5],
    "metrics_bytes": [None, -1, "5"],
    "loader": [
        None, [], 3, {"epoch": -1}, {"epoch": "0"}, {"packing": None}, {"corpora": {}}, {"corpora": 5},
        {"corpora": [3]}, {"corpora": [PLACE, {"epoch": -1}]}, {"corpora": [{"corpora": []}]},
        {**PLACE, "other": PLACE},
    ],
    "scaler": [None, [], {"scale": "1"}, {"scale": float("nan")}, {"scale": True}],
    "evaluations_since_best": [None, -1],
    "skipped": [None, -1],
    "evaluation_due": [None, 0, 1, "yes"],
    "guard": [
        None, [], {}, {"in_a_row": 0}, {"in_a_row": -1, "losses": []}, {"in_a_row": 0, "losses": 3},
        {"in_a_row": 0, "losses": ["1"]}, {"in_a_row": 0, "losses": [float("inf")]}, {"losses": []},
    ],
    "recipe": [None, [], "x"],
    "best": [[], 3, {}, {"val_loss": None}, {"val_loss": float("nan")}],
    "wandb_id": [3, []],
}  # fmt: skip
SOUND = {
    "step": 7,
    "tokens": 0,
    "metrics_bytes": (1 << 53) - 1,
    "loader": {"packing": "documents", "corpora": [PLACE, PLACE | {"packing": "stream"}], "epoch": 2},
    "scaler": {"scale": 0.5, "_growth_tracker": 3},
    "evaluations_since_best": 0,
    "skipped": 2,
    "evaluation_due": False,
    "guard": {"in_a_row": 0, "losses": [1.5, -2]},
    "recipe": {},
    "best": {"step": 1, "val_loss": 2},
    "wandb_id": "x",
}


@pytest.mark.parametrize("key", ODD_STATES)
def test_state_json_rejects_values_of_the_wrong_kind(tmp_path, key):
    path = tmp_path / "state.json"
    for state in (SOUND, {"step": 7}, SOUND | {"best": None, "wandb_id": None, "new in a later version": 3}):
        path.write_text(json.dumps(state))
        assert read_state(tmp_path) == state
    for value in ODD_STATES[key]:
        path.write_text(json.dumps(SOUND | {key: value}))
        with pytest.raises(UserError, match=f'state.json is not a training state: "{key}" is '):
            read_state(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"tokens": 3}'])
def test_state_json_needs_a_step(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match='is not a training state: it has no "step"'):
        read_state(tmp_path)


@pytest.mark.parametrize("text", ["", '{"step": 3', "[" * 100_000])
def test_state_json_must_be_json(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match="is not a training state: it is not JSON"):
        read_state(tmp_path)
    (tmp_path / "state.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*state.json: No such file"):
        read_state(tmp_path)


def test_a_save_keeps_a_users_file_in_its_folder(tmp_path):
    """A folder with the temporary name holds a file that no checkpoint has."""
    model, optimizers = trained()
    mine = tmp_path / f".step_00000005.{os.getpid()}.tmp" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*File exists"):
        save_checkpoint(tmp_path, model, optimizers, {"step": 5}, keep=2)
    assert mine.read_text() == "mine"

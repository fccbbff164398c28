"""Saving beside the training: what is saved is the state at the save, in order, and its errors come back."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from gpt import saver as module
from gpt.checkpoint import list_checkpoints, training_tensors, verify
from gpt.errors import UserError
from gpt.saver import Saver
from tests.test_checkpoint import trained


@pytest.fixture
def gate(monkeypatch):
    """The thread writes nothing until the gate is set."""
    gate, store = threading.Event(), module.store

    def later(*arguments, **options):
        assert gate.wait(60)
        store(*arguments, **options)

    monkeypatch.setattr(module, "store", later)
    yield gate
    gate.set()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_saved_is_the_state_at_the_save(tmp_path, gate, optimizer):
    model, optimizers = trained(optimizer)
    live = training_tensors(model, optimizers)
    then = {file: {name: value.clone() for name, value in tensors.items()} for file, tensors in live.items()}
    saver = Saver(tmp_path, keep=2)
    saver.save(live, {"step": 1})
    for tensors in live.values():
        for value in tensors.values():
            value.add_(1)
    gate.set()
    saver.wait()
    for file, tensors in then.items():
        saved = load_file(tmp_path / "step_00000001" / file)
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[name], tensors[name]) for name in tensors)


def test_a_save_waits_for_the_one_before(tmp_path, gate):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=2)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    first = saver._thread
    second = threading.Thread(target=saver.save, args=(training_tensors(model, optimizers), {"step": 2}))
    second.start()
    assert saver._thread is first and not list_checkpoints(tmp_path)
    gate.set()
    second.join()
    saver.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000001"]


def test_an_error_of_the_thread_is_raised_once_and_the_older_checkpoint_stays(tmp_path, monkeypatch):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt.checkpoint.save_file", full)
    saver.save(training_tensors(model, optimizers), {"step": 2})
    with pytest.raises(UserError, match=r"step_00000002.*No space left on device"):
        saver.wait()
    saver.check()
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert verify(tmp_path / "step_00000001") is None


def test_an_exit_waits_for_the_thread(tmp_path, gate):
    """Python joins the threads that are no daemons before it ends."""
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    assert saver._thread.is_alive() and not saver._thread.daemon


def test_the_best_is_kept_apart_from_the_newest(tmp_path):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=2)
    for step, kinds in {1: ("step", "best"), 2: ("best",), 3: ("step",), 4: ("step",), 5: ("step",)}.items():
        saver.save(training_tensors(model, optimizers), {"step": step}, kinds=kinds)
    saver.wait()
    names = ["step_00000005", "step_00000004", "best_00000002"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_ranks_that_write_nothing(tmp_path, monkeypatch):
    """directory None: a save copies nothing and starts no thread, and there is nothing to prune."""
    monkeypatch.setattr(module, "snapshot", None)
    saver = Saver(None, keep=1)
    saver.save({}, {"step": 1})
    saver.prune(1)
    assert saver._thread is None


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(module, "flush", lambda path: done.append(path.name))
    monkeypatch.setattr(module, "store", lambda directory, tensors, state, **_: done.append(state["step"]))
    saver = Saver(tmp_path, keep=1, metrics=tmp_path / "metrics.jsonl")
    saver.save({}, {"step": 7})
    saver.wait()
    assert done == ["metrics.jsonl", 7]


def test_metrics_that_cannot_be_flushed_are_named(tmp_path):
    saver = Saver(tmp_path, keep=1, metrics=tmp_path / "metrics.jsonl")
    saver.save({}, {"step": 1})
    expected = f"cannot write {tmp_path}/metrics.jsonl: No such file or directory; the checkpoints are untouched"
    with pytest.raises(UserError, match=expected):
        saver.wait()
    assert list(tmp_path.iterdir()) == []


def test_pruning_waits_for_the_save_before(tmp_path, gate):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 2})
    second = threading.Thread(target=saver.prune, args=(1,))
    second.start()
    gate.set()
    second.join()
    assert saver._thread is None
    assert list_checkpoints(tmp_path) == []  # the save is of a course that the run has left


def test_check_does_not_wait(tmp_path, gate):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    saver.check()
    assert saver._thread.is_alive()


def test_an_interrupt_in_the_thread_is_raised_too(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "store", interrupt)
    saver = Saver(tmp_path, keep=1)
    saver.save({}, {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        saver.save({}, {"step": 2})

"""The saver thread writes the state at each save, in order, and its errors are raised."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt.errors import UserError
from gpt.run.checkpoint import list_checkpoints, verify
from gpt.training import saver as module
from gpt.training.parallel import Parallel
from gpt.training.saver import Saver
from gpt.training.state import training_tensors
from tests.test_checkpoint import trained
from tests.train_checks import names_in, run


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
def test_a_save_writes_the_state_at_its_start(tmp_path, gate, optimizer):
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


def test_a_snapshot_is_in_cpu_memory():
    with FakeTensorMode():
        tensors = {"a": {"x": torch.empty(4, 3, device="cuda").T, "y": torch.empty(2, dtype=torch.bfloat16)}}
        copies = module.snapshot(tensors)["a"]
    assert [(x.device.type, x.shape, x.dtype) for x in copies.values()] == [
        ("cpu", (3, 4), torch.float32),
        ("cpu", (2,), torch.bfloat16),
    ]
    assert all(x.is_contiguous() for x in copies.values())


def test_a_save_waits_for_the_previous_one(tmp_path, gate):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=2)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    first = saver._saving
    second = threading.Thread(target=saver.save, args=(training_tensors(model, optimizers), {"step": 2}))
    second.start()
    assert saver._saving is first and not list_checkpoints(tmp_path)
    gate.set()
    second.join()
    saver.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000001"]


def test_a_thread_error_is_raised_once_and_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    saver.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt.run.checkpoint.save_file", full)
    saver.save(training_tensors(model, optimizers), {"step": 2})
    with pytest.raises(UserError, match=r"step_00000002.*No space left on device"):
        saver.wait()
    saver.check()
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert verify(tmp_path / "step_00000001") is None


@pytest.mark.parametrize("end", ["", "raise KeyboardInterrupt"], ids=["end", "ctrl-c"])
def test_an_exit_waits_for_the_thread(tmp_path, end):
    program = f"""
import sys, threading, time, torch
from pathlib import Path
from gpt.training import saver
store, begun = saver.store, threading.Event()
def slow(*arguments, **options):
    begun.set()
    time.sleep(0.5)
    store(*arguments, **options)
saver.store = slow
saver.Saver(Path(sys.argv[1]), keep=1).save({{"model.safetensors": {{"a": torch.ones(3)}}}}, {{"step": 1}})
begun.wait()
{end}
"""
    subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, check=not end)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=2)
    for step, kinds in {1: ("step", "best"), 2: ("best",), 3: ("step",), 4: ("step",), 5: ("step",)}.items():
        saver.save(training_tensors(model, optimizers), {"step": step}, kinds=kinds)
    saver.wait()
    names = ["step_00000005", "step_00000004", "best_00000002"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert {path.name for path in tmp_path.iterdir()} == {*names}


def test_other_ranks_write_no_checkpoint(tmp_path, monkeypatch):
    """With directory None a save copies nothing and starts no thread, and pruning does nothing."""
    monkeypatch.setattr(module, "snapshot", None)
    saver = Saver(None, keep=1)
    saver.save({}, {"step": 1})
    saver.prune(1)
    assert saver._saving is None


def test_metrics_are_flushed_before_the_checkpoint_that_relies_on_them(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(module, "flush", lambda path: done.append(path.name))
    monkeypatch.setattr(module, "store", lambda directory, tensors, state, **_: done.append(state["step"]))
    saver = Saver(tmp_path, keep=1, metrics=tmp_path / "metrics.jsonl")
    saver.save({}, {"step": 7})
    saver.wait()
    assert done == ["metrics.jsonl", tmp_path.name, 7]


def test_metrics_that_cannot_be_flushed_are_named(tmp_path):
    saver = Saver(tmp_path, keep=1, metrics=tmp_path / "metrics.jsonl")
    saver.save({}, {"step": 1})
    expected = f"cannot write {tmp_path}/metrics.jsonl: No such file or directory; the checkpoints are untouched"
    with pytest.raises(UserError, match=expected):
        saver.wait()
    assert list(tmp_path.iterdir()) == []


def test_pruning_waits_for_the_previous_save(tmp_path, gate):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 2})
    second = threading.Thread(target=saver.prune, args=(1,))
    second.start()
    gate.set()
    second.join()
    assert saver._saving is None
    assert list_checkpoints(tmp_path) == []  # the save is of a course that the run has left


def test_check_does_not_wait(tmp_path, gate):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    saver.check()
    assert not saver._saving.done()


def test_an_interrupt_in_the_thread_is_raised(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "store", interrupt)
    saver = Saver(tmp_path, keep=1)
    saver.save({}, {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        saver.save({}, {"step": 2})


@pytest.fixture
def late(monkeypatch):
    """Make the thread write only when someone waits for it; return a list with an entry for each write."""
    waited, written, store, close = threading.Event(), [], module.store, Saver.close

    def write(directory, tensors, state, **options):
        assert waited.wait(60)
        waited.clear()
        store(directory, tensors, state, **options)
        written.append(f"step {state['step']} is written")

    def wait(self):
        if self._saving is not None and not self._saving.done():
            waited.set()
        close(self)

    monkeypatch.setattr(module, "store", write)
    monkeypatch.setattr(Saver, "close", wait)
    yield written
    waited.set()


def test_in_place_saves_make_no_copy_and_delay_changes(tmp_path, monkeypatch, late):
    monkeypatch.setattr(module, "snapshot", None)
    model, optimizers = trained()
    live = training_tensors(model, optimizers)
    then = {file: {name: value.clone() for name, value in tensors.items()} for file, tensors in live.items()}
    saver = Saver(tmp_path, keep=1, in_place=True)
    saver.save(live, {"step": 1})
    assert late == []
    saver.before_change()
    assert late == ["step 1 is written"]
    for tensors in live.values():
        for value in tensors.values():
            value.add_(1)
    for file, tensors in then.items():
        saved = load_file(tmp_path / "step_00000001" / file)
        assert all(torch.equal(saved[name], tensors[name]) for name in tensors)


def test_a_copy_may_be_written_after_the_change(tmp_path, late):
    model, optimizers = trained()
    saver = Saver(tmp_path, keep=1)
    saver.save(training_tensors(model, optimizers), {"step": 1})
    saver.before_change()
    assert late == []
    saver.wait()
    assert late == ["step 1 is written"]


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"eval_interval": 3}], ids=["adamw", "muon", "alone"])
def test_training_saves_its_state_at_each_checkpoint(folder, capsys, monkeypatch, late, options):
    """Each in-place save is written at the latest possible moment, or during an evaluation."""
    monkeypatch.setattr(module, "snapshot", None)
    options = {"max_steps": 4, "checkpoint_interval": 1, "eval_interval": 2, "ema_decay": 0.5, **options}
    savers, init, eval_loss = [], Saver.__init__, Parallel.eval_loss
    monkeypatch.setattr(
        Saver, "__init__", lambda self, *words, **named: savers.append(self) or init(self, *words, **named)
    )
    monkeypatch.setattr(Parallel, "eval_loss", lambda *batch, **named: savers[-1].close() or eval_loss(*batch, **named))
    words = ["--keep-checkpoints", "9"]
    assert run(*words, **options) == 0
    assert len(late) >= 4
    save = Saver.save

    def save_at_once(self, *arguments, **named):
        save(self, *arguments, **named)
        self.wait()

    monkeypatch.setattr(Saver, "save", save_at_once)
    assert run(*words, run_dir="plain", **options) == 0
    names = names_in("run/checkpoints")
    assert names == names_in("plain/checkpoints")
    for name in names:
        for file in ("model", "optimizer", "average"):
            at_once, later = (Path(of, "checkpoints", name, f"{file}.safetensors") for of in ("plain", "run"))
            assert at_once.read_bytes() == later.read_bytes(), f"{name}/{file}"


def test_writing_needs_no_memory_for_the_tensors(tmp_path):
    """Compares the peak memory of a separate process before and after a save of 256 MiB."""
    program = """
import resource, sys, torch
from pathlib import Path
from gpt.training.saver import Saver
tensors = {"model.safetensors": {name: torch.ones(32 << 20) for name in "ab"}}
saver = Saver(Path(sys.argv[1]), keep=1, in_place=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
saver.save(tensors, {"step": 1})
saver.wait()
rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(rise // 1024 if sys.platform == "darwin" else rise)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 10  # KiB; one of the two tensors has 128 MiB

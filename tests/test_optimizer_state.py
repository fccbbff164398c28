"""Optimizers of torch and of these tests train, skip steps, save and resume bit for bit."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import optim

from gpt.config import ModelConfig
from gpt.distributed import World, local
from gpt.errors import UserError
from gpt.model import GPT
from gpt.run.checkpoint import store
from gpt.training.muon import Muon
from gpt.training.optimizer_state import begin_states, optimizer_tensors, restore_optimizers, skips_by_itself, take_step
from gpt.training.parallel import Parallel
from gpt.training.plan import state_bytes
from gpt.training.schedule import set_learning_rate
from gpt.training.state import load_training_state, training_tensors
from gpt.training.step import gradient_norm
from tests.optimizer_checks import MAKERS, Counting, use_optimizer
from tests.test_guard import Waits, WaitsInPython
from tests.train_checks import lasting, run, weights_of


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, seq_len=8, vocab_size=11))


def set_gradients(model: GPT, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw)


def spoil_gradients(model: GPT) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan if p.ndim == 2 else math.inf)


def step(model: GPT, optimizer: optim.Optimizer, number: int) -> None:
    set_gradients(model, number)
    set_learning_rate([optimizer], 1 / number)
    take_step(optimizer, torch.zeros(()))


def everything(model: GPT, optimizer: optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **optimizer_tensors(model, [optimizer])}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("name", MAKERS)
def test_a_skipped_step_changes_nothing(name):
    """For any gradients: before the first step, between two steps, and after the last."""
    (one, bad), (two, good) = (
        (model, MAKERS[name](list(model.parameters()))) for model in (tiny_model(), tiny_model())
    )
    for number in range(1, 4):
        before = everything(one, bad)
        spoil_gradients(one)
        take_step(bad, torch.ones(()))
        if not skips_by_itself(bad):
            assert_same(everything(one, bad), before)
        step(one, bad, number)
        step(two, good, number)
        assert_same(everything(one, bad), everything(two, good))


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_training_is_bit_equal(name, tmp_path):
    model = tiny_model()
    optimizer = MAKERS[name](list(model.parameters()))
    for number in range(1, 4):
        step(model, optimizer, number)
    store(tmp_path, training_tensors(model, [optimizer]), {"step": 3}, keep=1, kinds=("step",))
    other = tiny_model()
    resumed = MAKERS[name](list(other.parameters()))
    assert load_training_state(tmp_path / "step_00000003", other, [resumed]) == {"step": 3}
    assert_same(everything(model, optimizer), everything(other, resumed))
    for number in range(4, 6):
        for each in ((model, optimizer), (other, resumed)):
            step(*each, number)
    assert_same(everything(model, optimizer), everything(other, resumed))


@pytest.mark.parametrize("name", ["sgd-momentum", "adam-amsgrad", "rmsprop", "nadam", "lion-without-count"])
def test_only_the_first_step_waits_for_the_device(name):
    model = tiny_model()
    optimizer = MAKERS[name](list(model.parameters()))
    step(model, optimizer, 1)
    set_gradients(model, 2)
    with Waits() as waits, WaitsInPython(waits):
        take_step(optimizer, torch.zeros(()))
        alone = waits.count
        waits.count = 0
        optimizer.step()  # what torch's own step waits for on a CPU
        assert alone == waits.count


def test_optimizers_that_support_found_inf():
    weights = [torch.nn.Parameter(torch.zeros(2, 2))]
    skips = {"muon": Muon(weights, lr=0.1), **{name: maker(weights) for name, maker in MAKERS.items()}}
    assert {name for name, optimizer in skips.items() if skips_by_itself(optimizer)} == {"muon", "adamw-fused-amsgrad"}


def test_begin_states_does_not_change_the_weights():
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    for name, maker in MAKERS.items():
        optimizer = maker(list(model.parameters()))
        begin_states(optimizer)
        assert all(map(torch.equal, model.parameters(), before)), name
        assert all(p.grad is None for p in model.parameters())
        other = maker(list(model.parameters()))
        set_gradients(model, 1)
        other.step()
        assert optimizer_tensors(model, [optimizer]).keys() == optimizer_tensors(model, [other]).keys()
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)
                p.grad = None


def test_begin_states_does_not_change_group_states():
    model = tiny_model()
    optimizer = Counting(model.parameters(), quiet=False)
    for number in (1, 2, 3):
        step(model, optimizer, number)
    before = everything(model, optimizer)
    assert before["groups.0.k"].item() == 3.5
    optimizer.state.clear()
    begin_states(optimizer)
    after = everything(model, optimizer)
    assert after.keys() == before.keys()
    for name in before:
        expected = torch.zeros_like(before[name]) if name.endswith(".sum") else before[name]
        assert torch.equal(after[name], expected), name


def test_the_plan_asks_an_optimizer_for_its_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, maker in MAKERS.items():
        if name.startswith("lion"):  # it makes a tensor of numbers
            continue
        model = tiny_model()
        optimizer = maker(list(model.parameters()))
        step(model, optimizer, 1)
        kept = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
        with FakeTensorMode(allow_non_fake_inputs=True):
            planned = state_bytes(maker(list(tiny_model().parameters())))
        assert planned == sum(v.numel() * v.element_size() for v in kept), name


def test_states_of_another_optimizer_are_refused():
    model = tiny_model()
    adam, rmsprop = MAKERS["adam-amsgrad"](model.parameters()), MAKERS["rmsprop"](model.parameters())
    step(model, adam, 1)
    saved = optimizer_tensors(model, [adam])
    with pytest.raises(
        UserError, match=r"only the checkpoint's optimizer keeps '\S+exp_avg': resume with the same --opt"
    ):
        restore_optimizers(model, [rmsprop], saved)
    del saved["embed.weight.max_exp_avg_sq"]
    with pytest.raises(UserError, match=r"only this run's optimizer keeps 'embed\.weight\.max_exp_avg_sq'"):
        restore_optimizers(model, [adam], saved)
    with pytest.raises(UserError, match=r"only the checkpoint's optimizer keeps '\S+max_exp_avg_sq'"):
        restore_optimizers(model, [optim.Adam(model.parameters())], optimizer_tensors(model, [adam]))
    other = optimizer_tensors(model, [adam])
    other["embed.weight.exp_avg"] = torch.zeros(16, 11)
    with pytest.raises(UserError, match=r"'embed\.weight\.exp_avg' does not fit its weight of \(11, 16\)"):
        restore_optimizers(model, [adam], other)
    other["embed.weight.exp_avg"] = torch.zeros(11, 16, dtype=torch.int64)
    with pytest.raises(UserError, match=r"'embed\.weight\.exp_avg' does not fit its weight"):
        restore_optimizers(model, [adam], other)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "groups.0.steps",
            torch.zeros(2),
            "the checkpoint's optimizer state 'groups.0.steps' does not fit: resume with",
        ),
        ("groups.0.largest", torch.zeros(1), "the checkpoint's optimizer state 'groups.0.largest' does not fit"),
        ("groups.1.steps", torch.tensor(3), "only the checkpoint's optimizer keeps 'groups.1.steps': resume with"),
        ("groups.-1.steps", torch.tensor(3), "only the checkpoint's optimizer keeps 'groups.-1.steps'"),
    ],
)
def test_states_of_a_group_that_do_not_fit_are_refused(name, value, message):
    model = tiny_model()
    optimizer = Counting(model.parameters())
    step(model, optimizer, 1)
    saved = optimizer_tensors(model, [optimizer])
    restore_optimizers(model, [optimizer], saved)
    with pytest.raises(UserError, match=message):
        restore_optimizers(model, [optimizer], saved | {name: value})


def test_a_state_that_a_checkpoint_cannot_hold_is_named():
    model = tiny_model()
    sgd = MAKERS["sgd"](model.parameters())
    sgd.state[model.embed.weight]["seen"] = ["a list"]
    with pytest.raises(UserError, match="the optimizer SGD keeps 'seen' as a list"):
        optimizer_tensors(model, [sgd])


@pytest.mark.parametrize("name", ["sgd", "nadam", "adafactor", "lion"])
def test_the_command_skips_and_resumes_with_it(folder, capsys, monkeypatch, name):
    """A run stopped after a bad step and resumed ends with the weights of an uninterrupted one."""
    use_optimizer(monkeypatch, name)
    true_loss, calls = GPT.loss, []

    def loss(self, *args, **options):
        calls.extend([1] * self.training)
        return true_loss(self, *args, **options) * (math.nan if self.training and len(calls) in (1, 4) else 1.0)

    monkeypatch.setattr(GPT, "loss", loss)
    options = {"n_layer": 1, "checkpoint_interval": 5, "eval_interval": 100}
    assert run(max_steps=5, schedule="constant", **options) == 0
    assert run("--resume", max_steps=8, schedule="constant", **options) == 0
    calls.clear()
    assert run(run_dir="constant", max_steps=8, schedule="constant", **options) == 0
    one, two = weights_of("run", 8), weights_of("constant", 8)
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert sum(r.get("skipped_steps", 0) for r in lasting("constant")) == 2


SHARDED = ["sgd-momentum", "adam-amsgrad", "adagrad", "rmsprop", "nadam", "local-momentum"]


@pytest.fixture
def world():
    """Make a process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(torch.device("cpu"), joined=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_weights_are_skipped_saved_and_resumed(world, tmp_path, name):
    """FSDP2, compared with the same steps of a plain model."""

    def sharded() -> tuple[GPT, optim.Optimizer]:
        model = tiny_model()
        Parallel(model, world, "fsdp")
        return model, MAKERS[name](list(model.parameters()))

    def gradients(model: GPT, number: int, bad: bool = False) -> None:
        draw = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
            local(p.grad).copy_(torch.randn(p.shape, generator=draw) * (math.nan if bad else 1.0))

    model, optimizer = sharded()
    for number in (1, 2, 3):
        for bad in (True, False):
            gradients(model, number, bad)
            assert bool(gradient_norm(list(model.parameters())).isfinite()) != bad
            take_step(optimizer, torch.tensor(float(bad)))
    store(tmp_path, training_tensors(model, [optimizer], None, world), {"step": 3}, keep=1, kinds=("step",))
    plain = tiny_model()
    alone = MAKERS[name](list(plain.parameters()))
    for number in (1, 2, 3):
        gradients(plain, number)
        take_step(alone, torch.zeros(()))
    other, resumed = sharded()
    load_training_state(tmp_path / "step_00000003", other, [resumed])
    for number in (4, 5):
        for each, own in ((plain, alone), (other, resumed)):
            gradients(each, number)
            take_step(own, torch.zeros(()))
    saved, expected = training_tensors(other, [resumed], None, world), training_tensors(plain, [alone])
    for file in expected:
        assert_same(expected[file], saved[file])

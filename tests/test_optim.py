"""Schedules in closed form, Muon against the singular value decomposition, parameter groups."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.model.roles import weights_of
from gpt.training.average import Average
from gpt.training.config import OptimConfig
from gpt.training.muon import Muon, orthogonalize
from gpt.training.optim import build_optimizers
from gpt.training.schedule import lr_scale, set_learning_rate
from gpt.training.step import gradient_norm, scale_gradients


def tiny_model(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "seq_len": 8, "vocab_size": 11, **options}))


def test_warmup_then_cosine():
    config = OptimConfig(schedule="cosine", warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    scales = [lr_scale(step, 110, config) for step in range(111)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert scales[10:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2 for i in range(101)])


def test_warmup_then_a_line():
    config = OptimConfig(schedule="linear", warmup_steps=4, learning_rate=1.0, min_lr=0.2)
    scales = [lr_scale(step, 24, config) for step in range(25)]
    assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
    assert scales[4:] == pytest.approx([1 - 0.8 * i / 20 for i in range(21)])


def test_warmup_stable_decay():
    config = OptimConfig(schedule="wsd", warmup_steps=5, decay_fraction=0.25, learning_rate=2.0, min_lr=0.5)
    scales = [lr_scale(step, 100, config) for step in range(101)]
    assert scales[4:75] == [1.0] * 71
    assert scales[75:] == pytest.approx([1 - 0.75 * i / 25 for i in range(26)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_decay_shorter_than_a_step_ends_at_the_last(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=3, decay_fraction=0.01, learning_rate=1.0, min_lr=0.25)
    scales = [lr_scale(step, 4, config) for step in range(5)]
    assert scales == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0, 0.25])
    assert lr_scale(3, 3, config) == 0.25  # all of it warm-up


def test_constant_schedule_ignores_min_lr():
    config = OptimConfig(schedule="constant", warmup_steps=0)
    assert {lr_scale(step, 50, config) for step in range(50)} == {1.0}


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 64)], ids=str)
def test_orthogonalize_sends_singular_values_near_one(shape):
    """Singular vectors stay, and all singular values but tiny ones follow the quintic iteration."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(G.double(), full_matrices=False)
    x = S / (S.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(
        orthogonalize(G, 5, torch.float32).double(), U @ torch.diag_embed(x) @ V, atol=2e-4, rtol=0
    )
    assert x.max() < 1.3
    assert x[S > 0.1 * S.max()].min() > 0.6


class Sizes(TorchDispatchMode):
    """Record the largest number of elements in the result of a matrix product."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("shape", [(2, 48, 16), (2, 16, 64)], ids=str)
def test_newton_schulz_multiplies_along_the_short_side(shape):
    with Sizes() as sizes:
        orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert sizes.most == math.prod(shape)


def test_muon_step_is_the_written_rule():
    """Two steps of momentum, Nesterov, decay and scaling, computed by hand for a tall matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 4, generator=generator)
    p = torch.nn.Parameter(weight.clone())
    muon = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    buffer = torch.zeros_like(weight)
    for _ in range(2):
        grad = torch.randn(12, 4, generator=generator)
        p.grad = grad.clone()
        muon.step()
        buffer = 0.9 * buffer + 0.1 * grad
        update = orthogonalize(0.1 * grad + 0.9 * buffer)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(3) * update
    torch.testing.assert_close(p.detach(), weight, atol=1e-5, rtol=1e-5)


def test_muon_by_itself_has_the_papers_options_and_no_decay():
    w = torch.nn.Parameter(torch.eye(3))
    muon = Muon([w], 0.5)
    assert muon.defaults == {"lr": 0.5, "momentum": 0.95, "weight_decay": 0.0, "ns_steps": 5, "row_splits": None}
    w.grad = torch.zeros(3, 3)
    muon.step()
    assert w.equal(torch.eye(3))


def test_muon_leaves_weights_without_a_gradient_alone():
    still, moved = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.eye(3))
    moved.grad = torch.ones(3, 3)
    Muon([{"params": [still]}, {"params": [moved]}], 0.5, weight_decay=0.1).step()
    assert still.equal(torch.eye(3)) and not moved.equal(torch.eye(3))


def test_muon_orthogonalises_queries_keys_and_values_separately():
    grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = torch.nn.Parameter(torch.zeros(24, 8)), [torch.nn.Parameter(torch.zeros(n, 8)) for n in (16, 4, 4)]
    whole.grad = grad.clone()
    for p, g in zip(parts, grad.split((16, 4, 4)), strict=True):
        p.grad = g.clone()
    Muon([{"params": [whole], "row_splits": (16, 4, 4)}], lr=1.0).step()
    Muon(parts, lr=1.0).step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]))


@pytest.mark.parametrize("shape", [(3, 8, 6), (2, 5, 12), (2, 3, 4, 4)], ids=str)
def test_muon_orthogonalises_the_matrices_of_a_stack_separately(shape):
    """Like weights of experts: each matrix moves as it would alone."""
    start, grads = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).split((1, 2))
    stack = torch.nn.Parameter(start[0].clone())
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in start[0].flatten(0, -3)]
    together, apart = Muon([stack], lr=0.1, weight_decay=0.2), Muon(alone, lr=0.1, weight_decay=0.2)
    for grad in grads:
        stack.grad = grad.clone()
        for p, g in zip(alone, grad.flatten(0, -3), strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach().flatten(0, -3), torch.stack([p.detach() for p in alone]))
    assert not stack.equal(start[0])


def test_each_weight_has_the_role_that_its_module_says():
    model = tiny_model(value_embeds=1, position="learned", bias=True, norm="layernorm")
    names = {p: name for name, p in model.named_parameters()}
    roles = {names[weight.parameter]: weight.role for weight in weights_of(model)}
    assert list(roles) == [name for name, _ in model.named_parameters()]
    kinds = {"embed": "embedding", "position_embed": "embedding", "value_embeds.0": "value_embedding", "head": "head"}
    block = {"c_qkv": "hidden", "c_fc": "hidden", "c_proj": "residual_out", "value_gate": "value_gate"}
    for name, role in roles.items():
        holder = name.removesuffix(".weight")
        expected = kinds.get(holder) or block.get(holder.rpartition(".")[2], "vector")
        assert role == ("vector" if name.endswith("bias") else expected), name
    tied = tiny_model(tied_embeddings=True)
    assert [weight.role for weight in weights_of(tied)].count("head") == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "preset", [{}, {"bias": True, "position": "learned", "tied_embeddings": True}], ids=["modern", "old"]
)
def test_every_weight_has_exactly_one_group(optimizer, preset):
    model = tiny_model(**preset)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer))
    grouped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_only_matrices_decay_under_adamw():
    model = tiny_model(bias=True, norm="layernorm")
    (adamw,) = build_optimizers(model, OptimConfig(weight_decay=0.3))
    for group in adamw.param_groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim >= 2 else 0.0)
        assert len({p.ndim >= 2 for p in group["params"]}) == 1


def test_adamw_is_torchs_own_rule():
    """One step on a known gradient, by the formula of Loshchilov & Hutter (2019)."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (adamw,) = build_optimizers(model, OptimConfig(learning_rate=0.01, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    adamw.step()
    for name, p in model.named_parameters():
        decay = 0.1 if p.ndim >= 2 else 0.0
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.01 * decay) - 0.01, atol=1e-6, rtol=1e-6)


def test_base_width_scales_what_grows_with_the_model():
    """Width 64, tuned at 16: a quarter of the rate for the blocks' matrices and the head; rate * decay unchanged."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=64, seq_len=8, vocab_size=11))
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, base_width=16)
    (optimizer,) = build_optimizers(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == set(names.values())
    for name, weight in model.named_parameters():
        hidden = "embed" not in name and weight.ndim > 1
        assert rates[name] == pytest.approx((0.025, 2.0) if hidden else (0.1, 0.5 if weight.ndim > 1 else 0.0)), name
    assert {g["peak_lr"] for g in optimizer.param_groups} == {0.1, 0.025}
    with pytest.raises(UserError, match="base_width goes with adamw"):
        OptimConfig(optimizer="muon", base_width=16)


WIDTHS = (64, 128, 256)


def final_loss(width: int, learning_rate: float, steps: int, **options) -> float:
    """Mean loss of the last tenth of a short training; the same batches for all widths."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=width // 32, n_embd=width, seq_len=16, vocab_size=32))
    config = OptimConfig(learning_rate=learning_rate, warmup_steps=steps // 10, **options)
    (optimizer,) = build_optimizers(model, config)
    generator, losses = torch.Generator().manual_seed(1), []
    table = torch.randint(32, (32, 32), generator=generator)
    for step in range(steps):
        rows = torch.randint(32, (16, 17), generator=generator)
        for i in range(2, 17):  # a text in which two tokens decide the next, mostly
            told = torch.rand(16, generator=generator) < 0.9
            rows[:, i] = torch.where(told, table[rows[:, i - 1], rows[:, i - 2]], rows[:, i])
        set_learning_rate([optimizer], lr_scale(step, steps, config))
        loss = model.loss(rows[:, :-1], rows[:, 1:])
        loss.backward()
        scale_gradients(list(model.parameters()), (1 / gradient_norm(list(model.parameters()))).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return sum(losses[-(steps // 10) :]) / (steps // 10)


def test_wider_is_better_at_one_learning_rate():
    """With the default optimizer and rate, on a text too long to be learned in this training."""
    losses = [final_loss(width, OptimConfig().learning_rate, 60) for width in WIDTHS]
    assert losses[0] - 0.1 > losses[1] > losses[2] + 0.1, losses


def test_set_learning_rate_scales_every_peak():
    config = OptimConfig(optimizer="muon", learning_rate=0.02, embedding_lr=0.3, head_lr=0.004)
    optimizers = build_optimizers(tiny_model(), config)
    set_learning_rate(optimizers, 0.5)
    rates = [group["lr"] for o in optimizers for group in o.param_groups]
    assert rates == pytest.approx([0.01, 0.01, 0.15, 0.002])


def test_the_average_is_the_weighted_sum_of_all_weights():
    """After n steps d^n w_0 + (1 - d) (d^(n-1) w_1 + ... + w_n); a skipped step does not count."""
    model, draw = torch.nn.Linear(3, 2), torch.Generator().manual_seed(0)
    seen = [model.weight.detach().double().clone()]
    average = Average(model, decay=0.75)
    for skipped in (0.0, 1.0, 0.0, 0.0):
        model.weight.data.copy_(torch.randn(2, 3, generator=draw))
        average.update(torch.tensor(skipped))
        seen += [model.weight.detach().double().clone()] if not skipped else []
    first, second, third, last = seen
    expected = 0.75**3 * first + 0.25 * (0.75**2 * second + 0.75 * third + last)
    torch.testing.assert_close(average.tensors["weight"].double(), expected, atol=1e-6, rtol=0)
    with average.swapped_in():
        torch.testing.assert_close(model.weight.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(model.weight.double(), last)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_with_found_inf_changes_nothing(optimizer):
    """For any gradients, weights, moments and step counts stay, bit for bit."""
    config = OptimConfig(optimizer=optimizer, weight_decay=0.1)
    one, two = tiny_model(), tiny_model()
    both = [(model, build_optimizers(model, config)) for model in (one, two)]
    for bad in (False, True, False, True):
        for model, optimizers in both[: 1 if bad else 2]:
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan if p.ndim == 2 else math.inf) if bad else torch.ones_like(p) / 7
            for o in optimizers:
                o.found_inf = torch.tensor(float(bad))
                o.step()
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)
    for o, other in zip(both[0][1], both[1][1]):
        for state, expected in zip(o.state.values(), other.state.values()):
            assert all(torch.equal(state[key], expected[key]) for key in expected)

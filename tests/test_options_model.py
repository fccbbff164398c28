"""Every option of the model changes its computation, each in its own way."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.model import attention as attention_module
from tests.option_checks import Case, check, ignore, missing

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "mlp_dim": 40, "seq_len": 12, "vocab_size": 11}
IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


def drawn(model: GPT) -> GPT:
    """Set weights that depend on their names and shapes alone."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def logits(model: GPT) -> list[float]:
    with torch.no_grad():
        return drawn(model)(IDX)[0, -1].tolist()


def sees(model: GPT) -> list[int]:
    """List the tokens that the last token's logits depend on."""
    with torch.no_grad():
        before, found = drawn(model)(IDX)[0, -1], []
        for i in range(IDX.shape[1]):
            other = IDX.clone()
            other[0, i] = 0
            if not torch.equal(model(other)[0, -1], before):
                found.append(i)
    return found


def rows_of(part: str):
    """Look at the rows and columns of a weight."""
    return lambda model: list(model.get_parameter(part).shape)


def longest(model: GPT) -> int:
    """Find the longest row that the model accepts."""
    for T in range(1, 99):
        try:
            model(torch.zeros(1, T, dtype=torch.int64))
        except ValueError:
            return T - 1
    return 99


def means_order(model: GPT) -> bool:
    """Whether the order of earlier tokens changes the logits."""
    with torch.no_grad():
        there, back = (drawn(model)(torch.tensor([row])) for row in ([1, 2, 3, 4], [3, 2, 1, 4]))
    return (there[0, -1] - back[0, -1]).abs().max().item() > 1e-3


def dropped(model: GPT) -> tuple[float, float, float]:
    """Measure the shares that dropout drops: of embeddings, attention weights and sublayers' outputs."""
    model, shares, true_attention = drawn(model).train(), {}, attention_module.attention

    def attention(*args, dropout_p: float, **options):
        shares["attention"] = dropout_p
        return true_attention(*args, **options)

    def share(name: str, dropped: torch.Tensor) -> None:
        shares[name] = dropped.float().mean().item()

    model.dropout.register_forward_hook(lambda layer, x, y: share("embeddings", y == 0))
    model.blocks[0].mlp.c_proj.register_forward_hook(
        lambda layer, x, options, y: share("sublayers", y == options["residual"]), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "attention", attention)
        torch.manual_seed(0)
        model(IDX.repeat(20, 1))
    return shares["embeddings"], shares["attention"], shares["sublayers"]


def spread(model: GPT) -> tuple[float, ...]:
    """Measure the initial spread of the table, a matrix, the head and an output projection."""
    torch.manual_seed(0)
    model.init_weights()
    weights = model.embed, model.blocks[0].mlp.c_fc, model.head, model.blocks[0].mlp.c_proj
    return tuple(layer.weight.std().item() for layer in weights)


# Of the table, a matrix, the head and a projection into the residual stream; C is 32, the MLP is 40 wide and gated.
SPREADS = {
    "gpt2": (0.02, 0.02, 0.02, 0.02 / 2),
    "xavier": (32**-0.5, math.sqrt(2 / (32 + 80)), math.sqrt(2 / (32 + 11)), math.sqrt(2 / (32 + 40))),
}

CASES = [
    Case("n_layer", (3,), lambda model: len(model.blocks), lambda base, look, value: (base, look) == (2, value)),
    Case(
        "n_head",
        (2,),
        rows_of("blocks.0.attn.c_proj.weight"),
        lambda base, look, value: (base, look) == ([32, 32], [32, 16]),
        {"head_dim": 8},
    ),
    Case(
        "n_kv_head",
        (1, 2),
        rows_of("blocks.0.attn.c_qkv.weight"),
        lambda base, look, value: (base[0], look[0]) == (12 * 8, (4 + 2 * value) * 8),
    ),
    Case(
        "n_embd",
        (64,),
        rows_of("embed.weight"),
        lambda base, look, value: (base, look) == ([11, 32], [11, value]),
    ),
    Case(
        "head_dim",
        (16,),
        rows_of("blocks.0.attn.c_proj.weight"),
        lambda base, look, value: (base, look) == ([32, 32], [32, 64]),
    ),
    Case(
        "mlp_dim",
        (48,),
        rows_of("blocks.0.mlp.c_proj.weight"),
        lambda base, look, value: (base, look) == ([32, 40], [32, value]),
    ),
    Case("seq_len", (20,), longest, lambda base, look, value: (base, look) == (12, value)),
    Case(
        "vocab_size",
        (16,),
        lambda model: (list(model.embed.weight.shape), len(logits(model))),
        lambda base, look, value: look == ([value, 32], value),
    ),
    Case("position", ("learned", "sinusoidal", "alibi", "none"), lambda model: (logits(model),)),
    Case("position", ("none",), means_order, lambda base, look, value: base and not look, {"n_layer": 1}),
    Case("rope_theta", (100.0,), lambda model: (logits(model), model.cos[1].tolist())),
    Case(
        "rope_theta",
        (100.0,),
        lambda model: round(math.acos(model.cos[1, 1].item()), 5),
        lambda base, look, value: (base, look) == (0.1, round(value**-0.25, 5)),
    ),
    Case("norm", ("layernorm",), lambda model: (type(model.norm).__name__, logits(model))),
    Case("norm_eps", (0.5,), logits),
    Case("norm_order", ("post",), lambda model: (type(model.norm).__name__, logits(model))),
    Case("activation", ("gelu", "gelu_tanh", "relu", "relu2"), logits),
    Case(
        "bias",
        (True,),
        lambda model: sum(name.endswith("bias") for name, _ in model.named_parameters()),
        lambda base, look, value: (base, look) == (0, 2 * 4),
    ),
    Case("bias", (True,), lambda model: model.norm.bias is None, others={"norm": "layernorm"}),
    Case("qk_norm", (False,), logits),
    Case(
        "window",
        (3,),
        sees,
        lambda base, look, value: base == list(range(10)) and look == [7, 8, 9],
        {"n_layer": 1},
    ),
    Case(
        "window_pattern",
        ("SL", "L", "SSL"),
        lambda model: [len(sees(GPT(replace(model.config, n_layer=n)))) for n in (1, 2, 3)],
        lambda base, look, value: base == [3, 5, 7] and (look[0] == 10) == (value == "L"),
        {"window": 3},
    ),
    Case(
        "value_embeds",
        (1, 2),
        lambda model: (len(model.value_embeds), logits(model)),
        lambda base, look, value: look[0] == value,
        {"n_layer": 4},
    ),
    Case(
        "tied_embeddings",
        (True,),
        lambda model: (model.head.weight is model.embed.weight, model.num_parameters()),
        lambda base, look, value: base[1] - look[1] == 11 * 32,
    ),
    Case(
        "logit_softcap",
        (0.25,),
        lambda model: max(map(abs, logits(model))),
        lambda base, look, value: look < value < base,
    ),
    Case(
        "dropout",
        (0.25,),
        dropped,
        lambda base, look, value: base == (0, 0, 0) and look == pytest.approx((value,) * 3, abs=0.03),
    ),
    Case("init", ("gpt2", "xavier"), spread, lambda base, look, value: look == pytest.approx(SPREADS[value], rel=0.2)),
    Case("init", ("gpt2",), spread, lambda base, look, value: base[2:] == (0, 0)),
]


def config_of(case: Case, **changes: Any) -> ModelConfig:
    return ModelConfig(**(SIZES | case.others | changes))


def test_each_option_of_the_model_has_a_case():
    assert missing(ModelConfig, CASES, SIZES) == []


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_an_option_of_the_model_acts(case, monkeypatch):
    base = case.look(GPT(config_of(case)))
    changed = [case.look(GPT(config_of(case, **{case.name: value}))) for value in case.values]
    ignore(monkeypatch, ModelConfig, case.name, getattr(config_of(case), case.name))
    ignored = [case.look(GPT(config_of(case, **{case.name: value}))) for value in case.values]
    check(case, base, changed, ignored)

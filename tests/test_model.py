"""The model against independent implementations, and properties of any decoder."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import PRESETS, ModelConfig
from gpt.errors import UserError
from gpt.model import GPT, Block
from gpt.model.positions import alibi_slopes, sinusoidal_table
from kernels import linear_cross_entropy

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32, "seq_len": 24, "vocab_size": 61}
VARIANTS = {
    **PRESETS,
    "grouped": {"n_kv_head": 2},
    "alibi-relu2": {"position": "alibi", "activation": "relu2", "qk_norm": False},
    "window": {"window": 5, "n_kv_head": 1},
    "value-embeds": {"value_embeds": 1, "n_kv_head": 2},
    "wide-heads": {"head_dim": 24, "mlp_dim": 40, "activation": "gelu"},
}


def make_model(**options) -> GPT:
    """Make a model with random weights, so that no initial zero hides an error."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2).add_(1.0 if weight.ndim == 1 else 0.0)
    return model.eval()


def random_tokens(B: int, T: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS, ids=str)
def model(request) -> GPT:
    return make_model(**VARIANTS[request.param])


# Other implementations.


def test_equals_transformers_qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ours = make_model(n_kv_head=2, head_dim=12, mlp_dim=72, rope_theta=5000.0)
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {"model.embed_tokens.weight": ours.embed.weight, "model.norm.weight": ours.norm.weight}
    weights["lm_head.weight"] = ours.head.weight
    for i, block in enumerate(ours.blocks):
        at = f"model.layers.{i}."
        q, k, v = block.attn.c_qkv.weight.split((48, 24, 24))
        gate, up = block.mlp.c_fc.weight.chunk(2)
        weights |= {
            at + "input_layernorm.weight": block.attn_norm.weight,
            at + "post_attention_layernorm.weight": block.mlp_norm.weight,
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": block.attn.c_proj.weight,
            at + "self_attn.q_norm.weight": block.attn.q_norm.weight,
            at + "self_attn.k_norm.weight": block.attn.k_norm.weight,
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": block.mlp.c_proj.weight,
        }
    theirs.load_state_dict(weights)
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_parameters()
    idx = random_tokens(3, 24)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=2e-5, rtol=1e-5)


def test_equals_transformers_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = make_model(**PRESETS["gpt2"])
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=4)).eval()
    weights = {"transformer.wte.weight": ours.embed.weight, "transformer.wpe.weight": ours.position_embed.weight}
    weights |= {"transformer.ln_f.weight": ours.norm.weight, "transformer.ln_f.bias": ours.norm.bias}
    weights["lm_head.weight"] = ours.head.weight
    for i, block in enumerate(ours.blocks):
        at = f"transformer.h.{i}."
        for name, norm in (("ln_1", block.attn_norm), ("ln_2", block.mlp_norm)):
            weights |= {f"{at}{name}.weight": norm.weight, f"{at}{name}.bias": norm.bias}
        linears = {"attn.c_attn": block.attn.c_qkv, "attn.c_proj": block.attn.c_proj}
        linears |= {"mlp.c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj}
        for name, linear in linears.items():  # their Conv1D keeps weights transposed
            weights |= {f"{at}{name}.weight": linear.weight.T, f"{at}{name}.bias": linear.bias}
    theirs.load_state_dict(weights)
    idx = random_tokens(3, 24)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=2e-5, rtol=1e-5)


def test_equals_torch_post_norm_transformer():
    ours = make_model(**PRESETS["transformer"])
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation="relu", batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    weights = {}
    for i, block in enumerate(ours.blocks):
        modules = {"norm1": block.attn_norm, "norm2": block.mlp_norm, "linear1": block.mlp.c_fc}
        modules |= {"linear2": block.mlp.c_proj, "self_attn.out_proj": block.attn.c_proj}
        for name, module in modules.items():
            weights |= {f"layers.{i}.{name}.weight": module.weight, f"layers.{i}.{name}.bias": module.bias}
        weights[f"layers.{i}.self_attn.in_proj_weight"] = block.attn.c_qkv.weight
        weights[f"layers.{i}.self_attn.in_proj_bias"] = block.attn.c_qkv.bias
    theirs.load_state_dict(weights)
    idx = random_tokens(2, 24)
    position = torch.arange(24)[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)
    table = torch.empty(24, 32)
    table[:, 0::2], table[:, 1::2] = position.sin(), position.cos()
    x = theirs(ours.embed(idx) * math.sqrt(32) + table, mask=nn.Transformer.generate_square_subsequent_mask(24))
    torch.testing.assert_close(ours(idx), x @ ours.embed.weight.T, atol=1e-4, rtol=1e-5)


# Properties.


def test_a_token_changes_nothing_before_it(model):
    idx = random_tokens(2, 24)
    changed = idx.clone()
    changed[:, 13] = (changed[:, 13] + 1) % 61
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13], after[:, 13])


def test_packed_documents_stay_apart(model):
    """Two documents in one row, each with positions from 0, give the logits of each alone."""
    one, two = random_tokens(1, 9, seed=3), random_tokens(1, 15, seed=4)
    positions = torch.cat((torch.arange(9), torch.arange(15)))[None]
    segments = torch.tensor([[0] * 9 + [1] * 15], dtype=torch.int32)
    packed = model(torch.cat((one, two), dim=1), positions=positions, segment_ids=segments)
    torch.testing.assert_close(packed, torch.cat((model(one), model(two)), dim=1), atol=2e-5, rtol=1e-5)


def test_loss_is_the_cross_entropy_of_the_logits(model):
    idx, targets = random_tokens(2, 24), random_tokens(2, 24, seed=2)
    targets[0, 5:9] = -100
    log_probs = model(idx).double().log_softmax(-1)
    expected = -torch.stack([log_probs[b, t, targets[b, t]] for b in range(2) for t in range(24) if targets[b, t] >= 0])
    torch.testing.assert_close(model.loss(idx, targets).double(), expected.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids="tied={}".format)
def test_loss_in_chunks_has_the_gradients_of_the_logits(tied, monkeypatch):
    """Also with a softcap and a padded vocabulary."""
    model = make_model(tied_embeddings=tied, logit_softcap=2.0, vocab_size=80)
    idx, targets = random_tokens(2, 24), random_tokens(2, 24, seed=2)
    logits = model(idx)
    assert logits.abs().max() <= 2
    plain = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(plain, list(model.parameters()))
    monkeypatch.setitem(linear_cross_entropy.__globals__, "MOST_LOGITS", 0)
    loss = model.loss(idx, targets)
    torch.testing.assert_close(loss, plain)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients(loss, model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def gradients(loss: torch.Tensor, model: GPT) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


def test_terms_of_the_loss():
    model = make_model()
    idx, targets = random_tokens(2, 24), random_tokens(2, 24, seed=2)
    lse = model(idx).logsumexp(-1)
    mean_log_prob = model(idx).log_softmax(-1).mean()
    plain = model.loss(idx, targets)
    torch.testing.assert_close(model.loss(idx, targets, z_loss=0.1), plain + 0.1 * lse.square().mean())
    torch.testing.assert_close(model.loss(idx, targets, label_smoothing=0.2), 0.8 * plain - 0.2 * mean_log_prob)


def test_every_weight_gets_a_gradient(model):
    model.loss(random_tokens(2, 24), random_tokens(2, 24, seed=2)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_dropout_drops_in_training_only():
    model = make_model(dropout=0.5)
    idx = random_tokens(1, 24)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_too_many_tokens_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        model(random_tokens(1, 25))


# Counts and initial weights.


def test_gpt2_small_has_its_published_size():
    config = ModelConfig(n_layer=12, n_head=12, n_embd=768, seq_len=1024, vocab_size=50257, **PRESETS["gpt2"])
    with torch.device("meta"):
        assert GPT(config).num_parameters() == 124_439_808


def test_qwen3_0_6b_has_its_published_size():
    config = ModelConfig(
        n_layer=28,
        n_head=16,
        n_kv_head=8,
        head_dim=128,
        n_embd=1024,
        mlp_dim=3072,
        vocab_size=151936,
        tied_embeddings=True,
    )
    with torch.device("meta"):
        assert GPT(config).num_parameters() == 596_049_920
        assert GPT(config).num_parameters(embeddings=False) == 440_467_456


@pytest.mark.parametrize(
    "windows", [(None, None), (5, 5), (5, None)], ids=lambda windows: f"windows={windows[0]}-{windows[1]}"
)
def test_flops_per_token(windows):
    """torch counts the linear layers; scores and weighted sums are counted over every visible pair."""
    pattern = "SL" if windows == (5, None) else None
    model = make_model(n_kv_head=2, window=windows[0], window_pattern=pattern)
    T = 24
    with FlopCounterMode(display=False) as counter:
        model(random_tokens(1, T))
    linear = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    per_layer = [
        sum(q >= k and (window is None or q - k < window) for q in range(T) for k in range(T)) for window in windows
    ]
    assert model.config.n_layer == len(windows)
    scores = model.config.n_head * sum(per_layer) * 2 * (8 + 8)
    assert model.flops_per_token(T, training=False) == pytest.approx((linear + scores) / T)
    assert model.flops_per_token(T) == pytest.approx(3 * (linear + scores) / T)


def test_a_pattern_says_which_blocks_have_the_window():
    config = ModelConfig(n_layer=6, window=3, window_pattern="SSL")
    assert [config.window_of(layer) for layer in range(6)] == [3, 3, None] * 2
    assert [ModelConfig(window=3).window_of(layer) for layer in range(6)] == [3] * 6
    # A token out of reach of the windows has an effect only through a block that sees all keys.
    tokens = random_tokens(1, 16)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 61
    for pattern, sees in (("S", False), ("SL", True)):
        model = make_model(window=3, window_pattern=pattern)
        assert (model(tokens)[0, -1] != model(other)[0, -1]).any() == sees


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3, "window_pattern": "SX"}, "letters S and L"),
        ({"window": 3, "window_pattern": ""}, "letters S and L"),
        ({"window_pattern": "SL"}, "needs a window"),
    ],
    ids=str,
)
def test_invalid_window_patterns_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**options)


def test_value_embeddings_are_added_to_the_values_of_the_first_and_last_blocks():
    """Against a model without them, where a hook adds them to the projected values."""
    options = {"n_layer": 5, "n_kv_head": 2, "activation": "relu2"}
    ours, plain = make_model(value_embeds=2, **options), make_model(**options)
    plain.load_state_dict(ours.state_dict(), strict=False)
    tokens = random_tokens(2, 24)
    for layer, table in {0: 0, 1: 1, 3: 0, 4: 1}.items():
        gate, rows = ours.blocks[layer].attn.value_gate.weight, ours.value_embeds[table].weight[tokens]

        def add(module, inputs, out, gate=gate, rows=rows):
            share = 2 / (1 + torch.exp(-inputs[0] @ gate.T))  # (B, T, H_kv)
            return out + torch.cat((torch.zeros(2, 24, 48), rows * share.repeat_interleave(8, dim=-1)), dim=-1)

        plain.blocks[layer].attn.c_qkv.register_forward_hook(add)
    assert ours.blocks[2].attn.value_gate is None
    torch.testing.assert_close(ours(tokens), plain(tokens), atol=1e-5, rtol=1e-5)


def test_gpt2_initial_weights():
    options = {**SMALL, "n_embd": 256, "n_layer": 8, "vocab_size": 500, **PRESETS["gpt2"]}
    torch.manual_seed(0)
    model = GPT(ModelConfig(**options))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.all(weight == (0.0 if name.endswith("bias") else 1.0)), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name


def test_xavier_initial_weights():
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SMALL, "n_embd": 256, "vocab_size": 500, **PRESETS["transformer"]}))
    fc = model.blocks[0].mlp.c_fc.weight
    bound = math.sqrt(6 / sum(fc.shape))
    assert 0.98 * bound < fc.abs().max().item() <= bound
    assert model.embed.weight.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_scaled_initial_weights_start_at_ln_v():
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SMALL, value_embeds=1))
    assert not model.value_embeds[0].weight.any()
    loss = model.loss(random_tokens(2, 24), random_tokens(2, 24, seed=2))
    assert loss.item() == pytest.approx(math.log(61), rel=1e-6)


def test_alibi_slopes_of_the_paper():
    torch.testing.assert_close(alibi_slopes(8), 0.5 ** torch.arange(1, 9).float())
    assert alibi_slopes(12).tolist() == pytest.approx(
        [*alibi_slopes(8).tolist(), *(2.0 ** -(i + 0.5) for i in range(4))]
    )


def test_sinusoidal_table_of_the_paper():
    table = sinusoidal_table(7, 6)
    assert table[5, 2].item() == pytest.approx(math.sin(5 / 10000 ** (2 / 6)))
    assert table[5, 3].item() == pytest.approx(math.cos(5 / 10000 ** (2 / 6)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 100, "n_head": 7}, "n_embd 100 is not divisible by n_head 7"),
        ({"n_head": 6, "n_kv_head": 4}, "n_head 6 is not a multiple of n_kv_head 4"),
        ({"n_head": 100, "n_embd": 400}, "head width must be 8 to 256, not 4"),
        ({"n_head": 1, "n_embd": 9}, "even head width"),
        ({"logit_softcap": 0.0}, "logit_softcap must be above 0, not 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"n_layer": 3, "value_embeds": 2}, "value_embeds must be 0 to n_layer / 2, not 2"),
        ({"value_embeds": -1}, "value_embeds must be 0 to n_layer / 2"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ModelConfig(), **options)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_bit_and_computes_blocks_twice(dropout, monkeypatch):
    calls = []
    body = Block.body
    monkeypatch.setattr(Block, "body", lambda self, *args: calls.append(self) or body(self, *args))
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, seq_len=8, vocab_size=11, dropout=dropout, init="gpt2")
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT(config)
        model.checkpoint_activations(checkpointing)
        calls.clear()
        loss = model.loss(idx, idx)
        loss.backward()
        assert len(calls) == (4 if checkpointing else 2)
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_a_wrong_call_names_the_argument():
    model, idx = make_model(), torch.zeros(2, 5, dtype=torch.int64)
    last = model.config.vocab_size - 1
    with pytest.raises(ValueError, match=rf"outside the vocabulary, 0 to {last}$"):
        model(idx + last + 1)
    for name, dtype in (("positions", "torch.int64 or torch.int32"), ("segment_ids", "torch.int32")):
        with pytest.raises(TypeError, match=rf"{name} must be {dtype}, not torch.float32"):
            model(idx, **{name: idx.float()})

"""A block of the test's own: a class and a value of norm_order. It trains, resumes and decodes; no other file knows it.

The block has a new matrix, its own wiring of the sublayers, and an attention that overrides a step of the standard one.
"""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import gpt
from gpt import arguments
from gpt.inference.decoder import Decoder
from gpt.model import Block, CausalSelfAttention, ModelConfig
from gpt.model import gpt as module
from gpt.model.linear import HiddenLinear
from gpt.training.command import load_config
from tests.test_decode import assert_near, model_of, text_of, uncached
from tests.train_checks import flags, lasting, run, weights_of

OPTIONS = {"norm_order": "gated", "n_kv_head": 1, "window": 7, "optimizer": "muon", "learning_rate": 0.02}


class SharpAttention(CausalSelfAttention):
    """A learned temperature for each query head."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.sharpness = nn.Parameter(torch.empty(config.n_head))

    def turn(self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().turn(qkv, rotary)
        return q * self.sharpness.to(q.dtype).unsqueeze(-1), k, v


class GatedBlock(Block):
    """Attention and MLP side by side (Wang & Komatsuzaki 2021), on a residual stream that each block scales."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.attn = SharpAttention(config, layer)
        self.gate = HiddenLinear(config.n_embd, config.n_embd, bias=False)

    def body(self, x: Tensor, *context) -> Tensor:
        attn_in, mlp_in = self.attn_norm(x), self.mlp_norm(x)
        kept = x * (0.5 + torch.sigmoid(self.gate(attn_in)))
        return self.mlp(mlp_in, self.attn(attn_in, kept, *context))


@pytest.fixture(autouse=True)
def gated(folder, monkeypatch):
    load_config(flags())  # parsing rewrites the annotations once: that must not happen to this test's
    monkeypatch.setitem(module.BLOCKS, "gated", GatedBlock)
    monkeypatch.setitem(ModelConfig.__annotations__, "norm_order", Literal["pre", "post", "gated"])
    arguments._hints.cache_clear()
    yield
    arguments._hints.cache_clear()


def test_a_new_block_trains_and_resumes_with_the_same_bits(capsys):
    options = OPTIONS | {"max_steps": 20, "checkpoint_interval": 8, "keep_checkpoints": 3, "dropout": 0.1}
    assert run(run_dir="whole", **options) == 0
    losses = [record["train_loss"] for record in lasting("whole") if "train_loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    torch.manual_seed(99)
    assert run("--resume-from", "whole/checkpoints/step_00000008", run_dir="resumed", **options) == 0
    assert lasting("resumed") == [record for record in lasting("whole") if record["step"] > 8]
    whole, resumed = weights_of("whole", 20), weights_of("resumed", 20)
    assert {"blocks.0.gate.weight", "blocks.1.attn.sharpness"} <= whole.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_new_block_samples_with_the_cache(capsys):
    """A trained run continues text greedily with the tokens that the uncached model finds likeliest."""
    run(max_steps=3, **OPTIONS)
    model, tokenizer = gpt.load("run", "cpu")
    assert type(model.blocks[0]) is GatedBlock
    pieces = gpt.generate(model, tokenizer, ["J and"], gpt.SamplingConfig(temperature=0.0))
    text = tokenizer.encode("J and")
    for token in (piece.token for piece in pieces if piece.token is not None):
        assert token == int(uncached(model, text)[-1].argmax())
        text.append(token)
    assert len(text) == model.config.seq_len


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_a_new_blocks_cached_logits_are_the_uncached_ones(rows, position):
    model = model_of(norm_order="gated", position=position, window=7, n_kv_head=2, value_embeds=1, bias=True)
    decoder, texts = Decoder(model, rows, 48), [text_of(20 + row, row) for row in range(rows)]
    for row, text in enumerate(texts):
        assert_near(decoder.prefill(row, text[: 10 + row]), uncached(model, text[: 10 + row])[-1])
    for i, T in ((0, 1), (1, 1), (2, 4), (6, 1)):
        logits = decoder.step(torch.tensor([text[10 + row + i :][:T] for row, text in enumerate(texts)]))
        for row, text in enumerate(texts):
            assert_near(logits[row], uncached(model, text[: 10 + row + i + T])[-T:])

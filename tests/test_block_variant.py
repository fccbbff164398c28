"""A new kind of block is one class and one value of an option: training, resuming and the decoder run it as it is."""

import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import gpt
from gpt.arguments import _hints
from gpt.inference.decoder import Decoder
from gpt.inference.sampling import SamplingConfig
from gpt.model import Block, ModelConfig
from gpt.model.gpt import BLOCKS
from gpt.training.command import load_config
from tests.test_decode import assert_near, model_of, text_of, uncached
from tests.train_checks import lasting, run, weights_of
from train import main


class ParallelBlock(Block):
    """Attention and MLP side by side (Wang & Komatsuzaki 2021), and a learned gate for each channel."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.gate = nn.Parameter(torch.ones(config.n_embd))

    def body(self, x: Tensor, *context: object) -> Tensor:
        return self.mlp(self.mlp_norm(x), self.attn(self.attn_norm(x), x, *context)) * self.gate


@pytest.fixture(autouse=True)
def parallel(monkeypatch):
    monkeypatch.setitem(BLOCKS, "parallel", ParallelBlock)
    monkeypatch.setitem(ModelConfig.__annotations__, "norm_order", Literal["pre", "post", "parallel"])
    _hints.cache_clear()
    yield
    _hints.cache_clear()


OPTIONS = {"rotary": {}, "learned": {"position": "learned"}, "window": {"window": 7}, "grouped": {"n_kv_head": 2}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rows", [1, 3])
def test_the_cache_changes_no_logit(options, rows):
    model, text = model_of(norm_order="parallel", **options), text_of(30)
    assert type(model.blocks[0]) is ParallelBlock
    decoder = Decoder(model, rows, 40)
    for row in range(rows):
        assert_near(decoder.prefill(row, text[:20]), uncached(model, text)[19])
    for i in range(20, 30):
        logits = decoder.step(torch.tensor([[text[i]]] * rows))[:, 0]
        assert_near(logits, uncached(model, text)[i].expand(rows, -1))


def test_it_trains_resumes_and_samples(folder, capsys):
    assert run(run_dir="whole", norm_order="parallel", max_steps=30, checkpoint_interval=15, learning_rate=1e-2) == 0
    losses = [record["train_loss"] for record in lasting("whole") if "train_loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    shutil.copytree("whole", "part")
    for later in Path("part/checkpoints").glob("*_00000030"):
        shutil.rmtree(later)
    assert main(load_config(["--run-dir", "part", "--resume"])) == 0
    whole, part = weights_of("whole", 30), weights_of("part", 30)
    assert "blocks.1.gate" in whole and not torch.equal(whole["blocks.1.gate"], torch.ones(32))
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    model, tokenizer = gpt.load(folder / "whole", "cpu")
    assert type(model.blocks[0]) is ParallelBlock
    config = SamplingConfig(max_new_tokens=8, temperature=0.0)
    written = "".join(piece.text for piece in gpt.generate(model, tokenizer, ["J and "], config))
    text = "J and "
    for _ in range(8):
        text += tokenizer.decode([int(uncached(model, tokenizer.encode(text))[-1].argmax())])
    assert written == text[len("J and ") :]

"""Training that begins with the weights of a run or of a Hugging Face checkpoint: the whole command."""

import shutil

import pytest
import torch

import gpt
from gpt.command_line import load_config
from gpt.config import ModelConfig
from gpt.errors import UserError
from gpt.export import export
from gpt.model import GPT
from gpt.tokenizer import ByteTokenizer
from train import main as train

TEXT = "The quick brown fox, naïve as ever, jumps over 13 dogs.\n"


def start(tmp_path, *words, name="run"):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    common = ["--corpus", tmp_path / "text.txt", "--run-dir", tmp_path / name, "--cache-dir", tmp_path / "cache"]
    common += ["--max-steps", 1, "--sample-tokens", 0, "--device", "cpu", "--dtype", "float32"]
    file, words = (words[:1], words[1:]) if str(words[0]).endswith(".toml") else ((), words)
    return train(load_config(list(map(str, [*file, *common, *words]))))


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_training_begins_with_the_weights(tiny_run, tmp_path, kind):
    source = tiny_run
    before, tokenizer = gpt.load(tiny_run, "cpu")
    if kind == "hf":
        source = tmp_path / "hf"
        export(before, tokenizer, source)
    still = ["--learning-rate", 1e-12, "--warmup-steps", 0, "--weight-decay", 0]
    assert start(tmp_path, "--init-from", source, "--seq-len", 12, *still) == 0
    after, again = gpt.load(tmp_path / "run", "cpu")
    assert after.config.seq_len == 12 and after.config.n_layer == 1
    assert again.encode("é") == tokenizer.encode("é")
    idx = torch.tensor([list(TEXT[:12].encode())])
    torch.testing.assert_close(after(idx), before(idx), atol=1e-6, rtol=1e-5)
    # Going on needs the source no more.
    if kind == "hf":
        shutil.rmtree(source)
    assert load_config(["--run-dir", str(tmp_path / "run"), "--resume"]).model == after.config
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\nseq_len = 12\n[train]\ninit_from = "{source}"\nresume = true\n')
    assert start(tmp_path, recipe, "--max-steps", 2) == 0


def test_a_position_table_is_cut(tmp_path):
    torch.manual_seed(0)
    options = {"n_layer": 1, "n_head": 2, "n_embd": 32, "seq_len": 40, "vocab_size": 257, **gpt.PRESETS["gpt2"]}
    before = GPT(ModelConfig(**options)).eval()
    export(before, ByteTokenizer(), tmp_path / "hf")
    assert start(tmp_path, "--init-from", tmp_path / "hf", "--seq-len", 9, "--learning-rate", 1e-12) == 0
    after = gpt.load(tmp_path / "run", "cpu")[0]
    idx = torch.tensor([list(TEXT[:9].encode())])
    torch.testing.assert_close(after(idx), before(idx), atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="knows 40 positions: seq_len 41 is too long"):
        start(tmp_path, "--init-from", tmp_path / "hf", "--seq-len", 41, name="other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-layer", 2], "has n_layer 1, not 2: leave n_layer out"),
        (["--preset", "gpt2"], "contradict each other"),
        (["--preset", "modern"], "contradict each other"),
        (["--tokenizer", "char"], "tokenizer char and init_from .* contradict each other"),
    ],
    ids=range(4),
)
def test_another_model_than_the_source_is_refused(tiny_run, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        start(tmp_path, "--init-from", tiny_run, *words)
    assert not (tmp_path / "run").exists()

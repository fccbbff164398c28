"""The training command with --init-from a run or a Hugging Face checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import gpt
from gpt.config import ModelConfig
from gpt.data.tokenizers import DOCUMENT, BPETokenizer, ByteTokenizer
from gpt.errors import UserError
from gpt.evaluation.scoring import Question, multiple_choice, score_texts
from gpt.interop.export import export
from gpt.interop.hf_tokenizer import write_hf_tokenizer
from gpt.interop.initial import has_tokenizer, load_source
from gpt.model import GPT
from gpt.training.command import load_config
from train import main as train

TEXT = "The quick brown fox, naïve as ever, jumps over 13 dogs.\n"


def start(tmp_path, *words, name="run"):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    common = ["--corpus", tmp_path / "text.txt", "--run-dir", tmp_path / name, "--cache-dir", tmp_path / "cache"]
    common += ["--max-steps", 1, "--sample-tokens", 0, "--device", "cpu", "--dtype", "float32"]
    file, words = (words[:1], words[1:]) if str(words[0]).endswith(".toml") else ((), words)
    return train(load_config(list(map(str, [*file, *common, *words]))))


@pytest.mark.parametrize("kind", ["run", "hf"])
def test_training_starts_from_the_given_weights(tiny_run, tmp_path, kind):
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
    with pytest.raises(UserError, match="has 40 learned positions: seq_len 41 is too long"):
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


def test_options_that_the_weights_do_not_depend_on_may_differ_from_the_source(tiny_run, tmp_path):
    words = ["--seq-len", 5, "--dropout", 0.25, "--init", "xavier"]
    assert start(tmp_path, "--init-from", tiny_run, *words) == 0
    config = gpt.load(tmp_path / "run", "cpu")[0].config
    assert (config.seq_len, config.dropout, config.init) == (5, 0.25, "xavier")


def test_a_run_without_its_tokenizer_gets_no_other(tiny_run, tmp_path):
    source = shutil.copytree(tiny_run, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    assert has_tokenizer(source)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        start(tmp_path, "--init-from", source)
    assert not (tmp_path / "run").exists()


# A vocabulary larger than the table.


def checkpoint_of(folder, tokenizer, rows=257, **options):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "seq_len": 24, "vocab_size": rows, **gpt.PRESETS["gpt2"]}
    model = GPT(ModelConfig(**sizes | options)).eval()
    export(model, ByteTokenizer(), folder)
    write_hf_tokenizer(tokenizer, folder, seq_len=24)
    return model


BYTES = [bytes([i]) for i in range(256)]
WITH_PAD = BPETokenizer("x", r"[\s\S]", BYTES, {DOCUMENT: 256, "<pad>": 257})
WITH_WORD = BPETokenizer("x", r"\p{L}+|[\s\S]", [*BYTES, None, b"fo", b"ox"], {DOCUMENT: 256})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokenizer", [WITH_PAD, WITH_WORD], ids=["pad", "words"])
def test_a_table_grows_to_the_size_of_the_sources_tokenizer(tmp_path, tied, tokenizer, capsys):
    before = checkpoint_of(tmp_path / "hf", tokenizer, tied_embeddings=tied)
    still = ["--learning-rate", 1e-12, "--warmup-steps", 0, "--weight-decay", 0]
    assert start(tmp_path, "--init-from", tmp_path / "hf", *still) == 0
    size = tokenizer.vocab_size
    said = f"{tmp_path / 'hf'} have 257 rows, this vocabulary {size}: each new row is the mean of the others"
    assert said in capsys.readouterr().out
    after, kept = gpt.load(tmp_path / "run", "cpu")
    assert kept.vocab_size == after.config.vocab_size == size
    for ours, theirs in zip((after.embed.weight, after.head.weight), (before.embed.weight, before.head.weight)):
        torch.testing.assert_close(ours[:257], theirs, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours[257:], theirs.mean(0).expand(size - 257, -1), atol=1e-6, rtol=1e-5)
    assert start(tmp_path, "--init-from", tmp_path / "hf", "--resume", "--max-steps", 2) == 0


def test_a_table_may_grow_by_padding_and_never_shrinks(tmp_path):
    checkpoint_of(tmp_path / "hf", ByteTokenizer())
    assert start(tmp_path, "--init-from", tmp_path / "hf", "--vocab-size", 320) == 0
    assert gpt.load(tmp_path / "run", "cpu")[0].config.vocab_size == 320
    with pytest.raises(UserError, match="has vocab_size 257, not 256: leave vocab_size out"):
        start(tmp_path, "--init-from", tmp_path / "hf", "--vocab-size", 256, name="other")
    # A table with more rows than its tokenizer has tokens is padded already.
    checkpoint_of(tmp_path / "wide", ByteTokenizer(), rows=300)
    assert start(tmp_path, "--init-from", tmp_path / "wide", name="third") == 0
    assert gpt.load(tmp_path / "third", "cpu")[0].config.vocab_size == 300


def test_another_tokenizer_adds_no_rows(tmp_path):
    checkpoint_of(tmp_path / "hf", ByteTokenizer(), rows=257)
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"has 257 rows and the tokenizer bpe \d+ tokens: give the tokenizer that it was"
    ):
        start(tmp_path, "--init-from", tmp_path / "hf", "--tokenizer", "bpe", "--bpe-vocab-size", 300)
    assert not (tmp_path / "run").exists()


def test_a_text_is_scored_only_if_each_of_its_tokens_has_a_row(tmp_path):
    model = checkpoint_of(tmp_path / "hf", WITH_PAD)
    scored = score_texts(*load_source(tmp_path / "hf", "cpu"), [TEXT])
    assert scored["loss"] == score_texts(model, ByteTokenizer(), [TEXT])["loss"]
    checkpoint_of(tmp_path / "hf", WITH_WORD)
    asked = "has the token 257, but its embedding table has 257 rows: train it further with --init-from"
    with pytest.raises(UserError, match=asked):
        load_source(tmp_path / "hf", "cpu")
    with pytest.raises(UserError, match=asked):
        score_texts(model, WITH_WORD, [TEXT])
    with pytest.raises(UserError, match=asked):
        multiple_choice(model, WITH_WORD, [Question("a", ("b", "c"), 0)], ["a"])
    with pytest.raises(UserError, match="table has 257 rows, but the tokenizer has 259 tokens"):
        export(model, WITH_WORD, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for pair in ({"model": model}, {"model": GPT(replace(model.config, vocab_size=300)), "draft": model}):
        with pytest.raises(UserError, match=asked):
            list(gpt.generate(tokenizer=WITH_WORD, prompts=["a"], config=gpt.SamplingConfig(max_new_tokens=1), **pair))


# Special tokens at the end of a vocabulary, with ids between them that are not tokens.
WITH_GAPS = BPETokenizer("x", r"[\s\S]", BYTES, {DOCUMENT: 256, "<pad>": 260, "<x>": 300})


@pytest.mark.parametrize("tokenizer", [WITH_PAD, WITH_GAPS], ids=["pad", "gaps"])
def test_special_tokens_without_rows_change_no_text(tmp_path, tokenizer):
    model = checkpoint_of(tmp_path / "hf", tokenizer)
    scored = score_texts(*load_source(tmp_path / "hf", "cpu"), [TEXT])
    assert scored["loss"] == score_texts(model, ByteTokenizer(), [TEXT])["loss"]
    draft = GPT(replace(model.config, n_layer=1, vocab_size=320)).eval()
    for options in ({}, {"temperature": 0.0}, {"logit_bias": {"a": 3.0}}, {"repetition_penalty": 1.2}):
        config = gpt.SamplingConfig(max_new_tokens=12, seed=3, **options)
        for more in ({}, {"draft": draft}):
            written = [
                [piece.token for piece in gpt.generate(model, each, [TEXT[:9]], config, **more)]
                for each in (tokenizer, ByteTokenizer())
            ]
            assert written[0] == written[1]


def test_a_given_vocabulary_size_is_kept_or_refused(tmp_path):
    checkpoint_of(tmp_path / "hf", WITH_WORD)
    with pytest.raises(UserError, match="vocab_size 258 is smaller than the tokenizer's 259: increase it, or leave"):
        start(tmp_path, "--init-from", tmp_path / "hf", "--vocab-size", 258)
    assert not (tmp_path / "run").exists()
    assert start(tmp_path, "--init-from", tmp_path / "hf", "--vocab-size", 259) == 0


def test_a_checkpoint_of_hugging_face_is_not_a_run(tmp_path):
    checkpoint_of(tmp_path / "hf", ByteTokenizer())
    with pytest.raises(UserError, match=r"it is a Hugging Face checkpoint: train it with --init-from, or load it"):
        gpt.load(tmp_path / "hf", "cpu")


def test_a_run_with_an_exchanged_tokenizer_is_refused(tiny_run, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(tiny_run, run)
    form = json.loads((run / "tokenizer.json").read_text())
    (run / "tokenizer.json").write_text(json.dumps(form))  # written otherwise, the same
    gpt.load(run, "cpu")
    WITH_PAD.save(run / "tokenizer.json")
    for use in (lambda: gpt.load(run, "cpu"), lambda: start(tmp_path, "--init-from", run)):
        with pytest.raises(UserError, match="is not the tokenizer that the run was trained with"):
            use()
    words = ["--run-dir", run, "--resume", "--cache-dir", tmp_path / "cache", "--max-steps", 99]
    with pytest.raises(UserError, match="is not the tokenizer that the run was trained with"):
        train(load_config(list(map(str, words))))

"""A byte order mark, as Windows' editors write it, is skipped at the start of every file that is read."""

import codecs
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import gpt
import sample
from gpt.command_line import parse_flags
from gpt.data.inspect import inspect
from gpt.evaluation.command import read_questions
from gpt.evaluation.scoring import Question
from gpt.interop.export import export
from gpt.interop.hf_config import from_hf, tokenizer_from_hf
from gpt.training.command import load_config
from tests.corpus_checks import PACK, documents_of, write
from tests.run_checks import reseal
from train import main

IDX = torch.arange(20).view(1, 20)


def mark(path: Path) -> None:
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


def test_the_files_of_a_run(tiny_run, tmp_path, capsys):
    """As after they were saved in such an editor."""
    shutil.copytree(tiny_run, tmp_path / "run")
    run = tmp_path / "run"
    for name in ("config.toml", "tokenizer.json", "corpus.json", "run.json", "metrics.jsonl"):
        mark(run / name)
    for checkpoint in (run / "checkpoints").iterdir():
        mark(checkpoint / "state.json")
        reseal(checkpoint)
        mark(checkpoint / "manifest.json")
    (model, tokenizer), (same, other) = gpt.load(tiny_run, "cpu"), gpt.load(run, "cpu")
    assert torch.equal(model(IDX), same(IDX)) and tokenizer.fingerprint == other.fingerprint
    assert list(inspect(run)) == list(inspect(tiny_run))
    assert main(load_config(["--run-dir", str(run), "--resume", "--max-steps", "4"])) == 0
    begins = ["--corpus", str(tmp_path / "text.txt"), "--tokenizer", "byte", "--max-steps", "1", "--overwrite"]
    (tmp_path / "text.txt").write_text("all work and no play\n" * 30)
    sizes = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--seq-len", "8", "--device", "cpu"]
    mark(run / "run.json")
    mark(run / "config.toml")
    assert main(load_config(["--run-dir", str(run), "--sample-tokens", "0", *begins, *sizes])) == 0  # its own files


def test_the_files_of_a_cached_corpus(make, tmp_path, caplog):
    path = write(tmp_path / "text.txt", "all work and no play\n" * 30)
    first = make(path, "byte")
    for name in ("corpus.json", "tokenizer.json"):
        mark(first.directory / name)
    assert make(path, "byte").train_tokens == first.train_tokens
    assert not caplog.records  # it was not made again


def test_a_hugging_face_checkpoint(tiny_run, tmp_path):
    model, tokenizer = gpt.load(tiny_run, "cpu")
    export(model, tokenizer, tmp_path)
    tensors = {"metadata": {}, "weight_map": {}}
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors["weight_map"] = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    os.rename(tmp_path / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(tensors))
    marked = sorted(tmp_path.glob("*.json"))
    assert len(marked) == 5
    for path in marked:
        mark(path)
    assert torch.allclose(from_hf(tmp_path)(IDX), model(IDX), atol=1e-6)
    assert tokenizer_from_hf(tmp_path).encode("all work") == tokenizer.encode("all work")


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "text", "documents"),
    [
        ("x.txt", "a\ufeff b\n", ["a\ufeff b\n"]),
        ("x.jsonl", '{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("x.json", '[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ("x.json", '{"text": "a"} {"text": "b"}', ["a", "b"]),
        ("x", '\n\n{"text": "a"}\n', ["a"]),
    ],
    ids=["text", "lines", "array", "objects", "empty lines first"],
)
def test_a_corpus(tmp_path, name, text, documents, packing):
    path = write(tmp_path / f"{name}{packing}", PACK[packing](codecs.BOM_UTF8 + text.encode()))
    assert documents_of(path) == documents


def test_prompts_questions_and_recipes(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.txt", codecs.BOM_UTF8 + b"all\n")
    write(tmp_path / "p.jsonl", codecs.BOM_UTF8 + b'{"prompt": "all"}\n')
    write(tmp_path / "q.jsonl", codecs.BOM_UTF8 + b'{"ctx": "a", "endings": ["b", "c"], "label": 1}\n')
    write(tmp_path / "c.toml", codecs.BOM_UTF8 + b"[model]\nn_layer = 3\n")
    for name in ("p.txt", "p.jsonl"):
        words = [str(tiny_run), "--prompt-file", name, "--jsonl", "--max-new-tokens", "2", "--device", "cpu"]
        assert sample.main(parse_flags(sample.Arguments, words, prog="sample.py")) == 0
        assert json.loads(capsys.readouterr().out)["prompt"] == "all"
    assert read_questions(Path("q.jsonl")) == [Question("a", ("b", "c"), 1)]
    assert load_config(["c.toml"]).model.n_layer == 3


def test_a_file_of_samples_that_is_gone_on_with(tiny_run, tmp_path):
    words = [str(tiny_run), "--output", str(tmp_path / "out"), "--max-new-tokens", "2", "--device", "cpu"]
    assert sample.main(parse_flags(sample.Arguments, words, prog="sample.py")) == 0
    mark(tmp_path / "out")
    words += ["--resume", "--num-samples", "2"]
    assert sample.main(parse_flags(sample.Arguments, words, prog="sample.py")) == 0
    lines = (tmp_path / "out").read_text(encoding="utf-8-sig").splitlines()
    assert [json.loads(line)["sample_index"] for line in lines] == [0, 1]

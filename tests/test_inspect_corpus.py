"""python -m gpt.corpus inspect: what it says of each kind of token file, and one sentence for anything else."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt.data.inspect import Arguments, inspect, main
from gpt.errors import UserError
from gpt.evaluation.int8 import loss_of_int8
from gpt.run import load
from gpt.training.command import load_config
from tests.corpus_checks import POEM, folder_of, write
from tests.test_external_tokens import IDS, llama, llm_c, nanogpt
from train import main as train


def shown(path: Path, *words: str, capsys) -> list[str]:
    assert main(["inspect", str(path), *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_tokenized_corpus(tmp_path, make, capsys):
    corpus = make(folder_of(tmp_path / "texts"), "byte")
    lines = shown(corpus.directory, "--sample-tokens", "20", capsys=capsys)
    assert lines[0] == f"{corpus.directory}: a byte tokenizer of 257 tokens"
    sides = {name: next(line for line in lines if line.startswith(name)) for name in ("train.tokens", "val.tokens")}
    documents = [int(line.split(" tokens, ")[1].split()[0]) for line in sides.values()]
    assert sum(documents) == 40
    assert f"{corpus.train_tokens:,} tokens" in sides["train.tokens"]
    assert f"{corpus.val_bytes:,} bytes of text" in sides["val.tokens"]
    assert f"{corpus.train_bytes / corpus.train_tokens:.3f} bytes per token" in sides["train.tokens"]
    assert lines[2] == "  | document number 0, "[: 4 + 19]
    assert lines[-1].startswith("bytes per token: this (257) 1.")


def test_one_token_file_and_a_run(tmp_path, make, tiny_run, capsys):
    corpus = make(write(tmp_path / "poem.txt", POEM))
    lines = shown(corpus.val, capsys=capsys)
    assert lines[1].startswith(f"val.tokens: {corpus.val_tokens:,} tokens, 0 document tokens")
    lines = shown(tiny_run, capsys=capsys)
    assert "a byte tokenizer" in lines[0]
    assert lines[2].startswith("  | all work and no play")


@pytest.mark.parametrize(("kind", "said"), [(nanogpt, "no header"), (llm_c, "llm.c"), (llama, "llm.c")])
def test_a_bin_of_another_program_is_described(tmp_path, capsys, kind, said):
    path = kind(tmp_path / "train.bin")
    lines = shown(path, "--sample-tokens", "3", capsys=capsys)
    assert f"{len(IDS):,} tokens of {4 if kind is llama else 2} bytes" in lines[0]
    assert said in lines[0]
    assert "the largest 256" in lines[1]
    assert lines[2] == f"  begins: {' '.join(map(str, IDS[:3]))}"
    lines = shown(path, "--tokenizer", "byte", "--sample-tokens", "10", capsys=capsys)
    assert "3 document tokens" in lines[1]
    assert lines[2] == f"  | {POEM[:9]}"


def test_token_files_of_a_corpus(tmp_path, make, capsys):
    for i in range(3):
        llm_c(tmp_path / f"train_{i}.bin")
    llm_c(tmp_path / "val.bin")
    lines = shown(make(tmp_path, "byte").directory, capsys=capsys)
    assert lines[1].startswith(f"train.tokens: {3 * len(IDS):,} tokens, 9 document tokens")


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (lambda p: p, (), r"x\.bin does not exist"),
        (lambda p: write(p, b"abc"), (), r"x\.bin is not a token file: its 3 bytes"),
        (lambda p: write(p, llm_c(p).read_bytes()[:-1]), (), r"x\.bin is damaged"),
        (lambda p: llama(p, [1 << 30]), (), "this is not a token file"),
        (lambda p: nanogpt(p, [300]), ("--tokenizer", "byte"), r"x\.bin holds the id 300, but the tokenizer has 257"),
        (nanogpt, ("--tokenizer", "gtp2"), "did you mean 'gpt2'"),
        (nanogpt, ("--tokenizer", "char"), "a char tokenizer is learned from text"),
        (nanogpt, ("--sample-tokens", "-1"), "sample_tokens must be at least 0"),
        (nanogpt, ("--sample-tokens", "1048576"), "sample_tokens must be at least 0 and below 1048576"),
    ],
)
def test_an_unreadable_bin_is_refused(tmp_path, spoil, words, message):
    spoil(tmp_path / "x.bin")
    with pytest.raises(UserError, match=message):
        main(["inspect", str(tmp_path / "x.bin"), *words])


def test_other_paths_are_refused(tmp_path, make):
    text = write(tmp_path / "text.txt", POEM)
    for path in (text, tmp_path):
        with pytest.raises(UserError, match=r"is not a run, tokenized corpus, token file or \.bin"):
            list(inspect(path))
    corpus = make(text)
    with pytest.raises(UserError, match="has its own tokenizer"):
        list(inspect(corpus.directory, "gpt2"))
    content = bytearray(corpus.train.read_bytes())
    content[-1] ^= 1
    corpus.train.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.tokens is damaged: .* checksum"):
        list(inspect(corpus.directory))
    with pytest.raises(UserError, match=r"unknown command 'show'"):
        main(["show", str(text)])


def test_a_run_of_weighted_corpora(tmp_path, capsys):
    texts = [str(write(tmp_path / f"{i}.txt", POEM.replace("e", "ae"[i]))) for i in range(2)]
    words = [
        "--corpus",
        *texts,
        "--corpus-weights",
        "1",
        "2",
        "--tokenizer",
        "byte",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    words += ["--cache-dir", str(tmp_path / "cache"), "--max-steps", "1", "--sample-tokens", "0", "--device", "cpu"]
    words += ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--seq-len", "16"]
    assert train(load_config(words)) == 0
    capsys.readouterr()
    lines = shown(tmp_path / "run", "--sample-tokens", "9", capsys=capsys)
    assert [line for line in lines if "a byte tokenizer" in line] == [lines[0], lines[len(lines) // 2]]
    begins = [lines[i + 1] for i, line in enumerate(lines) if line.startswith("train.tokens")]
    assert begins == [f"  | {POEM.replace('e', 'ae'[i])[:8]}" for i in range(2)]
    assert "the run's validation text" in loss_of_int8(tmp_path / "run", *load(tmp_path / "run", "cpu"))


def test_a_run_whose_corpus_is_gone(tmp_path, tiny_run):
    for name in ("config.toml", "corpus.json"):
        content = (tiny_run / name).read_text()
        (tmp_path / name).write_text(content.replace('"digest": "', '"digest": "0'))
    with pytest.raises(UserError, match="is no longer in the cache"):
        list(inspect(tmp_path))
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(UserError, match=r"corpus\.json cannot be read"):
        list(inspect(tmp_path))


def test_the_command_itself(tmp_path):
    """Stderr is one line, without a warning about a module imported twice."""
    words = [sys.executable, "-m", "gpt.corpus", "inspect", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere does not exist")
    assert done.stderr.count("\n") == 1


def test_a_hundred_tokens_are_shown_by_default(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"".join(bytes([97 + i % 26, 0]) for i in range(500)))
    text = "".join(chr(97 + i % 26) for i in range(500))
    for options, size in (((), 100), ((7,), 7)):
        assert [line for line in inspect(path, "byte", *options) if "|" in line] == [f"  | {text[:size]}"]
    assert Arguments("inspect", path).sample_tokens == 100

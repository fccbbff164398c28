"""A tokenizer written in one file works with training corpora, inspection, export and benchmarks."""

import numpy as np
import pytest
import tokenizers as library

from benchmarks import tokenize as benchmark
from gpt.data import tokenizers
from gpt.data.build_tokenizer import build_tokenizer, check_name
from gpt.data.config import TokenizerConfig
from gpt.data.inspect import inspect
from gpt.data.tokenizers import DOCUMENT, Tokenizer, load_tokenizer
from gpt.errors import UserError
from gpt.interop.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer, write_tiktoken
from tests.corpus_checks import POEM, sides, write


class Backward(Tokenizer):
    """The 256 bytes in reverse order, then the document token; `learned` is a sample of the text it was built from."""

    kind, learns_from, parallel = "backward", "train", True

    def __init__(self, learned: str) -> None:
        self.learned = learned
        super().__init__([bytes([255 - i]) for i in range(256)] + [b""], {DOCUMENT: 256})

    def _encode(self, text):
        return 255 - np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def _form(self):
        return {"learned": self.learned}

    @classmethod
    def from_form(cls, form):
        return cls(form["learned"])

    @classmethod
    def build(cls, config, texts, document_token):
        return cls("".join(texts())[-7:])


class Declared(Backward):
    """The same tokenizer, which says that it is a byte-level BPE."""

    def __init__(self, learned: str) -> None:
        super().__init__(learned)
        self.tokens = self._pieces[:256]


@pytest.fixture(params=[Backward, Declared])
def toy(request, monkeypatch):
    monkeypatch.setitem(tokenizers.KINDS, "backward", request.param)
    return request.param


def test_it_is_built_saved_and_loaded(tmp_path, toy):
    check_name("backward")
    made = build_tokenizer(TokenizerConfig("backward"), lambda: ["some ", "text"])
    assert (type(made), made.learned) == (toy, "me text")
    made.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (type(loaded), loaded.learned, loaded.fingerprint) == (toy, "me text", made.fingerprint)
    assert loaded.encode("é") == [255 - byte for byte in "é".encode()]


def test_it_learns_from_the_training_part_of_a_corpus(tmp_path, make, toy):
    corpus = make(write(tmp_path / "poem.txt", POEM), "backward")
    assert "".join(sides(corpus)) == POEM
    assert sides(corpus)[0].endswith(corpus.tokenizer.learned)
    assert "a backward tokenizer of 257 tokens" in next(inspect(corpus.directory))


def test_token_files_cannot_be_its_text(tmp_path, make, toy):
    np.arange(100, dtype="<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match="not text that a tokenizer could learn from"):
        make(tmp_path / "x.bin", "backward")


def test_export_refuses_a_tokenizer_that_declares_no_form(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json cannot express a backward tokenizer"):
        write_hf_tokenizer(Backward(""), tmp_path, seq_len=8)
    with pytest.raises(UserError, match="a backward tokenizer has no ranks"):
        write_tiktoken(Backward(""), tmp_path / "ranks")
    assert list(tmp_path.iterdir()) == []


def test_export_writes_a_tokenizer_that_declares_its_tokens(tmp_path):
    ours = Declared("")
    write_hf_tokenizer(ours, tmp_path, seq_len=8)
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(POEM).ids == ours.encode(POEM) == read_hf_tokenizer(tmp_path).encode(POEM)
    write_tiktoken(ours, tmp_path / "ranks")
    assert (tmp_path / "ranks").read_bytes().startswith(b"/w== 0\n/g== 1\n")


def test_the_benchmark_refuses_a_tokenizer_without_an_encoding(toy):
    with pytest.raises(UserError, match="no backward tokenizer to compare with"):
        benchmark.pick("backward", POEM, 300)

"""The tokenization benchmark: contenders, processes and report."""

import json

import pytest

from benchmarks import tokenize as benchmark
from benchmarks.tokenize import OURS, TIKTOKEN
from gpt.data.build_tokenizer import encoding_at_hand
from gpt.data.inspect import bytes_per_token
from tests.corpus_checks import POEM, write
from tests.tokenizer_checks import make_bpe


def test_ratios_are_paired():
    ours, theirs = (
        [{"seconds": s, "cpu": 2 * s, "bytes": 8e6, "mib": s} for s in seconds] for seconds in ((1, 2, 4), (2, 2, 2))
    )
    lines = benchmark.report({OURS: ours, TIKTOKEN: theirs}).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "ours 4.00 MB/s 2.00 MB per second of a core 4 MiB at most",
        "tiktoken 4.00 MB/s 2.00 MB per second of a core 2 MiB at most",
        "ours / tiktoken, speed: 1.00 (0.50 to 2.00, 3 pairs)",
        "ours / tiktoken, the same by the time of all cores: 1.00 (0.50 to 2.00, 3 pairs)",
    ]


def test_both_encode_the_same_text(tmp_path):
    rows = "".join(json.dumps({"text": f"{i} {POEM}"}) + "\n" for i in range(20))
    corpus = [str(write(tmp_path / "x.jsonl", rows))]
    ours, theirs = (benchmark.run(which, corpus, make_bpe(), tmp_path / "cache") for which in (OURS, TIKTOKEN))
    assert ours["bytes"] == theirs["bytes"]
    assert ours["tokens"] == theirs["tokens"] + 20  # a document token before each


def test_the_command_reports_both(tmp_path, capsys):
    path = write(tmp_path / "poem.txt", POEM)
    assert benchmark.main([str(path), "--tokenizer", "bpe", "--vocab-size", "300", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a BPE of 300 tokens trained" in lines[0]
    assert lines[1].startswith("0.0 MB of text, ")
    assert "1 pairs" in lines[5]
    assert lines[6].startswith("bytes per token: this (300) ")


def test_an_uncached_encoding_is_not_downloaded(tmp_path, monkeypatch):
    import tiktoken
    import tiktoken.load

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    asked = lambda address: pytest.fail("the network was asked")
    monkeypatch.setattr(tiktoken.load, "read_file", asked)
    assert encoding_at_hand("gpt2") is None
    assert tiktoken.load.read_file is asked  # restored afterwards
    assert "gpt2 is not in tiktoken's cache" in bytes_per_token(POEM, make_bpe())


def test_a_cached_encoding_is_used(named):
    assert encoding_at_hand("gpt2").vocab_size == 306
    line = bytes_per_token(POEM, make_bpe())
    assert f"gpt2 (306) {len(POEM.encode()) / len(named.encode(POEM)):.3f}" in line

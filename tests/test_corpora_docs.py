"""Every command in the corpus tables of README and docs/corpora.md runs, up to the tokens."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from gpt.data import downloads
from gpt.data.corpus import prepare
from gpt.training.command import load_config
from tests.corpus_checks import POEM, sides, write
from tests.test_external_tokens import llm_c, nanogpt
from tests.test_readers import PACK, lines, parquet

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^\| .* \| `((?:cat .* \\\| )?python train\.py --corpus .*)` \|$", re.MULTILINE)
TABLES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/corpora.md")]
COMMANDS = list(dict.fromkeys(command for table in TABLES for command in COMMAND.findall(table)))
TEXTS = [f"document {i}: {POEM[:90]}" for i in range(30)]


@pytest.fixture
def folder(tmp_path, monkeypatch, named):
    """A working directory with every file that the commands name; the network and the Hub are stubs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("book.txt", "notes/a.md", "papers/b.md"):
        write(Path(name), POEM)
    write(Path("notes.txt.gz"), gzip.compress(POEM.encode()))
    write(Path("letters.txt.zst"), PACK[".zst"](POEM.encode()))
    for name in ("rows.jsonl", "rows.jsonl.gz", "more.jsonl.gz", "most.jsonl.zst"):
        write(Path(name), PACK[Path(name).suffix.replace(".jsonl", "")](lines(TEXTS)))
    write(Path("old.txt.bz2"), bz2.compress(POEM.encode()))
    write(Path("older.txt.xz"), lzma.compress(POEM.encode()))
    rows = [{"text": text} for text in TEXTS]
    write(Path("c4.json.gz"), gzip.compress(lines(TEXTS)))
    write(Path("rows.json"), json.dumps(rows))
    write(Path("pretty.json.gz"), gzip.compress("\n".join(json.dumps(row, indent=2) for row in rows).encode()))
    write(Path("rows_body.jsonl"), lines(TEXTS, "body"))
    for name, mark in (("rows.csv", ","), ("more.tsv", "\t")):
        table = io.StringIO()
        csv.writer(table, delimiter=mark).writerows([["id", "text"], *enumerate(TEXTS)])
        write(Path(name), table.getvalue())
    Path("shards").mkdir()
    parquet(Path("shards/0.parquet"), TEXTS)
    nanogpt(Path("data/openwebtext/train.bin"), named.encode(POEM))
    nanogpt(Path("data/openwebtext/val.bin"), named.encode(POEM)[:200])
    llm_c(Path("fineweb10B/fineweb_train_000001.bin"), named.encode(POEM))
    llm_c(Path("fineweb10B/fineweb_val_000000.bin"), named.encode(POEM)[:200])
    monkeypatch.setattr(downloads, "_received", lambda url, limit: iter([(POEM.encode(), 0)]))
    hub = types.SimpleNamespace(load_dataset=lambda name, config, **_: ({"text": text} for text in TEXTS))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_makes_a_corpus(folder, command, monkeypatch):
    piped, _, line = command.replace("\\|", "|").rpartition(" | ")
    if piped:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(piped.removeprefix("cat ")).read_bytes())))
    config = load_config(shlex.split(line)[2:])
    corpus = prepare(config.data, config.tokenizer)
    assert corpus.train_tokens > 100
    assert corpus.val_tokens > 10
    if config.data.corpus != ("python:stdlib",):
        assert POEM[:60] in sides(corpus)[0]


def test_all_commands_were_found():
    assert len(COMMANDS) == 17

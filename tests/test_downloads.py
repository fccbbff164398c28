"""What is fetched into the cache first: files behind URLs, stdin, Hugging Face datasets."""

import datetime
import gzip
import hashlib
import http.server
import inspect
import io
import json
import sys
import threading
import time
import types
from dataclasses import dataclass, field
from typing import Any

import pytest

from gpt.data import downloads
from gpt.data.config import DataConfig
from gpt.data.downloads import download, spool_stdin
from gpt.errors import UserError
from tests.corpus_checks import POEM, sides, write

ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50))

# --- downloads --------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/text")
            self.end_headers()
            return
        if self.path not in ("/text", "/short", "/empty", "/endless", "/rows.jsonl.gz?v=1"):
            self.send_error(404)
            return
        body = b"" if self.path == "/empty" else POEM.encode()
        body = gzip.compress(ROWS.encode()) if "rows" in self.path else body
        self.send_response(200)
        if self.path != "/endless":  # no length: only reading tells
            self.send_header("Content-Length", str(len(body) + 10 * (self.path == "/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of this machine; its address, and `requests` served."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Handler, "requests", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("page", ["text", "moved", "endless"])
def test_url_is_fetched_once_and_its_hash_recorded(server, make, tmp_path, page):
    url, calls = f"{server.url}/{page}", []
    first = make(url, progress=lambda *call: calls.append(call))
    digest, size = hashlib.sha256(POEM.encode()).hexdigest(), len(POEM.encode())
    assert "".join(sides(first)) == POEM
    assert first.sources == ((url, size, digest),)
    assert (f"downloading {url}", size, 0 if page == "endless" else size) in calls
    (record,) = (tmp_path / "cache" / "downloads").glob("*/record.json")
    assert json.loads(record.read_text()) == {"url": url, "sha256": digest, "bytes": size}
    assert record.parent.name == hashlib.sha256(url.encode()).hexdigest()[:32]  # where an earlier version left it too
    served = Handler.requests
    server.shutdown()
    server.server_close()
    assert make(url, "byte").sources == first.sources  # another tokenizer, no network
    assert Handler.requests == served


@pytest.mark.parametrize(
    ("page", "message"),
    [("nothing", "404 Not Found"), ("short", "broke off after|IncompleteRead"), ("empty", "broke off after 0")],
)
def test_failed_download_leaves_nothing(server, make, tmp_path, page, message):
    with pytest.raises(UserError, match=message) as caught:
        make(f"{server.url}/{page}")
    assert f"{server.url}/{page}" in str(caught.value)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


@pytest.mark.parametrize("page", ["text", "endless"])
def test_download_stops_at_the_size_limit(server, make, tmp_path, monkeypatch, page):
    monkeypatch.setattr(downloads, "_CHUNK", 100)
    with pytest.raises(UserError, match="more than 1000 bytes"):
        make(f"{server.url}/{page}", max_download_bytes=1000)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_an_unreachable_server_is_reported(server, make):
    url = f"{server.url}/text"
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot download http://127.*check the address and the network"):
        make(url)


@pytest.mark.parametrize("url", ["http://", "http://[", "https://exa mple/x", "http://127.0.0.1:99999/x"])
def test_an_invalid_url_is_refused(make, url, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match="cannot download"):
        make(url)


def test_silent_server_times_out(make, monkeypatch):
    import socket

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.05)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        make(f"http://127.0.0.1:{silent.getsockname()[1]}/text")
    assert time.monotonic() - start < 2


def test_damaged_download_is_refused(server, make, tmp_path):
    url = f"{server.url}/text"
    source = download(url, tmp_path / "cache" / "downloads")
    write(source.path, POEM[:-1])
    with pytest.raises(UserError, match="delete the file first if it is a download"):
        make(url)
    write(source.path.parent / "record.json", "{}")
    with pytest.raises(UserError, match="is damaged: delete that folder"):
        make(url)


def test_a_url_of_json_lines(server, make):
    corpus = make(f"{server.url}/rows.jsonl.gz?v=1", "byte")
    assert corpus.documents == 50
    assert len("".join(sides(corpus))) == sum(len(f"row {i}") for i in range(50))


# --- stdin ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch):
    """piped(bytes) puts them on stdin."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda content: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_stdin_is_cached_by_its_content(make, tmp_path, piped, monkeypatch):
    monkeypatch.setattr(downloads, "_CHUNK", 100)
    made = []
    for _ in range(2):
        piped(POEM.encode())
        made.append(make("-", progress=lambda *call: None))
    digest = hashlib.sha256(POEM.encode()).hexdigest()
    assert made[0].sources == made[1].sources == (("stdin", len(POEM.encode()), digest),)
    assert "".join(sides(made[0])) == POEM
    (kept,) = (tmp_path / "cache" / "downloads").iterdir()
    assert (kept / "content").read_text() == POEM


def test_stdin_can_be_combined_with_files(make, piped, tmp_path):
    piped(b"from the pipe")
    corpus = make(("-", write(tmp_path / "x.txt", "from a file")), "byte")
    assert [name for name, *_ in corpus.sources] == ["stdin", str(tmp_path / "x.txt")]


def test_stdin_without_text_is_refused(make, piped, tmp_path, monkeypatch):
    piped(b"")
    with pytest.raises(UserError, match="the corpus -, stdin, is empty"):
        make("-")
    piped(b"x" * 2000)
    with pytest.raises(UserError, match=r"stdin has more than 1000 bytes: raise --max-download-bytes"):
        make("-", max_download_bytes=1000)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="nothing is piped in"):
        make("-")
    piped(b"text")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="only one process can read stdin"):
        make("-")


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """Stands in for the datasets library: rows, or an error, for any name; notes what was asked for."""

    rows: list[Any]
    error: Exception | None = None
    num_bytes: int | None = None
    asked: list[Any] = field(default_factory=list)
    read: int = 0

    def load_dataset(self, name, config, *, split, streaming):
        self.asked.append((name, config, split, streaming))
        if self.error is not None and not self.rows:
            raise self.error
        return self

    @property
    def info(self):
        return types.SimpleNamespace(splits={"train": types.SimpleNamespace(num_bytes=self.num_bytes)})

    def __iter__(self):
        for row in self.rows:
            self.read += 1
            yield row
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch):
    def hub(rows: list[Any], **options: Any) -> Hub:
        made = Hub(rows, **options)
        monkeypatch.setitem(sys.modules, "datasets", made)
        return made

    return hub


TEXTS = [f"row {i} — é" for i in range(50)]


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hf:owner/name", ("owner/name", None, "train", True)),
        ("hf:name:sample-10BT", ("name", "sample-10BT", "train", True)),
        ("hf:owner/name@test", ("owner/name", None, "test", True)),
        ("hf:owner/name:en@train[:1%]", ("owner/name", "en", "train[:1%]", True)),
    ],
)
def test_a_dataset_is_streamed_once(make, hub, spec, asked, tmp_path):
    found = hub([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    first, again = make(spec, "byte"), make(spec, "bpe")
    assert found.asked == [asked]
    assert first.sources == again.sources
    assert (first.sources[0][0], first.documents) == (spec, 50)
    assert sorted("".join(sides(first))) == sorted("".join(TEXTS))
    (kept,) = (tmp_path / "cache" / "downloads").iterdir()
    assert [json.loads(line) for line in (kept / "content").open()] == [{"text": text} for text in TEXTS]


def test_reading_a_dataset_stops_at_the_cap(make, hub):
    found = hub([{"body": "x" * 10} for _ in range(10_000)])
    corpus = make("hf:name", "byte", text_field="body", max_corpus_bytes=105)
    assert corpus.train_bytes + corpus.val_bytes == 100
    assert found.read == 11


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "the dataset hf:name is empty"),
        ([], {"error": ValueError("Config name is missing.\nPick one")}, r"hf:name \(ValueError: .* Pick one\)"),
        ([{"text": "a"}], {"error": ConnectionError("gone")}, r"hf:name after row 1 \(ConnectionError: gone\)"),
        ([{"text": "a"}, {"body": "b", "id": 1}], {}, r"row 2 has no field 'text': it has body, id; .*--text-field"),
        ([{"text": 3}], {}, r"hf:name, row 1: the field 'text' is not text but a number"),
        ([{"text": datetime.date(2020, 1, 1)}], {}, r"hf:name, row 1: the field 'text' is not text but of type date"),
        ([{"text": "x" * 200}] * 9, {}, r"hf:name has more than 1000 bytes: .*--max-corpus-bytes"),
        ([{"text": "x"}], {"num_bytes": 1001}, r"hf:name has more than 1000 bytes: .*--max-corpus-bytes"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_refused(make, hub, tmp_path, rows, options, message):
    found = hub(rows, **options)
    with pytest.raises(UserError, match=message) as caught:
        make("hf:name", max_download_bytes=1000)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    assert found.read <= (5 if options.get("num_bytes") is None else 0)


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c", "hf:a@", "hf: a"])
def test_a_misspelt_dataset_is_refused(make, spec):
    with pytest.raises(UserError, match="write hf:NAME"):
        make(spec)


def test_the_default_limit_is_the_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for fetch, source in ((download, ["http://["]), (spool_stdin, [])):
        with pytest.raises(UserError):
            fetch(*source, tmp_path)
    for fetch in (download, spool_stdin):
        assert inspect.signature(fetch).parameters["limit"].default == DataConfig().max_download_bytes == 16 * 2**30


def test_a_broken_pipe_is_reported(tmp_path, monkeypatch):
    class Broken:
        def read(self, size):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=Broken(), isatty=lambda: False))
    with pytest.raises(UserError, match="cannot read stdin: Input/output error"):
        spool_stdin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_stdin_that_is_stored_already_stays_untouched(tmp_path, monkeypatch):
    """A training that reads the file keeps it."""
    made = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(POEM.encode()), isatty=lambda: False))
        made.append(spool_stdin(tmp_path).path.stat().st_ino)
    assert made[0] == made[1] and len(list(tmp_path.iterdir())) == 1


def test_a_server_is_told_who_asks(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: asked.append(request.headers) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download("http://localhost/a.txt", tmp_path)
    assert asked == [{"User-agent": "gpt-on-triton"}]

"""Sources that must be fetched before they can be read twice: URLs, Hugging Face datasets, stdin.

Each is stored in a folder of its own in the cache, beside a record of its size and SHA-256. It takes as many bytes of
disk as the text has, at most --max-download-bytes each.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt.data.cache import publish, unfinished
from gpt.data.config import DataConfig
from gpt.data.json_documents import field_of
from gpt.data.readers import Source
from gpt.data.unpack import need
from gpt.errors import UserError

TIMEOUT_S = 30.0  # of each wait for the network
_CHUNK = 1 << 20  # bytes read at a time
_DATASET = re.compile(r"hf:(?P<name>[^:@\s]+)(:(?P<config>[^:@\s]+))?(@(?P<split>[^@\s]+))?")

OnProgress = Callable[[str, int, int], None]  # gets the stage, bytes done, and bytes in all (0: unknown)
Blocks = Iterator[tuple[bytes, int]]  # each block with the bytes in all (0: unknown)


def download(url: str, folder: Path, progress: OnProgress | None = None, *, limit: int = 16 << 30) -> Source:
    """Download a URL once, into a folder of its own below `folder`; a second call uses that copy.

    Raises UserError if the URL does not deliver a whole file, or delivers more than `limit` bytes.
    """
    return _once(folder, url, url, _received(url, limit), progress)


def _once(folder: Path, key: str, name: str, blocks: Blocks, progress: OnProgress | None, **form: Any) -> Source:
    """Store blocks in the folder of a key, unless an earlier call has."""
    final = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (final / "record.json").is_file():
        with publish(final) as work:
            _spool(blocks, work, name, f"downloading {name}", progress)
    return _stored(final, name, **form)


def _stored(folder: Path, name: str, **form: Any) -> Source:
    """Open the source that an earlier fetch stored in a folder."""
    try:
        record = json.loads((folder / "record.json").read_bytes())
        return Source(name, folder / "content", int(record["bytes"]), sha256=str(record["sha256"]), **form)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the download in {folder} is damaged: delete that folder to fetch {name} again") from None


def _spool(blocks: Blocks, folder: Path, name: str, what: str, progress: OnProgress | None) -> tuple[str, int]:
    """Write blocks and their record into a folder. Returns (sha256, bytes)."""
    digest, size = hashlib.sha256(), 0
    with open(folder / "content", "wb") as file:
        for block, total in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
            if progress is not None:
                progress(what, size, total)
    record = {"url": name, "sha256": digest.hexdigest(), "bytes": size}
    (folder / "record.json").write_text(json.dumps(record, indent=0))
    return digest.hexdigest(), size


def _received(url: str, limit: int) -> Blocks:
    """Download a URL, block by block."""
    import http.client
    import urllib.error
    import urllib.request

    size = 0
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gpt-on-triton"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(_CHUNK):
                size += len(block)
                if max(size, total) > limit:
                    raise UserError(
                        f"{url} has more than {limit} bytes: raise --max-download-bytes, or name a file of your own"
                    )
                yield block, total
    except urllib.error.HTTPError as error:
        raise UserError(f"cannot download {url}: the server answers {error.code} {error.reason}") from None
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {url}: {reason}; check the address and the network") from None
    if size == 0 or size < total:
        raise UserError(f"cannot download {url}: the connection broke off after {size} of {total} bytes; try again")


def spool_stdin(folder: Path, progress: OnProgress | None = None, *, limit: int = 16 << 30) -> Source:
    """Store all of stdin as one text. UserError if nothing is piped in, or more than `limit` bytes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("only one process can read stdin: save the text to a file, and name that with --corpus")
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("the corpus - is stdin and nothing is piped in: `cat text.txt | python train.py --corpus -`")

    def blocks() -> Blocks:
        size = 0
        try:
            while block := sys.stdin.buffer.read(_CHUNK):
                size += len(block)
                if size > limit:
                    raise UserError(
                        f"stdin has more than {limit} bytes: raise --max-download-bytes, or save it to a file"
                    )
                yield block, 0
        except OSError as error:
            raise UserError(f"cannot read stdin: {error.strerror or error}") from None

    with unfinished(folder) as work:  # the folder is named after the content
        digest, size = _spool(blocks(), work, "stdin", "reading stdin", progress)
        if size == 0:
            raise UserError("the corpus -, stdin, is empty: nothing came through the pipe")
        final = folder / digest[:32]
        with publish(final) as copy:  # or keep an earlier copy
            for name in ("content", "record.json"):
                os.rename(work / name, copy / name)
    return _stored(final, "stdin")


def spool_dataset(spec: str, data: DataConfig, folder: Path, progress: OnProgress | None = None) -> Source:
    """Stream a Hugging Face dataset, hf:NAME[:CONFIG][@SPLIT], into JSON lines, once. The default split is train.

    Reads whole documents up to data.max_corpus_bytes of text. Raises UserError for a dataset that cannot be loaded,
    lacks the field of text, or has more than data.max_download_bytes.
    """
    parts = _DATASET.fullmatch(spec)
    if parts is None:
        raise UserError(f"the corpus {spec} names no dataset: write hf:NAME, hf:NAME:CONFIG or hf:NAME@SPLIT")
    key = json.dumps([spec, data.text_field, data.max_corpus_bytes])
    return _once(folder, key, spec, _rows(spec, parts, data), progress, kind="jsonl")


def _rows(spec: str, parts: re.Match[str], data: DataConfig) -> Blocks:
    """Stream a dataset's rows as JSON lines with the field "text", each with the expected bytes of text in all."""
    split, cap, limit = parts["split"] or "train", data.max_corpus_bytes, data.max_download_bytes
    too_large = f"{spec} has more than {limit} bytes: take the first of them with --max-corpus-bytes, or raise "
    too_large += "--max-download-bytes"
    row = text_bytes = size = 0
    datasets = need("datasets", "Hugging Face datasets")
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=split, streaming=True)
        known = getattr(getattr(rows, "info", None), "splits", None) or {}
        total = getattr(known.get(split), "num_bytes", None) or 0
        if cap is None and total > limit:
            raise UserError(too_large)
        for row, values in enumerate(rows, 1):
            text = field_of(values, data.text_field, f"{spec}, row {row}", "each row")
            text_bytes += len(text.encode("utf-8", "surrogatepass"))
            block = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            size += len(block)
            if size > limit:
                raise UserError(too_large)
            yield block, total if cap is None else cap
            if cap is not None and text_bytes >= cap:
                return
    except UserError:
        raise
    except Exception as error:  # the library and the dataset's reader raise errors of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        where = f" after row {row}" if row else ""
        raise UserError(f"cannot read the dataset {spec}{where} ({reason}): check its name and the network") from None
    if not row:
        raise UserError(f"the dataset {spec} is empty: it has no rows")

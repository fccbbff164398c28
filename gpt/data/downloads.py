"""What has to be fetched before it can be read twice: files behind URLs, Hugging Face datasets, stdin.

Each is kept in the cache, in a folder of its own below `downloads`, beside a record of its size and SHA-256. That
takes as much of the disk as the text has bytes, at most --max-download-bytes for each.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpt.data.cache import publish, unfinished
from gpt.data.config import DataConfig
from gpt.data.readers import Source
from gpt.data.unpack import need
from gpt.errors import UserError

TIMEOUT_S = 30.0  # of each wait for the network
_CHUNK = 1 << 20  # bytes read at a time
_DATASET = re.compile(r"hf:(?P<name>[^:@\s]+)(:(?P<config>[^:@\s]+))?(@(?P<split>[^@\s]+))?")

OnProgress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0: not known)


def download(url: str, folder: Path, progress: OnProgress | None = None, *, limit: int = 16 << 30) -> Source:
    """The file behind a URL, fetched once into a folder of its own below `folder`, beside its record.

    A second call uses that copy without the network. Raises UserError when the URL does not give a whole file, or one
    of more than `limit` bytes.
    """
    kept = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
    if not (kept / "record.json").is_file():
        with publish(kept) as work:
            digest, size = _fetch(url, work / "content", progress, limit)
            _record(work, url, digest, size)
    return _kept(kept, url)


def _record(folder: Path, name: str, sha256: str, size: int) -> None:
    (folder / "record.json").write_text(json.dumps({"url": name, "sha256": sha256, "bytes": size}, indent=0))


def _kept(kept: Path, name: str, **form: Any) -> Source:
    """What an earlier fetch left in a folder."""
    try:
        record = json.loads((kept / "record.json").read_bytes())
        return Source(name, kept / "content", int(record["bytes"]), sha256=str(record["sha256"]), **form)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the download in {kept} is damaged: delete that folder to fetch {name} again") from None


def _fetch(url: str, path: Path, progress: OnProgress | None, limit: int) -> tuple[str, int]:
    """Download to path; (sha256, bytes)."""
    with open(path, "wb") as file:
        return _spool(_received(url, limit), file, f"downloading {url}", progress)


def _spool(
    blocks: Iterator[tuple[bytes, int]], file: IO[bytes], what: str, progress: OnProgress | None
) -> tuple[str, int]:
    """Write blocks, each with the bytes there will be in all (0: not known); (sha256, bytes)."""
    digest, size = hashlib.sha256(), 0
    for block, total in blocks:
        file.write(block)
        digest.update(block)
        size += len(block)
        if progress is not None:
            progress(what, size, total)
    return digest.hexdigest(), size


def _received(url: str, limit: int) -> Iterator[tuple[bytes, int]]:
    """The body of a URL in blocks, each with the length that the server announced (0: none)."""
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
        raise UserError(f"cannot download {url}: it broke off after {size} of {total} bytes; try again")


def spool_stdin(folder: Path, progress: OnProgress | None = None, *, limit: int = 16 << 30) -> Source:
    """All that is piped into this process, as one text. UserError where nothing is, or more than `limit` bytes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("stdin reaches one process only: save the text to a file, and name that with --corpus")
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("the corpus - is stdin and nothing is piped in: `cat text.txt | python train.py --corpus -`")

    def blocks() -> Iterator[tuple[bytes, int]]:
        size = 0
        while block := _read_stdin():
            size += len(block)
            if size > limit:
                raise UserError(f"stdin has more than {limit} bytes: raise --max-download-bytes, or save it to a file")
            yield block, 0

    with unfinished(folder) as work:  # what comes decides where it goes
        with open(work / "content", "wb") as file:
            digest, size = _spool(blocks(), file, "reading stdin", progress)
        if size == 0:
            raise UserError("the corpus -, stdin, is empty: nothing came through the pipe")
        kept = folder / digest[:32]
        if not (kept / "record.json").is_file():
            with publish(kept) as final:
                os.rename(work / "content", final / "content")
                _record(final, "stdin", digest, size)
    return _kept(kept, "stdin")


def _read_stdin() -> bytes:
    try:
        return sys.stdin.buffer.read(_CHUNK)
    except OSError as error:
        raise UserError(f"cannot read stdin: {error.strerror or error}") from None


def spool_dataset(spec: str, data: DataConfig, folder: Path, progress: OnProgress | None = None) -> Source:
    """A Hugging Face dataset, hf:NAME[:CONFIG][@SPLIT], streamed into JSON lines, once.

    The split is train if none is named. No more than data.max_corpus_bytes of text is read, whole documents. Raises
    UserError for a dataset that cannot be had, has no such field of text, or more than data.max_download_bytes.
    """
    parts = _DATASET.fullmatch(spec)
    if parts is None:
        raise UserError(f"the corpus {spec} names no dataset: it is spelt hf:NAME, hf:NAME:CONFIG or hf:NAME@SPLIT")
    key = json.dumps([spec, data.text_field, data.max_corpus_bytes])
    kept = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (kept / "record.json").is_file():
        datasets = need("datasets", "Hugging Face datasets")
        with publish(kept) as work, open(work / "content", "wb") as file:
            digest, size = _spool(_rows(spec, parts, datasets, data), file, f"downloading {spec}", progress)
            file.close()
            _record(work, spec, digest, size)
    return _kept(kept, spec, kind="jsonl")


def _rows(spec: str, parts: re.Match[str], datasets: Any, data: DataConfig) -> Iterator[tuple[bytes, int]]:
    """The rows as JSON lines with the field "text", each with the bytes of text to come in all (0: not known)."""
    split, cap, limit = parts["split"] or "train", data.max_corpus_bytes, data.max_download_bytes
    too_large = f"{spec} has more than {limit} bytes: take the first of them with --max-corpus-bytes, or raise "
    too_large += "--max-download-bytes"
    row = text_bytes = size = 0
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=split, streaming=True)
        known = getattr(getattr(rows, "info", None), "splits", None) or {}
        total = getattr(known.get(split), "num_bytes", None) or 0
        if cap is None and total > limit:
            raise UserError(too_large)
        for row, values in enumerate(rows, 1):
            text = _text_of(values, data.text_field, f"{spec}, row {row}")
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
    except Exception as error:  # of whatever kind the library and the dataset's own reader raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        where = f" after row {row}" if row else ""
        raise UserError(f"cannot read the dataset {spec}{where} ({reason}): check its name and the network") from None
    if not row:
        raise UserError(f"the dataset {spec} is empty: it has no rows")


def _text_of(values: Any, field: str, where: str) -> str:
    if field not in values:
        names = ", ".join(map(str, values))
        raise UserError(f"{where} has no field {field!r}: it has {names}; name what holds the text with --text-field")
    text = values[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {field!r} is not text but {type(text).__name__}")
    return text

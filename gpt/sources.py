"""Where text comes from: files, folders, globs, http(s) URLs and the interpreter's own library, read in chunks.

Text is taken as it stands: blanks and line ends (CRLF too) are kept, only a byte order mark at a file's start is left
out. One file is one document.
"""

import codecs
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.config import DataConfig
from gpt.errors import UserError

log = logging.getLogger(__name__)

STDLIB = "python:stdlib"
TIMEOUT_S = 30.0  # of each wait for the network
_CHUNK = 1 << 20  # bytes read at a time
_HEAD = 8192  # bytes that tell text from binary
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # bytes that no text of any common encoding holds

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all (0: not known)


@dataclass(frozen=True)
class Source:
    """One document: a file, or its first `limit` bytes.

    coding: "utf-8", or "python" for a source file that names its own encoding (PEP 263).
    sha256: of the bytes read, where that is known; a file that no longer has it is refused.
    """

    name: str
    path: Path
    size: int  # bytes of the file that are read
    coding: str = "utf-8"
    limit: int | None = None
    sha256: str = ""

    def hashed(self) -> "Source":
        """The same source with its sha256 and exact size."""
        digest, size = hashlib.sha256(), 0
        for block in self._blocks():
            digest.update(block)
            size += len(block)
        self._check(digest.hexdigest())
        return replace(self, sha256=digest.hexdigest(), size=size)

    def chunks(self, errors: str) -> Iterator[str]:
        """The text, about a million characters at a time. errors: "strict" or "replace", as in bytes.decode.

        Raises UserError for bytes that are no text, and at the end if the file has changed since it was hashed.
        """
        digest, position = hashlib.sha256(), 0
        decoder = codecs.getincrementaldecoder(self._encoding(errors))(errors)
        for block in self._blocks():
            digest.update(block)
            mark = len(codecs.BOM_UTF8) if position == 0 and block.startswith(codecs.BOM_UTF8) else 0
            yield self._decode(decoder, block[mark:], position + mark)
            position += len(block)
        if self.limit is None:  # the limit may fall inside a character, which is then left out
            yield self._decode(decoder, b"", position, final=True)
        self._check(digest.hexdigest())

    def _blocks(self) -> Iterator[bytes]:
        left = self.limit
        try:
            with open(self.path, "rb", buffering=0) as file:
                while block := file.read(_CHUNK if left is None else min(_CHUNK, left)):
                    left = None if left is None else left - len(block)
                    yield block
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror or error}") from None

    def _encoding(self, errors: str) -> str:
        if self.coding != "python":
            return self.coding
        lines = iter(next(self._blocks(), b"").splitlines(keepends=True))
        try:
            encoding, _ = tokenize.detect_encoding(lambda: next(lines))
            return encoding.removesuffix("-sig")
        except SyntaxError as error:
            if errors == "replace":
                return "utf-8"
            raise UserError(f"{self.name}: {error.msg}; give --encoding-errors replace to read it as UTF-8") from None

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes, position: int, final: bool = False) -> str:
        """Decode one block that starts at byte `position` of the file."""
        pending = len(decoder.getstate()[0])
        try:
            return decoder.decode(block, final)
        except UnicodeDecodeError as error:
            offset = position - pending + error.start
            before = replace(self, limit=offset, sha256="")
            line = 1 + sum(block.count(b"\n") for block in before._blocks())
            start = next(self._blocks(), b"")[:2]
            utf16 = " (it looks like UTF-16)" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
            found = f"byte {offset} (0x{error.object[error.start]:02x}, in line {line}) begins no character"
            raise UserError(
                f"{self.name} is not valid {error.encoding.upper()}{utf16}: {found}; "
                "convert the file, or give --encoding-errors replace"
            ) from None

    def _check(self, digest: str) -> None:
        if self.sha256 not in ("", digest):
            raise UserError(
                f"{self.path} is not what it was (sha256 {digest}, not {self.sha256}): "
                "start again, after deleting it if it is a download"
            )


def find_sources(data: DataConfig, downloads: Path, progress: Progress | None = None) -> list[Source]:
    """The documents that data.corpus names, in its order, each file once, at most data.max_corpus_bytes in all.

    Documents are whole; only a first one that alone passes the cap is cut at it. Empty files are none. downloads: the
    folder that keeps what came from URLs. Raises UserError for what is not there, or holds no text.
    """
    if not data.corpus:
        raise UserError(f"no corpus is given: name files, folders, globs, http(s) URLs or {STDLIB} with --corpus")
    cap = data.max_corpus_bytes
    found: dict[str, Source] = {}
    total = 0
    for source in (source for spec in data.corpus for source in _named(spec, data, downloads, progress)):
        key = os.path.realpath(source.path)
        if source.size == 0 or key in found:
            continue
        if cap is not None and total + source.size > cap:
            if not found:
                found[key] = replace(source, size=cap, limit=cap, sha256="")
            break
        found[key] = source
        total += source.size
    if not found:
        raise UserError(f"the corpus {', '.join(data.corpus)} is empty: give a text that is not")
    return list(found.values())


def _named(spec: str, data: DataConfig, downloads: Path, progress: Progress | None) -> Iterator[Source]:
    """The documents of one entry of data.corpus, in order."""
    try:
        yield from _expand(spec, data, downloads, progress)
    except OSError as error:
        raise UserError(f"cannot read the corpus {spec}: {error.strerror or error}") from None


def _expand(spec: str, data: DataConfig, downloads: Path, progress: Progress | None) -> Iterable[Source]:
    if not spec.strip():
        raise UserError("the corpus has an entry without a name: give a file, folder, glob or URL")
    if spec == STDLIB:
        return _stdlib()
    if re.match(r"https?://", spec, re.IGNORECASE):
        return [download(spec, downloads, progress, limit=data.max_download_bytes)]
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return _texts(spec, [path])
    if path.exists():
        return [_file(path)]
    if glob.has_magic(spec):
        return _texts(spec, [Path(match) for match in glob.glob(str(path), recursive=True)])
    raise UserError(f"the corpus {spec} is not there: no such file or folder, seen from {Path.cwd()}")


def _file(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"{path} is no regular file: save its text to one first, since it is read more than once")
    return Source(str(path), path, path.stat().st_size)


def _texts(spec: str, roots: list[Path]) -> list[Source]:
    """The text files at and below roots, sorted by path; says how many entries were left out."""
    files: set[Path] = set()
    hidden = 0
    for root in roots:
        if not root.is_dir():
            files.add(root)
            continue
        for folder, folders, names in os.walk(root, onerror=_fail):
            hidden += sum(name.startswith(".") for name in folders + names)
            folders[:] = [name for name in folders if not name.startswith(".")]
            files.update(Path(folder, name) for name in names if not name.startswith("."))
    texts = [path for path in sorted(files) if path.is_file() and not _is_binary(path)]
    if hidden or len(texts) < len(files):
        log.warning("%s: left out %d hidden and %d binary files", spec, hidden, len(files) - len(texts))
    if not texts:
        raise UserError(f"the corpus {spec} leads to no text file")
    return [_file(path) for path in texts]


def _fail(error: OSError) -> None:
    raise error


def _is_binary(path: Path) -> bool:
    """Whether a file's start shows that it is no text: a NUL, or not UTF-8 and with control characters."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return _CONTROL.search(head) is not None
    return b"\0" in head


def _stdlib() -> Iterator[Source]:
    """The running interpreter's own library: .py files by depth, then path, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    level = [root] if root.is_dir() else []
    if not level:
        raise UserError(f"this Python has no library in files ({root} is no folder): give another --corpus")
    while level:
        entries = sorted(entry for folder in level for entry in folder.iterdir())
        for path in entries:
            # _sysconfigdata is a record of how this Python was built, not library code.
            if path.suffix == ".py" and path.is_file() and not path.name.startswith("_sysconfigdata"):
                name = f"{STDLIB}/{path.relative_to(root).as_posix()}"
                yield Source(name, path, path.stat().st_size, coding="python")
        level = [path for path in entries if path.is_dir() and not path.is_symlink() and path.name not in _LEFT_OUT]


def download(url: str, folder: Path, progress: Progress | None = None, *, limit: int = 16 << 30) -> Source:
    """The file behind a URL, fetched once into a folder of its own below `folder`, beside its record.

    A second call uses that copy without the network. Raises UserError when the URL does not give a whole file, or one
    of more than `limit` bytes.
    """
    place = folder / hashlib.sha256(url.encode()).hexdigest()[:32]
    if not (place / "record.json").is_file():
        with publish(place) as work:
            digest, size = _fetch(url, work / "content", progress, limit)
            record = {"url": url, "sha256": digest, "bytes": size}
            (work / "record.json").write_text(json.dumps(record, indent=0))
    try:
        record = json.loads((place / "record.json").read_text())
        return Source(url, place / "content", int(record["bytes"]), sha256=str(record["sha256"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the download in {place} is damaged: delete that folder to fetch {url} again") from None


def _fetch(url: str, path: Path, progress: Progress | None, limit: int) -> tuple[str, int]:
    """Download to path; (sha256, bytes)."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block, total in _received(url, limit):
            file.write(block)
            digest.update(block)
            size += len(block)
            if progress is not None:
                progress(f"downloading {url}", size, total)
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


@contextmanager
def publish(place: Path) -> Iterator[Path]:
    """A new folder to write in, which becomes `place` when the block ends well and goes away when it does not.

    A reader never sees half of it. Where another process was first, its folder stays. A write that fails in the block
    is a UserError that names the cache folder. What killed processes left behind goes after a day.
    """
    work = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
        work.chmod(0o755)
        yield work
        try:
            os.rename(work, place)
        except OSError:
            if not place.is_dir():
                raise
    except BrokenPipeError:  # of the terminal, not of the cache
        raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to the cache folder {place.parent} ({reason}): give another with --cache-dir"
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove the unfinished folders of processes that were killed more than a day ago."""
    for old in folder.glob(".writing-*"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)

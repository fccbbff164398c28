"""Finds the files behind a corpus: files, folders, globs, http(s) URLs, Hugging Face datasets, stdin and the library of
the Python that runs. gpt/data/readers.py reads them."""

import codecs
import glob
import logging
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from gpt.data.config import DataConfig
from gpt.data.downloads import OnProgress, download, spool_dataset, spool_stdin
from gpt.data.formats import form_of
from gpt.data.readers import Source
from gpt.errors import UserError

log = logging.getLogger(__name__)

STDLIB = "python:stdlib"
STDIN = "-"
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def find_sources(data: DataConfig, downloads: Path, progress: OnProgress | None = None) -> list[Source]:
    """List the files that data.corpus names, in order, each once, with at most data.max_corpus_bytes of text in all.

    Documents stay whole; only a first document larger than the cap is cut. Empty files are left out. downloads: the
    folder for URLs, datasets and stdin. Raises UserError for an entry that does not exist or holds no text.
    """
    if not data.corpus:
        raise UserError(f"no corpus is given: name files, folders, globs, http(s) URLs or {STDLIB} with --corpus")
    cap = data.max_corpus_bytes
    found: dict[str, Source] = {}
    total = 0
    for source in (source for spec in data.corpus for source in _named(spec, data, downloads, progress)):
        key = os.path.realpath(source.path)
        if key in found or not _holds_text(source):
            continue
        if cap is not None:
            left = cap - total
            size = source.size if source.plain else source.text_bytes(left)
            if size > left:
                if source.plain and not found:
                    found[key] = replace(source, size=cap, limit=cap, sha256="")
                elif not source.plain and (not found or source.first_fits(left)):
                    found[key] = replace(source, limit=left)
                break
            total += size
        found[key] = source
    if not found:
        raise UserError(f"the corpus {', '.join(data.corpus)} is empty: name a file with text")
    return list(found.values())


def _holds_text(source: Source) -> bool:
    """Tell whether a file has more than a byte order mark."""
    if source.size != len(codecs.BOM_UTF8) or not source.plain:
        return source.size > 0
    return source.path.read_bytes() != codecs.BOM_UTF8


def _named(spec: str, data: DataConfig, downloads: Path, progress: OnProgress | None) -> Iterator[Source]:
    """Yield the files of one entry of data.corpus, in order."""
    path = Path(os.path.expanduser(spec))
    try:
        if spec == STDLIB:
            yield from _stdlib()
        elif spec == STDIN:
            yield _recognized(spool_stdin(downloads, progress, limit=data.max_download_bytes), "", data)
        elif re.match(r"https?://", spec, re.IGNORECASE):
            source = download(spec, downloads, progress, limit=data.max_download_bytes)
            yield _recognized(source, urlsplit(spec).path, data)
        elif spec.startswith("hf:"):
            yield spool_dataset(spec, data, downloads, progress)
        elif path.is_dir():
            yield from _texts(spec, [path], data)
        elif path.is_file():
            yield _recognized(Source(str(path), path, path.stat().st_size), path.name, data)
        elif path.exists():
            raise UserError(f"{path} is not a regular file: it is read several times, so save its text to a file first")
        elif glob.has_magic(spec):
            yield from _texts(spec, [Path(match) for match in glob.glob(str(path), recursive=True)], data)
        else:
            raise UserError(
                f"the corpus {spec} does not exist: no such file or folder, and the working directory is {Path.cwd()}"
            )
    except OSError as error:
        raise UserError(f"cannot read the corpus {spec}: {error.strerror or error}") from None


def _recognized(source: Source, name: str, data: DataConfig, *, searched: bool = False) -> Source | None:
    """Set the source's kind and packing by its content, else by its name. Raises UserError if it is not text.

    searched: the file was found in a folder; the result is None if it is binary.
    """
    form = form_of(source.path, name, data.text_field, data.encoding_errors, shown=source.name, searched=searched)
    return form and replace(source, kind=form.kind, packing=form.packing, field=data.text_field)


def _texts(spec: str, roots: list[Path], data: DataConfig) -> list[Source]:
    """List the files of text, JSON and Parquet at and below roots, by path. Warns how many entries it left out."""
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
    found = (Source(str(path), path, path.stat().st_size) for path in sorted(files) if path.is_file())
    texts = [text for source in found if (text := _recognized(source, source.path.name, data, searched=True))]
    if hidden or len(texts) < len(files):
        log.warning("%s: left out %d hidden and %d binary files", spec, hidden, len(files) - len(texts))
    if not texts:
        raise UserError(f"the corpus {spec} leads to no text file")
    return texts


def _fail(error: OSError) -> None:
    raise error


def _stdlib() -> Iterator[Source]:
    """Yield the running Python's library: .py files by depth, then path, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    level = [root] if root.is_dir() else []
    if not level:
        raise UserError(f"this Python keeps its library elsewhere ({root} is not a folder): give another --corpus")
    while level:
        entries = sorted(entry for folder in level for entry in folder.iterdir())
        for path in entries:
            # _sysconfigdata records how this Python was built: it is not library code.
            if path.suffix == ".py" and path.is_file() and not path.name.startswith("_sysconfigdata"):
                name = f"{STDLIB}/{path.relative_to(root).as_posix()}"
                yield Source(name, path, path.stat().st_size, coding="python")
        level = [path for path in entries if path.is_dir() and not path.is_symlink() and path.name not in _LEFT_OUT]

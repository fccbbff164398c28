"""Token files that other programs made, used as they are: checked once, memory-mapped, never copied.

nanoGPT's .bin is uint16 ids and nothing else. llm.c's and modded-nanogpt's has a header of 256 int32 before them: magic
20240520, version 1, token count, for uint16 ids; magic 20240801, version 7, for uint32 ids (Llama 3's). The files with
"val" in their name validate, the others are trained on; without such a file the tail of the tokens validates. What
lies beside them, such as nanoGPT's meta.pkl, is not looked at: a pickle can run code.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.cache import writing
from gpt.data.config import DataConfig
from gpt.data.downloads import OnProgress
from gpt.data.formats import is_plain, not_text
from gpt.data.readers import OnRead, Source
from gpt.data.tokenizers import Tokenizer
from gpt.data.unpack import packing_of
from gpt.errors import UserError
from gpt.files import path_from_text, path_to_text, write_whole

INDEX = b'{"format": "gpt-token-files", '  # how a file begins that leads to others
HEADER_BYTES = 1024
_KINDS = {20240520: (1, 2), 20240801: (7, 4)}  # magic: version, bytes per token
_CHUNK = 1 << 22  # tokens looked at a time


@dataclass(frozen=True)
class TokenFile:
    """Tokens of a file: `tokens` of them from byte `offset` on. size, mtime_ns: the file's when it was looked at."""

    path: str
    size: int
    mtime_ns: int
    offset: int
    width: int  # bytes per token
    tokens: int

    def open(self) -> np.memmap:
        """The ids (tokens,), mapped read-only. UserError where the file has changed or is gone."""
        try:
            status = os.stat(self.path)
            if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
                raise UserError(f"the token file {self.path} has changed since it was checked: start again")
            return np.memmap(self.path, f"<u{self.width}", "r", self.offset, (self.tokens,))
        except OSError as error:
            raise UserError(f"cannot read the token file {self.path}: {error.strerror or error}") from None


def find_token_files(data: DataConfig) -> list[Path]:
    """The .bin files that data.corpus names, each once; none where it names text.

    They are named as files, by globs that lead to nothing else, or as a folder that holds *train*.bin and *val*.bin.
    Raises UserError where text is named beside them.
    """
    named = {spec: _bins(spec) for spec in data.corpus}
    if not any(named.values()):
        return []
    for spec, files in named.items():
        if not files:
            raise UserError(f"the corpus {spec} is text, and others are token files (.bin): give one or the other")
    if data.max_corpus_bytes is not None:
        raise UserError("max_corpus_bytes counts bytes of text, and token files (.bin) have none: leave it out")
    return list({os.path.realpath(path): path for files in named.values() for path in files}.values())


def _bins(spec: str) -> list[Path]:
    path = Path(os.path.expanduser(spec))
    try:
        if path.is_dir():
            files = sorted(path.glob("*.bin"))
            names = [file.name.lower() for file in files]
            whole = any("train" in name for name in names) and any("val" in name for name in names)
            return [file for file in files if "train" in file.name.lower() or _validates(file)] if whole else []
        if not path.exists() and glob.has_magic(spec):
            files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            return files if files and all(file.suffix == ".bin" and file.is_file() for file in files) else []
        return [path] if path.suffix == ".bin" and path.is_file() else []
    except (OSError, ValueError):  # find_sources says what is wrong with it
        return []


def _validates(path: str | Path) -> bool:
    return "val" in os.path.basename(path).lower()


def look_at(path: Path) -> TokenFile:
    """What a .bin file's header and size promise. UserError where they do not agree."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read the token file {path}: {error.strerror or error}") from None
    found = TokenFile(os.path.abspath(path), status.st_size, status.st_mtime_ns, 0, 2, status.st_size // 2)
    magic, version, tokens = np.frombuffer(header[:12], "<i4").tolist() if len(header) >= 12 else (0, 0, 0)
    if magic in _KINDS:
        known, width = _KINDS[magic]
        if version != known:
            raise UserError(f"{path} is an llm.c token file of version {version}: with magic {magic}, {known} is known")
        if tokens <= 0 or status.st_size != HEADER_BYTES + tokens * width:
            raise UserError(
                f"the token file {path} is damaged: {status.st_size} bytes cannot hold a header of {HEADER_BYTES} and "
                f"its {tokens} tokens of {width} bytes"
            )
        return replace(found, offset=HEADER_BYTES, width=width, tokens=tokens)
    if what := _not_ids(header):
        raise UserError(f"{path} is not a token file of uint16 ids: it holds {what}")
    if status.st_size == 0 or status.st_size % 2:
        raise UserError(
            f"{path} is not a token file: its {status.st_size} bytes are not uint16 ids and have no known header"
        )
    return found


def _not_ids(head: bytes) -> str | None:
    """What a file that begins so holds instead of uint16 ids, where that is known; small files may hold anything."""
    if packing := packing_of(head):
        return f"compressed data (.{packing}): unpack it first"
    known = not_text(head)
    if known and not known[0].startswith(("binary", "a pickle")):  # ids may begin as a pickle does
        return known[0]
    ids = np.frombuffer(head[: len(head) // 8 * 8], "<u2")
    if len(ids) < 64:
        return None
    if known is None and is_plain(head):
        return "text: give it another name, such as .txt"
    for width in (8, 4):  # vocabularies of up to a million
        if ids.reshape(-1, width // 2)[:, 1:].max() < 16 and ids.max() >= 16:
            return f"ids of {width} bytes, it seems: write them as uint16, or with llm.c's header as uint32"
    return None


def hashed(files: list[Path], cache: Path, progress: OnProgress | None = None) -> list[Source]:
    """The files with their sha256: from a record in the cache while a file's size and time of change are the same."""
    sources = [Source(str(path), path, os.path.getsize(path)) for path in files]
    total, done, made = sum(source.size for source in sources), 0, []
    for source in sources:
        name = hashlib.sha256(os.fsencode(os.path.realpath(source.path))).hexdigest()[:32]
        record = cache / "hashes" / f"{name}.json"
        status = os.stat(source.path)
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        try:
            kept = json.loads(record.read_bytes())
            known = str(kept["sha256"]) if kept["state"] == state else ""
        except (OSError, ValueError, KeyError, TypeError):
            known = ""
        source = replace(source, sha256=known) if known else source.hashed()
        if not known:
            with writing(record.parent):
                write_whole(record, json.dumps({"state": state, "sha256": source.sha256}).encode())
        done += source.size
        if progress is not None:
            progress("hashing", done, total)
        made.append(source)
    return made


def write_index(
    folder: Path, files: Iterable[Path], tokenizer: Tokenizer, val_fraction: float, on_read: OnRead | None = None
) -> None:
    """Make train.tokens, val.tokens (which lead to the files) and corpus.json in a folder.

    Every id is checked. Raises UserError for a file of an unknown kind, or of another tokenizer.
    """
    found = [look_at(path) for path in files]
    sides = {
        "train": [file for file in found if not _validates(file.path)],
        "val": [file for file in found if _validates(file.path)],
    }
    if not sides["train"]:
        raise UserError(f"{found[0].path} is to validate, by its name, and there is no token file to train on")
    if not sides["val"]:
        sides = _without_tail(sides["train"], val_fraction)
    counts = {"train_bytes": 0, "val_bytes": 0, "documents": 0}
    for side, parts in sides.items():
        for part in parts:
            uses = count_ids(part, tokenizer, on_read)
            counts[f"{side}_bytes"] += int(uses @ tokenizer.token_bytes)
            if tokenizer.document_token is not None:
                counts["documents"] += int(uses[tokenizer.document_token])
        listed = [asdict(part) | {"path": path_to_text(part.path)} for part in parts]
        index = {"format": "gpt-token-files", "fingerprint": tokenizer.fingerprint, "files": listed}
        (folder / f"{side}.tokens").write_bytes(json.dumps(index).encode())
    counts["documents"] = max(1, counts["documents"])
    (folder / "corpus.json").write_text(json.dumps(counts, indent=0))


def _without_tail(files: list[TokenFile], val_fraction: float) -> dict[str, list[TokenFile]]:
    """The files with the last val_fraction of their tokens on the other side."""
    total = sum(file.tokens for file in files)
    if total < 2:
        raise UserError(f"{files[0].path} is too short to be split: give more tokens")
    left = min(max(int(total * (1 - val_fraction)), 1), total - 1)
    sides: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for file in files:
        head = min(left, file.tokens)
        left -= head
        if head:
            sides["train"].append(replace(file, tokens=head))
        if head < file.tokens:
            sides["val"].append(replace(file, offset=file.offset + head * file.width, tokens=file.tokens - head))
    return sides


def count_ids(file: TokenFile, tokenizer: Tokenizer, on_read: OnRead | None = None) -> np.ndarray:
    """How often each id occurs, (vocab_size,) int64. UserError where one is outside the vocabulary."""
    ids, uses = file.open(), np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK])
        if chunk.max() >= tokenizer.vocab_size:
            at = int(np.argmax(chunk >= tokenizer.vocab_size))
            where = f"at byte {file.offset + file.width * (start + at)}"
            raise UserError(
                f"the token file {file.path} holds the id {int(chunk[at])} {where}, and the tokenizer has "
                f"{tokenizer.vocab_size}: name the one that made it with --tokenizer"
            )
        uses += np.bincount(chunk, minlength=tokenizer.vocab_size)
        if on_read is not None:
            on_read(chunk.nbytes)
    return uses


def read_index(path: Path, tokenizer: Tokenizer) -> "np.memmap | TokenParts":
    """The ids that an index leads to. UserError where it is damaged, or a file is not what it was."""
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
        files = [TokenFile(**file | {"path": path_from_text(file["path"])}) for file in index["files"]]
        fingerprint = index["fingerprint"]
        sound = all(
            f.width in (2, 4) and min(f.offset, f.tokens - 1) >= 0 and f.offset + f.tokens * f.width <= f.size
            for f in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound or not files:
        raise UserError(f"the token file {path} is damaged")
    if fingerprint != tokenizer.fingerprint:
        raise UserError(f"the token file {path} was made by another tokenizer: prepare the text again with this one")
    parts = [file.open() for file in files]
    return parts[0] if len(parts) == 1 else TokenParts(parts)


class TokenParts:
    """Several mapped arrays, one after another, as one of shape (N,) that is never in memory whole.

    What the loader needs of an array: length, slices, numbers, comparison, and numpy's sliding_window_view, whose rows
    are picked by their starts. np.asarray gives a copy of all of it.
    """

    ndim = 1
    __hash__ = None

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        self.size = int(self._ends[-1])
        self.shape = (self.size,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | slice) -> Any:
        if not isinstance(key, slice):
            at = range(self.size)[key]
            return self[at : at + 1][0]
        start, stop, step = key.indices(self.size)
        if step != 1:
            raise IndexError(f"token files are read in steps of 1, not {step}")
        found, first = [], 0
        for part, end in zip(self._parts, self._ends.tolist()):
            if start < end and first < stop:
                found.append(part[max(start - first, 0) : stop - first])
            first = end
        if len(found) == 1:
            return np.asarray(found[0]).astype(self.dtype, copy=False)
        return np.concatenate([np.empty(0, self.dtype), *found]).astype(self.dtype, copy=False)

    def __eq__(self, other: object) -> Any:
        return np.concatenate([part == other for part in self._parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.lib.stride_tricks.sliding_window_view and len(args) == 2 and not kwargs:
            return _Windows(self, args[1])
        return NotImplemented


class _Windows:
    """All windows of `width` tokens, (N - width + 1, width); those at starts (n,) are read when asked for."""

    def __init__(self, tokens: TokenParts, width: int) -> None:
        self._tokens, self._width = tokens, width
        self.shape = (max(0, len(tokens) - width + 1), width)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, starts: np.ndarray) -> np.ndarray:
        rows = np.empty((len(starts), self._width), self._tokens.dtype)
        for row, start in zip(rows, starts.tolist()):
            if not 0 <= start < self.shape[0]:
                raise IndexError(f"window {start} of {self.shape[0]}")
            row[:] = self._tokens[start : start + self._width]
        return rows

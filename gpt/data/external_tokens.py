"""Token files of other programs: checked once, then memory-mapped in place, never copied.

nanoGPT's .bin holds uint16 ids and nothing else. llm.c's and modded-nanogpt's begins with a header of 256 int32: magic
20240520, version 1, token count, for uint16 ids; magic 20240801, version 7, for uint32 ids (Llama 3's). Files with
"val" in their name are for validation, the others for training; without such a file the tail of the tokens is for
validation. No other file in their folder is read, such as nanoGPT's meta.pkl: a pickle can run code.
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

INDEX = b'{"format": "gpt-token-files", '  # the first bytes of an index of token files
HEADER_BYTES = 1024
_KINDS = {20240520: (1, 2), 20240801: (7, 4)}  # magic: version, bytes per token
_CHUNK = 1 << 22  # tokens read at a time


@dataclass(frozen=True)
class TokenFile:
    """`tokens` tokens of a file from byte `offset`. size, mtime_ns: the file's when it was checked."""

    path: str
    size: int
    mtime_ns: int
    offset: int
    width: int  # bytes per token
    tokens: int

    def open(self) -> np.ndarray:
        """Map the ids (tokens,), read-only. UserError if the file has changed or is gone."""
        try:
            status = os.stat(self.path)
            if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
                raise UserError(f"the token file {self.path} has changed since it was checked: start again")
            return np.memmap(self.path, f"<u{self.width}", "r", self.offset, (self.tokens,)).view(np.ndarray)
        except OSError as error:
            raise UserError(f"cannot read the token file {self.path}: {error.strerror or error}") from None


def find_token_files(data: DataConfig) -> list[Path]:
    """List the .bin files that data.corpus names, each once; [] if it names text.

    They are named as files, by a glob that matches nothing else, or as a folder with *train*.bin and *val*.bin.
    Raises UserError if it names both text and token files.
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
    except (OSError, ValueError):  # find_sources reports it
        return []


def _validates(path: str | Path) -> bool:
    return "val" in os.path.basename(path).lower()


def look_at(path: Path) -> TokenFile:
    """Read a .bin file's header and size. UserError if they disagree."""
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
            raise UserError(f"{path} is an llm.c token file of version {version}: magic {magic} needs version {known}")
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
    """Describe a file's content if its head shows that it is not uint16 ids. A small file may hold anything."""
    if packing := packing_of(head):
        return f"compressed data (.{packing}): unpack it first"
    known = not_text(head)
    if known and not known[0].startswith(("binary", "a pickle")):  # ids may look like a pickle
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
    """Hash files, or reuse the hash in the cache while a file's size and modification time are the same."""
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
    """Write train.tokens and val.tokens, which are indexes of the files, and corpus.json into a folder.

    Checks every id. Raises UserError for a file of an unknown kind, or of another tokenizer.
    """
    sides: dict[str, list[TokenFile]] = {"train": [], "val": []}
    for path in files:
        sides["val" if _validates(path) else "train"].append(look_at(path))
    if not sides["train"]:
        raise UserError(f"{sides['val'][0].path} is for validation, by its name: name a token file to train on too")
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
    """Split the files: the last val_fraction of their tokens is for validation."""
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
    """Count each id, (vocab_size,) int64. UserError if one is outside the vocabulary."""
    ids, uses = file.open(), np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK])
        if chunk.max() >= tokenizer.vocab_size:
            at = int(np.argmax(chunk >= tokenizer.vocab_size))
            where = f"at byte {file.offset + file.width * (start + at)}"
            raise UserError(
                f"the token file {file.path} holds the id {int(chunk[at])} {where}, but the tokenizer has "
                f"{tokenizer.vocab_size} tokens: name the one that made the file with --tokenizer"
            )
        uses += np.bincount(chunk, minlength=tokenizer.vocab_size)
        if on_read is not None:
            on_read(chunk.nbytes)
    return uses


def read_index(path: Path, tokenizer: Tokenizer) -> "np.ndarray | TokenParts":
    """Map the ids of the files in an index. UserError if it is damaged, or a file has changed."""
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
    """Several mapped arrays, joined into one of shape (N,) that is never in memory whole.

    Supports what loaders need of an array: length, slices, single ids and comparison. np.asarray copies all of it.
    """

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

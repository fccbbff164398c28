"""Describes token files: python -m gpt.corpus inspect PATH ..."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from gpt.arguments import check_fields
from gpt.command_line import parse_flags
from gpt.data.build_tokenizer import build_tokenizer, encoding_at_hand, learns_from
from gpt.data.config import TokenizerConfig
from gpt.data.external_tokens import look_at
from gpt.data.provenance import tokenized_folders
from gpt.data.token_files import read_tokens
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.errors import EXIT_DONE, UserError, require
from gpt.option import option
from gpt.streams import check_output

_CHUNK = 1 << 22  # tokens read at a time
_COMPARED = 500_000  # tokens at the start whose text other tokenizers encode


@dataclass(frozen=True)
class Arguments:
    """Describe token files: counts, documents, bytes per token, and the start of their text."""

    command: tyro.conf.Positional[str]
    """inspect, the only command."""
    path: tyro.conf.Positional[Path]
    """A run directory, a folder of a tokenized corpus, one token file of it, or another program's .bin."""
    tokenizer: str | None = None
    """The tokenizer of a .bin: gpt2 or another of tiktoken's encodings, or byte. None: show its ids as numbers."""
    sample_tokens: int = option(100, at_least=0, below=1 << 20)
    """Number of tokens at the start to show as text."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.command == "inspect", f"unknown command {self.command!r}: run python -m gpt.corpus inspect PATH")
        require(
            self.tokenizer is None or not learns_from(self.tokenizer),
            f"a {self.tokenizer} tokenizer is learned from text: name another",
        )


def main(argv: list[str]) -> int:
    """Describe the token files of a path. Returns the exit status; raises UserError for any other path."""
    arguments = parse_flags(Arguments, argv, prog="gpt.corpus")
    check_output()
    for line in inspect(arguments.path, arguments.tokenizer, arguments.sample_tokens):
        print(line)
    return EXIT_DONE


def inspect(path: Path, tokenizer: str | None = None, sample_tokens: int = 100) -> Iterator[str]:
    """Yield lines that describe the token files of a path. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} does not exist: the working directory is {Path.cwd()}")
    if path.is_file() and path.suffix == ".bin":
        yield from _external(path, tokenizer, sample_tokens)
        return
    require(
        tokenizer is None,
        f"{path} has its own tokenizer: leave --tokenizer out, which is for the .bin of another program",
    )
    for folder in _tokenized(path) if path.is_dir() else [path.parent]:
        yield from _ours(path, folder, sample_tokens)


def _ours(path: Path, folder: Path, sample_tokens: int) -> Iterator[str]:
    """Describe the token files of a tokenized corpus, or the one at the path."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{path} is not a run, tokenized corpus, token file or .bin: it has no tokenizer.json")
    made = load_tokenizer(folder / "tokenizer.json")
    yield f"{folder}: {_name(made)}"
    files = [path] if path.is_file() else [folder / "train.tokens", folder / "val.tokens"]
    yield from _lines(((file.name, read_tokens(file, made, verify=True)) for file in files), made, sample_tokens)


def _tokenized(path: Path) -> list[Path]:
    """Return the folders of tokenized corpora: the path itself, or those of a run in the cache."""
    if not (path / "config.toml").exists():
        return [path]
    try:
        folders = tokenized_folders(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is a run whose corpus.json cannot be read: {error}") from None
    if lost := next((folder for folder in folders if not folder.is_dir()), None):
        raise UserError(f"the tokenized corpus of {path} is no longer in the cache, {lost}: training makes it again")
    return folders


def _external(path: Path, name: str | None, sample_tokens: int) -> Iterator[str]:
    file = look_at(path)
    kind = "a header of llm.c" if file.offset else "no header, as nanoGPT's"
    if name is None:
        uses = _uses(file.open())
        yield f"{path}: {file.tokens:,} tokens of {file.width} bytes, {kind}"
        yield f"  {np.count_nonzero(uses):,} ids used, the largest {len(uses) - 1}; name its tokenizer with --tokenizer"
        yield f"  begins: {' '.join(map(str, file.open()[:sample_tokens].tolist()))}"
        return
    made = build_tokenizer(TokenizerConfig(name), list)
    yield f"{path}: {kind}, {file.width} bytes per token, read with {_name(made)}"
    yield from _lines([(path.name, file.open())], made, sample_tokens)


def _name(tokenizer: Tokenizer) -> str:
    return f"a {tokenizer.name} tokenizer of {tokenizer.vocab_size:,} tokens"


def _lines(files: Iterable[tuple[str, Any]], tokenizer: Tokenizer, sample_tokens: int) -> Iterator[str]:
    """Describe the ids of files by name, and compare tokenizers on the text of the first one."""
    compared = None
    for name, ids in files:
        uses = _uses(ids)
        if len(uses) > tokenizer.vocab_size:
            raise UserError(
                f"{name} holds the id {len(uses) - 1}, but the tokenizer has {tokenizer.vocab_size}: name another one"
            )
        size = int(uses @ tokenizer.token_bytes[: len(uses)])
        document = tokenizer.document_token
        documents = int(uses[document]) if document is not None and document < len(uses) else 0
        yield (
            f"{name}: {len(ids):,} tokens, {documents:,} document tokens, {size:,} bytes of text, "
            f"{size / len(ids):.3f} bytes per token, {np.count_nonzero(uses):,} ids used"
        )
        text = tokenizer.decode(np.asarray(ids[:sample_tokens]))
        yield from (f"  | {line}" for line in text.splitlines())
        compared = ids if compared is None else compared
    yield bytes_per_token(tokenizer.decode(np.asarray(compared[:_COMPARED])), tokenizer)


def _uses(ids: Any) -> np.ndarray:
    """Count each id up to the largest."""
    uses = np.zeros(1, np.int64)
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK])
        if chunk.max() >= 1 << 24:
            raise UserError(f"the id {int(chunk.max())} is larger than any vocabulary: this is not a token file")
        found = np.bincount(chunk, minlength=len(uses))
        found[: len(uses)] += uses
        uses = found
    return uses


def bytes_per_token(text: str, tokenizer: Tokenizer) -> str:
    """Compare a tokenizer's bytes per token with those of gpt2 and cl100k_base, if tiktoken has cached them."""
    size, shown = len(text.encode()), []
    for name in ("this", "gpt2", "cl100k_base"):
        each = tokenizer if name == "this" else encoding_at_hand(name)
        if each is not None:
            shown.append(f"{name} ({each.vocab_size:,}) {size / max(1, len(each.encode_to_array(text))):.3f}")
        else:
            shown.append(f"{name} is not in tiktoken's cache (TIKTOKEN_CACHE_DIR)")
    return f"bytes per token: {', '.join(shown)}"

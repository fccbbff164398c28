"""The interface of every tokenizer, and a decoder for tokens that arrive one by one."""

import codecs
import hashlib
import json
import operator
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np

from gpt.arguments import checked, shown
from gpt.data.config import TokenizerConfig
from gpt.errors import UserError
from gpt.files import write_whole

DOCUMENT = "<|endoftext|>"  # spelling of the token before each document
FORMAT = "gpt-tokenizer"
VERSION = 1

Texts = Callable[[], Iterable[str]]


class UnknownCharacter(UserError):
    """A character that a character tokenizer lacks. `position`: its index in the text."""

    def __init__(self, character: str, position: int, where: str = "the text") -> None:
        name = unicodedata.name(character, "no name")
        super().__init__(
            f"the tokenizer lacks the character {character!r} (U+{ord(character):04X}, {name}) at position {position} "
            f"of {where}: leave it out, or train with --tokenizer byte or bpe, which take any text"
        )
        self.character, self.position = character, position


class Tokenizer(ABC):
    """The interface of every tokenizer. Ids run from 0 to vocab_size - 1.

    A subclass sets `kind` and whichever of the attributes below differ from their defaults. Training, export and
    benchmarks read these attributes and never ask for a class.

    pieces: the UTF-8 bytes behind each id (a part of a character for some); b"" for special tokens and unused ids.
    specials: spelling and id of each special token.
    """

    kind: str  # its name in tokenizer.json and in --tokenizer
    learns_from: Literal["all", "train", None] = None  # the part of the corpus that `build` reads; None: nothing
    parallel = False  # whether encoding releases the interpreter's lock, so that threads speed it up
    encoding: Any = None  # the tiktoken.Encoding that encodes, if one does
    characters: str | None = None  # the only characters that it can encode, in the order of their ids; None: any text
    tokens: list[bytes | None] | None = None  # of a byte-level BPE, in merge order; None for an id that is not a merge
    pattern: str | None = None  # the regex that splits text before a BPE merges
    normalization: str | None = None  # NFC if text is composed first
    added: Mapping[str, tuple[int, bool]] = MappingProxyType({})  # see BPETokenizer
    unreached: Mapping[int, bytes] = MappingProxyType({})

    name: str  # of a named encoding; else the kind
    vocab_size: int
    document_token: int | None  # the id before each document
    token_bytes: np.ndarray  # (vocab_size,) int64: UTF-8 bytes of each token's text, 0 for special tokens

    def __init__(self, pieces: list[bytes], specials: Mapping[str, int]) -> None:
        self.name, self._pieces = self.kind, pieces
        self.specials = dict(specials)
        self.vocab_size = len(pieces)
        self.document_token = self.specials.get(DOCUMENT)
        self.token_bytes = np.fromiter(map(len, pieces), np.int64, len(pieces))

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def start_token(self) -> int:
        """The token that starts an empty prompt: the document token, else a line break, else the corpus's first."""
        return 0 if self.document_token is None else self.document_token

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the saved file, in hex. Only equal tokenizers share it."""
        return hashlib.sha256(self._serialized).hexdigest()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode a text. The spelling of a special token is plain text unless allow_special.

        Raises UserError for a lone surrogate and for a character that a character tokenizer lacks; TypeError for
        anything but a string.
        """
        if not isinstance(allow_special, bool):
            raise TypeError(f"allow_special must be True or False, not {shown(allow_special)}")
        if not (allow_special and self.specials):
            return self.encode_to_array(text).tolist()
        return self._guarded(text, self._encode_with_specials).tolist()

    def encode_to_array(self, text: str) -> np.ndarray:
        """Encode a text without special tokens into an array of self.dtype: the fast path for corpora."""
        return self._guarded(text, self._encode)

    def _guarded(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        if not isinstance(text, str):
            raise TypeError(f"text must be text, not {shown(text)}")
        try:
            return encode(text)
        except UnicodeEncodeError as error:
            at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), error.start)
            raise UserError(
                f"the text holds the lone surrogate U+{ord(text[at]):04X} at position {at}, "
                "which is not a character: give text that is valid UTF-8"
            ) from None

    def check_table(self, rows: int, model: str) -> None:
        """Raise UserError unless a model's embedding table has a row for each id that text can become or begin with."""
        missing = [i for i in range(rows, self.vocab_size) if self.token_bytes[i] or i == self.document_token]
        if missing:
            raise UserError(
                f"the tokenizer of {model} has the token {missing[0]}, but its embedding table has {rows} rows: "
                "train it further with --init-from, which adds the rows"
            )

    def segments(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut the chunks of one text anew, so that the ids of the segments, joined, are the ids of the whole text."""
        return iter(chunks)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode ids into bytes. ValueError for an id outside the vocabulary, TypeError for anything but ids."""
        ids = _integers(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"ids: {shown(wrong)} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids into text. Invalid UTF-8 becomes U+FFFD; special tokens become nothing."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @checked
    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON: the whole file, or nothing."""
        write_whole(Path(path), self._serialized)

    @property
    def _serialized(self) -> bytes:
        form = {"format": FORMAT, "version": VERSION, "kind": self.kind, **self._form()}
        return (json.dumps(form, ensure_ascii=True, indent=0, sort_keys=True) + "\n").encode()

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Encode a text into an array of self.dtype, without special tokens."""

    def _encode_with_specials(self, text: str) -> np.ndarray:
        parts = spelled(text, self.specials)
        ids = [self._encode(part) if i is None else np.array([i], self.dtype) for part, i in parts]
        return np.concatenate([np.empty(0, self.dtype), *ids])

    @abstractmethod
    def _form(self) -> dict[str, Any]:
        """Return the saved file's content, without format, version and kind."""

    @classmethod
    @abstractmethod
    def from_form(cls, form: dict[str, Any]) -> Self:
        """Build the tokenizer from a saved file's content. ValueError says what is wrong with it."""

    @classmethod
    @abstractmethod
    def build(cls, config: TokenizerConfig, texts: Texts, document_token: bool) -> Self:
        """Build a new tokenizer. texts: returns the text that learns_from names, from its start."""


def _integers(ids: Any) -> list[int]:
    """Convert token ids to a list. TypeError for anything but a list, a tensor or an array of integers."""
    try:
        if isinstance(ids, str | bytes | Mapping):
            raise TypeError
        found = list(ids.tolist() if hasattr(ids, "tolist") else ids)
        if set(map(type, found)) <= {int}:
            return found
        if any(isinstance(i, bool | np.bool_) for i in found):
            raise TypeError
        return list(map(operator.index, found))
    except (TypeError, RuntimeError):  # torch's, for a sparse tensor
        raise TypeError(f"ids must be a list of whole numbers, not {shown(ids)}") from None


class StreamDecoder:
    """Decodes tokens one by one, in whole characters. The results of push and flush, joined, are decode(ids)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the characters that this token completes: "" in the middle of a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Return the rest, U+FFFD for an unfinished character, and reset the decoder."""
        return self._decoder.decode(b"", final=True)


def spelled(text: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Split text at the spellings of tokens, the longest first. Yields parts, each with its token's id or None."""
    if not tokens:
        yield text, None
        return
    spellings = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    for part in re.split(f"({spellings})", text):
        if part:
            yield part, tokens.get(part)

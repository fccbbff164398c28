"""What every tokenizer offers, and text from tokens as they come."""

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
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from gpt.arguments import checked, shown
from gpt.errors import UserError
from gpt.files import write_whole

if TYPE_CHECKING:
    import tiktoken

    from gpt.data.config import TokenizerConfig

DOCUMENT = "<|endoftext|>"  # spelling of the token before each document
FORMAT = "gpt-tokenizer"
VERSION = 1

Texts = Callable[[], Iterable[str]]


class UnknownCharacter(UserError):
    """A character that a character tokenizer lacks; `position` counts characters from 0 in the text given."""

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

    kind: str  # its name in tokenizer.json and, unless it is a named encoding, in --tokenizer
    learns_from: Literal["all", "train", None] = None  # the part of the corpus that `build` reads; None: nothing
    parallel = False  # whether encoding releases the interpreter's lock, so that threads speed it up
    encoding: "tiktoken.Encoding | None" = None  # tiktoken's encoder, if it does the work
    characters: str | None = None  # the characters that it can encode, in the order of their ids; None: any text
    # Of a byte-level BPE: the bytes of each id in merge order, None for any other id; what splits text before merging.
    tokens: list[bytes | None] | None = None
    pattern: str | None = None
    normalization: str | None = None  # NFC if text is composed first
    added: Mapping[str, tuple[int, bool]] = MappingProxyType({})  # plain tokens found before splitting
    unreached: Mapping[int, bytes] = MappingProxyType({})  # ids that no text becomes

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
        """What an empty prompt starts from: the document token; else a line break; else the corpus's first token."""
        return 0 if self.document_token is None else self.document_token

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the saved form, in hex: equal tokenizers, and no others, share it."""
        return hashlib.sha256(self._serialized).hexdigest()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the text. Special tokens' spellings are plain text unless allow_special.

        Raises UserError on a lone surrogate, and on a character that a character tokenizer lacks; TypeError for what
        is not text.
        """
        check_encode(text, allow_special)
        if not (allow_special and self.specials):
            return self.encode_to_array(text).tolist()
        ids: list[int] = []
        for part, i in spelled(text, self.specials):
            ids += self.encode_to_array(part).tolist() if i is None else [i]
        return ids

    def encode_to_array(self, text: str) -> np.ndarray:
        """The same ids, without special tokens, as an array of self.dtype: the fast path for corpora."""
        return self._guarded(text, self._encode)

    def _guarded(self, text: str, encode: Callable[[str], np.ndarray]) -> np.ndarray:
        check_encode(text)
        try:
            return encode(text)
        except UnicodeEncodeError as error:
            at = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), error.start)
            raise UserError(
                f"the text holds the lone surrogate U+{ord(text[at]):04X} at position {at}, "
                "which is not a character: give text that is valid UTF-8"
            ) from None

    def check_table(self, rows: int, model: str) -> None:
        """UserError unless a model's embedding table has a row for each id that a text becomes or begins with."""
        missing = [i for i in range(rows, self.vocab_size) if self.token_bytes[i] or i == self.document_token]
        if missing:
            raise UserError(
                f"the tokenizer of {model} has the token {missing[0]} and its embedding table {rows} rows: "
                "train it on with --init-from, which adds the rows"
            )

    def segments(self, chunks: Iterable[str]) -> Iterator[str]:
        """One text's chunks, cut anew so that the ids of the segments, joined, are the ids of the whole text."""
        return iter(chunks)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind ids; ValueError for an id outside the vocabulary, TypeError for anything but ids."""
        ids = _integers(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"ids: {shown(wrong)} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids. Bytes that form no character become U+FFFD; special tokens become nothing."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @checked
    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON; the file is written whole or not at all."""
        write_whole(Path(path), self._serialized)

    @property
    def _serialized(self) -> bytes:
        form = {"format": FORMAT, "version": VERSION, "kind": self.kind, **self._form()}
        return (json.dumps(form, ensure_ascii=True, indent=0, sort_keys=True) + "\n").encode()

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """The ids of a text that can be encoded."""

    @abstractmethod
    def _form(self) -> dict[str, Any]:
        """The file's content beside format, version and kind."""

    @classmethod
    @abstractmethod
    def from_form(cls, form: dict[str, Any]) -> Self:
        """The tokenizer of a saved file's content; ValueError says what is wrong with it."""

    @classmethod
    @abstractmethod
    def build(cls, config: "TokenizerConfig", texts: Texts, document_token: bool) -> Self:
        """A new tokenizer. texts: returns the text that learns_from names, from its start."""


def check_encode(text: Any, allow_special: Any = False) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be text, not {shown(text)}")
    if not isinstance(allow_special, bool):
        raise TypeError(f"allow_special must be True or False, not {shown(allow_special)}")


def _integers(ids: Any) -> list[int]:
    """Token ids as a list; TypeError for anything but a list, a tensor or an array of integers."""
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
    """Text from tokens as they come, never half a character: what push and flush return joins to decode(ids)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often "" inside a character of several tokens."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character. The decoder is then as new."""
        return self._decoder.decode(b"", final=True)


def spelled(text: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """The text in parts, and the id of each part that is the spelling of one of the tokens; the longest counts."""
    if not tokens:
        yield text, None
        return
    spellings = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    for part in re.split(f"({spellings})", text):
        if part:
            yield part, tokens.get(part)

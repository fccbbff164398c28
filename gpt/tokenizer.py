"""Text to token ids and back: characters, bytes, a BPE trained on the corpus, and tiktoken's named encodings.

Four rules hold for every kind. The spelling of a special token in text stays text unless the caller asks otherwise.
Decoding is total: any ids of the vocabulary give a string. A special token decodes to nothing, so that
len(decode_bytes(ids)) == token_bytes[ids].sum(). A saved tokenizer is one JSON file that needs nothing else.
gpt/build_tokenizer.py makes a new one.

Libraries (tiktoken, tokenizers) are imported where they are used: a character run starts without them.
"""

import base64
import binascii
import codecs
import hashlib
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError
from gpt.files import write_whole

DOCUMENT = "<|endoftext|>"  # spelling of the token that stands before each document
FORMAT = "gpt-tokenizer"
VERSION = 1
MAX_VOCAB = 1 << 24

# Where text may be cut without changing its ids: a letter or digit, then a blank or one of these marks. No pre-split
# pattern that we know (GPT-2, cl100k, o200k, ours) has a piece that runs over such a place or looks across it.
_CUT = re.compile(r"(?<=[^\W_])[ \n.,;:!?。，、；：！？]")
_PROBE = "It's 12 pm,\n\n\t日本 (é) \r\n  x"  # what a pattern must take all of; composed, so that it is its own NFC
_SEGMENT = 100_000  # characters; tiktoken's regex overflows its stack on a run of about a million blanks


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
    """What every kind offers. Ids run from 0 to vocab_size - 1.

    pieces: the UTF-8 bytes behind each id (a part of a character for some); b"" for special tokens and unused ids.
    specials: spelling and id of each special token.
    """

    vocab_size: int
    document_token: int | None  # the id that stands before each document
    token_bytes: np.ndarray  # (vocab_size,) int64: UTF-8 bytes of each token's text, 0 for special tokens

    def __init__(self, pieces: list[bytes], specials: Mapping[str, int]) -> None:
        self._pieces = pieces
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

        Raises UserError on a lone surrogate, and on a character that a character tokenizer lacks.
        """
        if not (allow_special and self.specials):
            return self.encode_to_array(text).tolist()
        spellings = "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True)))
        ids: list[int] = []
        for part in re.split(f"({spellings})", text):
            ids += [self.specials[part]] if part in self.specials else self.encode_to_array(part).tolist()
        return ids

    def encode_to_array(self, text: str) -> np.ndarray:
        """The same ids, without special tokens, as an array of self.dtype: the fast path for corpora."""
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
                "which is no character: give text that is valid UTF-8"
            ) from None

    def segments(self, chunks: Iterable[str]) -> Iterator[str]:
        """One text's chunks, cut anew so that the ids of the segments, joined, are the ids of the whole text."""
        return iter(chunks)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind ids; ValueError for an id outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {wrong} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids. Bytes that form no character become U+FFFD; special tokens become nothing."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON; the file is there whole or not at all."""
        write_whole(Path(path), self._serialized)

    @property
    def _serialized(self) -> bytes:
        form = {"format": FORMAT, "version": VERSION, **self._form()}
        return (json.dumps(form, ensure_ascii=True, indent=0, sort_keys=True) + "\n").encode()

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """The ids of a text that can be encoded."""

    @abstractmethod
    def _form(self) -> dict[str, Any]:
        """What the file says of this kind of tokenizer."""


class CharTokenizer(Tokenizer):
    """One id per character of a sorted alphabet, then the document token if there is one.

    first: the character that the corpus begins with.
    """

    def __init__(self, characters: str, *, document_token: bool = False, first: str = "") -> None:
        self.characters, self.first = characters, first
        pieces = [c.encode() for c in characters]
        super().__init__(
            [*pieces, b""] if document_token else pieces, {DOCUMENT: len(pieces)} if document_token else {}
        )
        codes = code_points(characters)
        self._lookup = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # code point -> id; the last entry: unknown
        self._lookup[codes] = np.arange(len(codes), dtype=np.int32)

    def _encode(self, text: str) -> np.ndarray:
        ids = self._lookup[np.minimum(code_points(text), len(self._lookup) - 1)]
        if len(ids) and ids.min() < 0:
            position = int(np.argmin(ids))
            raise UnknownCharacter(text[position], position)
        return ids.astype(self.dtype)

    @property
    def start_token(self) -> int:
        if self.document_token is not None:
            return self.document_token
        return max(0, self.characters.find("\n" if "\n" in self.characters else self.first))

    def _form(self) -> dict[str, Any]:
        document = self.document_token is not None
        return {"kind": "char", "characters": self.characters, "document_token": document, "first": self.first}


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then the document token."""

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [b""], {DOCUMENT: 256})

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def _form(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BPETokenizer(Tokenizer):
    """Byte-level BPE, encoded by tiktoken.

    tokens: the bytes of each id in merge order, every single byte among them; None for an id that is no such token.
    Text is encoded in segments of at most 100,000 characters, cut where no piece can run over; only text without any
    such place (100,000 characters and no letter followed by a blank or a mark) is cut inside a piece.
    normalization: NFC where the text is composed first (as Qwen's is). document: the document token's spelling.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        tokens: list[bytes | None],
        specials: Mapping[str, int],
        normalization: str | None = None,
        document: str = DOCUMENT,
    ) -> None:
        import tiktoken

        self.name, self.pattern, self.tokens = name, pattern, tokens
        self.normalization, self.document = normalization, document
        pieces = [token or b"" for token in tokens]
        pieces += [b""] * (max(specials.values(), default=-1) + 1 - len(pieces))
        super().__init__(pieces, specials)
        self.document_token = self.specials.get(document)
        ranks = {token: i for i, token in enumerate(tokens) if token is not None}
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials)

    def segments(self, chunks: Iterable[str]) -> Iterator[str]:
        rest = ""
        for chunk in chunks:
            text, start = rest + chunk, 0
            while len(text) - start > _SEGMENT:
                end = _cut(text, start, start + _SEGMENT)
                yield text[start:end]
                start = end
            rest = text[start:]
        if rest:
            yield rest

    def _encode(self, text: str) -> np.ndarray:
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)
        parts = [self._encode_part(part) for part in self.segments([text])]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _encode_part(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken's own, for a pattern that matches no character
                raise
            raise UserError(f"the tokenizer's pattern {self.pattern!r} cannot split text: {error}") from None

    def _form(self) -> dict[str, Any]:
        tokens = [None if token is None else base64.b64encode(token).decode() for token in self.tokens]
        # Only where they say something, so that a tokenizer without them keeps its fingerprint.
        extra = {"normalization": self.normalization} if self.normalization else {}
        extra |= {"document": self.document} if self.document != DOCUMENT else {}
        return extra | {
            "kind": "bpe",
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": self.specials,
            "tokens": tokens,
        }


class StreamDecoder:
    """Text from tokens as they come, never half a character: what push and flush return joins to decode(ids)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes; often "" inside a character of several tokens."""
        return self._decoder.decode(self._tokenizer.decode_bytes([int(token)]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character. The decoder is then as new."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what Tokenizer.save wrote. UserError, naming the file, for anything else."""
    path = Path(path)
    try:
        form = json.loads(path.read_bytes())
        return _from_form(form)
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # JSON, base64, a regex that tiktoken refuses, our own checks
        raise UserError(f"{path} is no tokenizer of this program, or is damaged: {error}") from None


def _from_form(form: Any) -> Tokenizer:
    """The tokenizer in a parsed file; ValueError says what is wrong with it."""
    _check(isinstance(form, dict) and form.get("format") == FORMAT, f'"format" is not "{FORMAT}"')
    _check(form.get("version") == VERSION, f'"version" is {form.get("version")!r}, known is {VERSION}')
    kind = form.get("kind")
    if kind == "char":
        characters, document, first = form.get("characters"), form.get("document_token"), form.get("first", "")
        _check(isinstance(characters, str) and isinstance(document, bool), '"characters" or "document_token" is wrong')
        _check(list(characters) == sorted(set(characters)), '"characters" are not sorted and distinct')
        _check(isinstance(first, str) and first in characters, '"first" is not one of "characters"')
        return CharTokenizer(characters, document_token=document, first=first)
    if kind == "byte":
        return ByteTokenizer()
    _check(kind == "bpe", f'"kind" is {kind!r}, known are char, byte and bpe')
    name, pattern = form.get("name"), form.get("pattern")
    _check(isinstance(name, str) and isinstance(pattern, str), '"name" or "pattern" is no string')
    normalization, document = form.get("normalization"), form.get("document", DOCUMENT)
    _check(normalization in (None, "NFC") and isinstance(document, str), '"normalization" or "document" is wrong')
    specials = form.get("special_tokens")
    tokens = check_tokens(_tokens(form.get("tokens")), specials)
    tokenizer = BPETokenizer(name, pattern, tokens, specials, normalization, document)
    _check(tokenizer.decode(tokenizer.encode(_PROBE)) == _PROBE, '"pattern" leaves text out')
    return tokenizer


def _tokens(entries: Any) -> list[bytes | None]:
    strings = isinstance(entries, list) and all(entry is None or isinstance(entry, str) for entry in entries)
    _check(strings and len(entries) <= MAX_VOCAB, '"tokens" is no list of strings')
    try:
        tokens = [None if entry is None else base64.b64decode(entry, validate=True) for entry in entries]
    except binascii.Error as error:
        raise ValueError(f'"tokens" holds bad base64 ({error})') from None
    return tokens


def check_tokens(tokens: list[bytes | None], specials: Any) -> list[bytes | None]:
    """The tokens; ValueError where they and the special tokens make no vocabulary of a byte-level BPE."""
    given = [token for token in tokens if token is not None]
    _check(len(set(given)) == len(given), '"tokens" holds one twice')
    _check(b"" not in given and {bytes([i]) for i in range(256)} <= set(given), '"tokens" lacks single bytes')
    _check(isinstance(specials, dict) and "" not in specials, '"special_tokens" is no table')
    ids = list(specials.values())
    _check(all(type(i) is int and 0 <= i < MAX_VOCAB for i in ids), '"special_tokens" holds an impossible id')
    free = all(i >= len(tokens) or tokens[i] is None for i in ids)
    _check(free and len(set(ids)) == len(ids), '"special_tokens" holds an id that is taken')
    return tokens


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _cut(text: str, start: int, end: int) -> int:
    """The last place in text[start + 1 : end + 1] where it may be cut, else end."""
    for first in (max(start + 1, end - 1000), start + 1):
        places = [match.start() for match in _CUT.finditer(text, first, end + 1)]
        if places:
            return places[-1]
    return end


def code_points(text: str) -> np.ndarray:
    """Code points of the text's characters, uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)

"""The tokenizers: characters, bytes, and byte-level BPE, trained on the corpus or one of tiktoken's encodings.

Four rules hold for every kind. The spelling of a special token in text stays text unless the caller asks otherwise.
Decoding is total: any ids of the vocabulary decode to a string. A special token decodes to nothing, so that
len(decode_bytes(ids)) == token_bytes[ids].sum(). A saved tokenizer is one JSON file that needs nothing else.

Libraries (tiktoken, tokenizers) are imported where they are used: a character run starts without them.
"""

import base64
import binascii
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from gpt.arguments import checked
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizer_base import (
    DOCUMENT,
    FORMAT,
    VERSION,
    StreamDecoder,
    Texts,
    Tokenizer,
    UnknownCharacter,
    spelled,
)
from gpt.errors import UserError, require
from gpt.stop import aside

__all__ = ["DOCUMENT", "KINDS", "BPETokenizer", "ByteTokenizer", "CharTokenizer", "StreamDecoder", "Tokenizer"]
__all__ += ["UnknownCharacter", "check_tokens", "load_tokenizer"]

log = logging.getLogger(__name__)

MAX_VOCAB = 1 << 24

# Text is cut between a letter or digit and a space or one of these marks. No piece of the patterns of GPT-2, cl100k,
# o200k and ours crosses such a point or looks across it; pieces of other patterns may.
CUT = re.compile(r"(?<=[^\W_])[ \n.,;:!?。，、；：！？]")
_PROBE = "It's 12 pm,\n\n\t日本 (é) \r\n  x"  # a pattern must match all of it; it is its own NFC
_SEGMENT = 100_000  # characters; tiktoken's regex overflows its stack on a run of about a million spaces
_NEAR = 100  # characters on each side of a cut, at least, that are compared with and without it


class CharTokenizer(Tokenizer):
    """One id per character of a sorted alphabet, then the document token if it has one.

    first: the first character of the corpus.
    """

    kind, learns_from = "char", "all"

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
        return {"characters": self.characters, "document_token": document, "first": self.first}

    @classmethod
    def from_form(cls, form: dict[str, Any]) -> Self:
        characters, document, first = form.get("characters"), form.get("document_token"), form.get("first", "")
        require(isinstance(characters, str) and isinstance(document, bool), '"characters" or "document_token" is wrong')
        require(list(characters) == sorted(set(characters)), '"characters" are not sorted and distinct')
        require(isinstance(first, str) and first in characters, '"first" is not one of "characters"')
        return cls(characters, document_token=document, first=first)

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Texts, document_token: bool) -> Self:
        found, first = np.zeros(0x110000, bool), ""
        for text in texts():
            found[code_points(text)] = True
            first = first or text[:1]
        alphabet = "".join(map(chr, np.flatnonzero(found).tolist()))
        return cls(alphabet, document_token=document_token, first=first)


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then the document token."""

    kind = "byte"

    def __init__(self) -> None:
        self.tokens = [bytes([i]) for i in range(256)]
        super().__init__([*self.tokens, b""], {DOCUMENT: 256})

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def _form(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_form(cls, form: dict[str, Any]) -> Self:
        return cls()

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Texts, document_token: bool) -> Self:
        return cls()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, encoded by tiktoken.

    tokens: the bytes of each id in merge order, including every single byte; None for any other id.
    Text is encoded in segments of at most 100,000 characters, cut between a letter and a space or mark where that does
    not change the ids around it; only text without such a point is cut inside a piece.
    normalization: NFC if text is composed first (as Qwen does). document: the document token's spelling.
    added: spellings that always become one id, found before the pattern splits the text, and after normalization if
    the flag is True. unreached: ids that no text becomes, and the bytes that they decode to.
    """

    kind, learns_from, parallel = "bpe", "train", True

    def __init__(
        self,
        name: str,
        pattern: str,
        tokens: list[bytes | None],
        specials: Mapping[str, int],
        normalization: str | None = None,
        document: str = DOCUMENT,
        added: Mapping[str, tuple[int, bool]] | None = None,
        unreached: Mapping[int, bytes] | None = None,
    ) -> None:
        import tiktoken

        self.pattern, self.tokens = pattern, tokens
        self.normalization, self.document = normalization, document
        self.added, self.unreached = dict(added or {}), dict(unreached or {})
        outside = self.unreached | {i: spelling.encode() for spelling, (i, _) in self.added.items()}
        pieces = [token or b"" for token in tokens]
        pieces += [b""] * (max([*specials.values(), *outside], default=-1) + 1 - len(pieces))
        for i, piece in outside.items():
            pieces[i] = piece
        super().__init__(pieces, specials)
        self.name = name
        self.document_token = self.specials.get(document)
        self._near = max(_NEAR, *map(len, self.added), 0)
        ranks = {token: i for i, token in enumerate(tokens) if token is not None}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials)

    def _encode_with_specials(self, text: str) -> np.ndarray:
        return self._encode(text, self.specials)

    def segments(self, chunks: Iterable[str]) -> Iterator[str]:
        rest = ""
        for chunk in chunks:
            text, start = rest + chunk, 0
            while len(text) - start > _SEGMENT + self._near:
                end = self._cut(text, start)
                yield text[start:end]
                start = end
            rest = text[start:]
        while len(rest) > _SEGMENT:
            end = self._cut(rest, 0)
            yield rest[:end]
            rest = rest[end:]
        if rest:
            yield rest

    def _cut(self, text: str, start: int) -> int:
        """Return the last point where a segment that begins at `start` may be cut, else its longest end."""
        end = start + _SEGMENT
        for first in (max(start + 1, end - 1000), start + 1):
            cuts = [match.start() for match in CUT.finditer(text, first, end + 1)]
            for at in cuts[:-_NEAR:-1]:
                if self._may_cut(text[max(start, at - self._near) : at], text[at : at + self._near]):
                    return at
        return end

    def _may_cut(self, left: str, right: str) -> bool:
        try:
            apart = [*self._encode(left, cut=False), *self._encode(right, cut=False)]
            return apart == self._encode(left + right, cut=False).tolist()
        except (UserError, UnicodeEncodeError):  # encoding the segment raises it again
            return True

    def _encode(self, text: str, specials: Mapping[str, int] = MappingProxyType({}), *, cut: bool = True) -> np.ndarray:
        given = dict(specials) | {spelling: i for spelling, (i, late) in self.added.items() if not late}
        late = {spelling: i for spelling, (i, late) in self.added.items() if late}
        parts = [np.empty(0, self.dtype)]
        for whole, found in spelled(text, given):
            if found is not None:
                parts.append(np.array([found], self.dtype))
                continue
            if self.normalization:
                whole = composed(whole)
            for part, i in spelled(whole, late):
                if i is None:
                    parts += [self._encode_part(segment) for segment in (self.segments([part]) if cut else [part])]
                else:
                    parts.append(np.array([i], self.dtype))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def _encode_part(self, text: str) -> np.ndarray:
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # tiktoken panics at a pattern that matches no character
                raise
            raise UserError(f"the tokenizer's pattern {self.pattern!r} cannot split text: {error}") from None
        if self.token_bytes[ids].sum() != (len(text) if text.isascii() else len(text.encode())):
            raise UserError(
                f"the tokenizer's pattern {self.pattern!r} leaves out a part of {text[:60]!r}: it must match all text"
            )
        return ids

    def _form(self) -> dict[str, Any]:
        tokens = [None if token is None else base64.b64encode(token).decode() for token in self.tokens]
        # Fields with their default are left out, so that a tokenizer without them keeps its fingerprint.
        extra = {"normalization": self.normalization} if self.normalization else {}
        extra |= {"document": self.document} if self.document != DOCUMENT else {}
        extra |= {"added": {spelling: list(token) for spelling, token in self.added.items()}} if self.added else {}
        if self.unreached:
            extra["unreached"] = {str(i): base64.b64encode(piece).decode() for i, piece in self.unreached.items()}
        return extra | {"name": self.name, "pattern": self.pattern, "special_tokens": self.specials, "tokens": tokens}

    @classmethod
    def from_form(cls, form: dict[str, Any]) -> Self:
        name, pattern = form.get("name"), form.get("pattern")
        require(isinstance(name, str) and isinstance(pattern, str), '"name" or "pattern" is not a string')
        normalization, document = form.get("normalization"), form.get("document", DOCUMENT)
        require(normalization in (None, "NFC") and isinstance(document, str), '"normalization" or "document" is wrong')
        specials = form.get("special_tokens")
        tokens, added = _tokens(form.get("tokens")), form.get("added", {})
        require(isinstance(added, dict), '"added" is not a table')
        require(all(isinstance(x, list) and len(x) == 2 for x in added.values()), '"added" is not a table of pairs')
        added = {spelling: tuple(value) for spelling, value in added.items()}
        unreached = form.get("unreached", {})
        ids = isinstance(unreached, dict) and all(i.isdecimal() for i in unreached)
        require(ids, '"unreached" is not a table of ids')
        unreached = dict(zip(map(int, unreached), _tokens(list(unreached.values()))))
        check_tokens(tokens, specials, added, unreached)
        tokenizer = cls(name, pattern, tokens, specials, normalization, document, added, unreached)
        require(tokenizer.decode(tokenizer.encode(_PROBE)) == _PROBE, '"pattern" leaves text out')
        return tokenizer

    @classmethod
    def build(cls, config: TokenizerConfig, texts: Texts, document_token: bool) -> Self:
        from gpt.data.bpe import PATTERN, merge_order, train_bpe

        tokens = merge_order(aside(lambda: train_bpe(texts(), config.bpe_vocab_size - 1)))
        size = len(tokens) + 1
        if size < config.bpe_vocab_size:
            log.warning(
                "the text is too small for bpe_vocab_size %d: the vocabulary has %d tokens", config.bpe_vocab_size, size
            )
        return cls("bpe", PATTERN, list(tokens), {DOCUMENT: len(tokens)})


KINDS: dict[str, type[Tokenizer]] = {each.kind: each for each in (CharTokenizer, ByteTokenizer, BPETokenizer)}


@checked
def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer that Tokenizer.save wrote. UserError, naming the file, for any other file."""
    path = Path(path)
    try:
        form = json.loads(path.read_bytes())
        require(isinstance(form, dict) and form.get("format") == FORMAT, f'"format" is not "{FORMAT}"')
        require(form.get("version") == VERSION, f'"version" is {form.get("version")!r}, known is {VERSION}')
        kind, kinds = form.get("kind"), list(KINDS)
        known = f"known are {', '.join(kinds[:-1])} and {kinds[-1]}"
        require(isinstance(kind, str) and kind in KINDS, f'"kind" is {kind!r}, {known}')
        return KINDS[kind].from_form(form)
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # from JSON, base64, tiktoken's regex or require
        raise UserError(f"{path} is not a tokenizer of this program, or is damaged: {error}") from None


def _tokens(entries: Any) -> list[bytes | None]:
    strings = isinstance(entries, list) and all(entry is None or isinstance(entry, str) for entry in entries)
    require(strings and len(entries) <= MAX_VOCAB, '"tokens" is not a list of strings')
    try:
        tokens = [None if entry is None else base64.b64decode(entry, validate=True) for entry in entries]
    except binascii.Error as error:
        raise ValueError(f'"tokens" holds bad base64 ({error})') from None
    return tokens


def check_tokens(
    tokens: list[bytes | None],
    specials: Any,
    added: Mapping[str, tuple[int, bool]] | None = None,
    unreached: Mapping[int, bytes | None] | None = None,
) -> list[bytes | None]:
    """Return the tokens. ValueError unless the arguments, as BPETokenizer takes them, form a byte-level vocabulary."""
    given = [token for token in tokens if token is not None]
    require(len(set(given)) == len(given), '"tokens" holds one twice')
    require(b"" not in given and {bytes([i]) for i in range(256)} <= set(given), '"tokens" lacks single bytes')
    added, unreached = added or {}, unreached or {}
    require(isinstance(specials, dict) and "" not in [*specials, *added], '"special_tokens" is not a table')
    require(all(type(late) is bool for _, late in added.values()), '"added" does not say when they are found')
    require(not {None, b""} & set(unreached.values()), '"unreached" holds a token without bytes')
    require(not set(specials) & set(added), '"special_tokens" and "added" share a spelling')
    ids = [*specials.values(), *(i for i, _ in added.values()), *unreached]
    require(all(type(i) is int and 0 <= i < MAX_VOCAB for i in ids), '"special_tokens" holds an impossible id')
    free = all(i >= len(tokens) or tokens[i] is None for i in ids)
    require(free and len(set(ids)) == len(ids), '"special_tokens" holds an id that is taken')
    return tokens


def composed(text: str) -> str:
    """Convert text to NFC by the tokenizers library's tables, since those of Python change with its version."""
    from tokenizers import normalizers

    return normalizers.NFC().normalize_str(text)


def code_points(text: str) -> np.ndarray:
    """Return the text's code points, (characters,) uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)

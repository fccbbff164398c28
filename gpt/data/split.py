"""A corpus's documents, and which of their text is trained on.

One document is split at its tail. Of several, a seeded hash of each one's bytes decides, so that a document keeps its
side when the corpus grows, and copies of one document are never on both sides. Nothing is kept for each document:
the decision is made as they stream by.
"""

import codecs
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gpt.data.config import DataConfig
from gpt.data.readers import Document, OnRead, Source
from gpt.errors import UserError

Side = Literal["train", "val"]


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def read_documents(sources: list[Source], errors: str, on_read: OnRead | None = None) -> Iterator[Document]:
    """The documents of all sources, in order, as Source.documents gives them."""
    for source in sources:
        yield from source.documents(errors, on_read)


@dataclass(frozen=True)
class Split:
    """Which documents, or which part of the only one, are trained on."""

    seed: int
    threshold: float  # a document whose draw lies below it is held out
    cut: float | None = None  # of the only document so many UTF-8 bytes are trained on
    last: int | None = None  # this document alone is held out: all are copies of one text

    @property
    def several(self) -> bool:
        """Whether there is more than one document."""
        return self.cut is None

    def draw(self, document: Document) -> float:
        """A number in [0, 1) that depends on the seed and the document's bytes alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{document.sha256}".encode()).digest()[:6]) / 2**48

    def side(self, number: int, document: Document) -> Side:
        """Where one of several documents belongs, the corpus's number-th from 0 on."""
        held_out = self.draw(document) < self.threshold if self.last is None else number == self.last
        return "val" if held_out else "train"

    def parts(self, number: int, document: Document) -> Iterator[tuple[Side, str]]:
        """The document's text in chunks, each wholly on one side; the cut moves down to a character's start."""
        if self.cut is None:
            side = self.side(number, document)
            for text in document.chunks:
                yield side, text
            return
        done = 0
        for text in document.chunks:
            size = utf8_bytes(text)
            if done + size <= self.cut:
                yield "train", text
            elif done >= self.cut:
                yield "val", text
            else:
                raw = text.encode()
                at = int(self.cut) - done
                while raw[at] & 0xC0 == 0x80:
                    at -= 1
                head = len(raw[:at].decode())
                head = max(head, done == 0)  # up, where nothing would be left to train on
                yield "train", text[:head]
                yield "val", text[head:]
            done += size


def find_split(sources: list[Source], data: DataConfig) -> Split:
    """The split that data asks for, with some text on both sides if there is more than one character or document.

    Reads documents only until there is one on each side; of a text file its sha256 is enough. Raises UserError where
    there is no document.
    """
    split = Split(data.split_seed, data.val_fraction)
    lowest, highest, count = math.inf, -math.inf, 0
    for document in read_documents(sources, data.encoding_errors):
        count += 1
        draw = split.draw(document)
        lowest, highest = min(lowest, draw), max(highest, draw)
        if lowest < split.threshold <= highest:
            return split
    if count == 0:
        raise UserError(f"the corpus {', '.join(data.corpus)} is empty: it holds no document with text")
    if count == 1:
        total = _text_bytes(sources, data.encoding_errors)
        return Split(data.split_seed, 0.0, cut=min(max(int(total * (1 - data.val_fraction)), 1), total - 1))
    if lowest == highest:
        return Split(data.split_seed, 0.0, last=count - 1)
    return Split(data.split_seed, math.nextafter(lowest, 1) if lowest >= split.threshold else highest)


def _text_bytes(sources: list[Source], errors: str) -> int:
    """UTF-8 bytes of the only document."""
    source = sources[0]
    if len(sources) == 1 and source.plain and source.coding == "utf-8" and errors == "strict" and source.limit is None:
        mark = codecs.BOM_UTF8  # the one thing that is left out; what is not UTF-8 is refused when it is tokenized
        with open(source.path, "rb") as file:
            return source.size - len(mark) * (file.read(len(mark)) == mark)
    return sum(utf8_bytes(text) for document in read_documents(sources, errors) for text in document.chunks)

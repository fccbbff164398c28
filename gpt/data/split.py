"""Splits a corpus's documents into training and validation.

A single document is split at its tail. Of several, a seeded hash of each one's bytes decides, so that a document keeps
its side when the corpus grows, and copies of a document are on one side. Documents are split as they stream by, so that
memory does not grow with their number.
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
    """Yield the documents of all sources, in order, as Source.documents does."""
    for source in sources:
        yield from source.documents(errors, on_read)


@dataclass(frozen=True)
class Split:
    """Decides which documents, or which part of a single one, are for training."""

    seed: int
    threshold: float  # a document whose draw is below it is held out
    cut: float | None = None  # UTF-8 bytes of a single document that are for training
    last: int | None = None  # the only document held out, if all are copies of one text

    @property
    def several(self) -> bool:
        """Whether there is more than one document."""
        return self.cut is None

    def draw(self, document: Document) -> float:
        """Return a number in [0, 1) that depends on the seed and the document's bytes alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{document.sha256}".encode()).digest()[:6]) / 2**48

    def side(self, number: int, document: Document) -> Side:
        """Return the side of one of several documents. number: its index in the corpus."""
        held_out = self.draw(document) < self.threshold if self.last is None else number == self.last
        return "val" if held_out else "train"

    def parts(self, number: int, document: Document) -> Iterator[tuple[Side, str]]:
        """Yield the document's text in chunks, each with its side. The cut moves down to the start of a character."""
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
                head = max(head, done == 0)  # up, if nothing would be left for training
                yield "train", text[:head]
                yield "val", text[head:]
            done += size


def find_split(sources: list[Source], data: DataConfig) -> Split:
    """Make the split that data specifies. Both sides get text if there is more than one character or document.

    Reads documents only until each side has one. Raises UserError for an empty corpus.
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
    """Count the UTF-8 bytes of a single document."""
    source = sources[0]  # a plain file holds a document: this one
    if source.plain and source.coding == "utf-8" and errors == "strict" and source.limit is None:
        mark = codecs.BOM_UTF8  # not part of the text; tokenizing refuses invalid UTF-8
        with open(source.path, "rb") as file:
            return source.size - len(mark) * (file.read(len(mark)) == mark)
    return sum(utf8_bytes(text) for document in read_documents(sources, errors) for text in document.chunks)

"""Sample texts on which two tokenizers are compared: many scripts, spaces, marks, parts of the vocabulary."""

import random
from collections.abc import Iterator

from gpt.data.tokenizers import Tokenizer

_SCRIPTS = [
    "the The THE and of to it's I'LL don't we've x'd 'tis ſ 'S state 2nd 3.14 1234567 0x1F naïve Straße ﬁ ß İ ı K Å",
    "Съешь ещё этих мягких булок, да выпей чаю Ѯ ё",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία ς ΐ",
    "日本語の文章。漢字かなカナ、々〇「」！ 中文，没有空格 한국어 가나다 각",
    "نص عربي مَعَ تَشْكِيل ١٢٣ ، עִבְרִית",
    "हिन्दी में लेख १२३ क्ष ไทยไม่มีช่องว่าง ๑๒ தமிழ்",
    "🙂 👩‍👩‍👧 🇩🇪 👍🏽 ❤️ ∑∫√ ≤≥≠ €£¥ ½ ² Ⅷ ⓐ ─│┌ ← → “quoted” ‘so’ — – …",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": None}  # why?\r\n\tif x != 1_000:",
    "<br/> &amp; \\n $x^2$ //!!?! ___ --- === a@b.org #1 ~/.x [0] (y) {z} %d 100% 1,234.5 12:30",
]
_SPACES = [*" \n\t\r\x0b\x0c\x85\xa0\u1680\u2003\u200b\u200d\u2028\u3000\ufeff"]
_SPACES += ["\r\n", "\n\n", "  ", "   ", " \n ", "\t\t"]
_ODD = [*"\u0301\x00\x1b\x7f\ue000\ufffd\uffff\U0010ffff\u0378", "e\u0301", "\u0308\u0323"]
_COUNT = 120  # texts of each kind


def sample_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield some hundred texts of about 100 characters at most, and special tokens' spellings; always the same ones."""
    draw = random.Random(0)
    if tokenizer.characters is not None:
        for _ in range(_COUNT):
            yield "".join(draw.choices(tokenizer.characters, k=draw.randint(1, 60))) if tokenizer.characters else ""
        return
    words = [word for script in _SCRIPTS for word in script.split()]
    letters = [*{character: None for script in _SCRIPTS for character in script}, *_SPACES, *_ODD]
    yield from _SCRIPTS
    yield from (f"a{odd}b {odd}{odd}c{odd} {odd}1" for odd in [*_SPACES, *_ODD])
    for _ in range(_COUNT):
        yield "".join(draw.choice(words) + draw.choice(_SPACES) for _ in range(draw.randint(1, 12)))
        yield "".join(draw.choices(letters, k=draw.randint(1, 40)))
    pieces = [piece for piece in tokenizer.tokens or [] if piece is not None]
    texts = [piece.decode("utf-8", "ignore") for piece in draw.sample(pieces, min(len(pieces), 8 * _COUNT))]
    for at in range(0, len(texts), 8):
        yield from ("".join(texts[at : at + 8]), " ".join(texts[at : at + 8]), texts[at])
    for spelling in [*tokenizer.specials, *tokenizer.added][: 2 * _COUNT]:
        yield from (spelling, f"a{spelling}b", f" {spelling} {spelling}{spelling}\n", spelling[:-1])
        yield f"{spelling}\u0338"
    yield from (piece.decode("utf-8", "ignore") for piece in [*tokenizer.unreached.values()][:_COUNT])

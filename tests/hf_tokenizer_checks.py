"""Files as Hugging Face's tokenizers have them, and whether ours encodes as that library does."""

import json

import tokenizers

from gpt.data.bpe import byte_characters, train_bpe
from gpt.interop.hf_tokenizer import read_hf_tokenizer
from tests.tokenizer_checks import LINES, TEXT

BYTES = {character: i for i, character in enumerate(byte_characters())}
NFC = {"type": "NFC"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def file_of(vocab=None, merges=(), added=(), **model) -> dict:
    """A tokenizer.json with GPT-2's pattern: the 256 bytes, more tokens, merges written "a b", added tokens."""
    model = {"type": "BPE", "vocab": BYTES | (vocab or {}), "merges": list(merges)} | model
    return {"version": "1.0", "added_tokens": list(added), "pre_tokenizer": BYTE_LEVEL, "model": model}


def added(spelling: str, i: int, **flags) -> dict:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": i, "content": spelling} | off | flags


def read(folder, content, **settings):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return read_hf_tokenizer(folder)


def library(content) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    return theirs


def agree(ours, content, texts=(TEXT[:2000], LINES, "the then", "")) -> None:
    theirs = library(content)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def trained() -> dict:
    content = json.loads(train_bpe([TEXT], 600).to_str())
    content["pre_tokenizer"] = BYTE_LEVEL
    content["model"]["merges"] = [list(pair) for pair in content["model"]["merges"]]
    return content


TRAINED = trained()


def split(pattern, behavior="Isolated", invert=False):
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
        BYTE_LEVEL | {"use_regex": False},
    ]
    return lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})

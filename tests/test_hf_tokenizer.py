"""A tokenizer.json is encoded as the tokenizers library encodes it, or refused with the reason."""

import copy
import json
import random

import pytest

from gpt.data import tokenizers as tokenizer
from gpt.data.tokenizers import BPETokenizer, load_tokenizer
from gpt.errors import UserError
from gpt.interop import hf_tokenizer
from gpt.interop.hf_tokenizer import read_hf_tokenizer, to_tokenizer_json, write_hf_tokenizer
from tests.hf_tokenizer_checks import BYTE_LEVEL, BYTES, NFC, TRAINED, added, agree, file_of, read, split
from tests.tokenizer_checks import BPE, TEXT

# --- merges -----------------------------------------------------------------------------------------------------------


def random_file(draw: random.Random) -> dict:
    """Tokens over two letters and a space, with merges that make them in any way, or in none."""
    texts = {"".join(draw.choices("ab", k=draw.randint(2, 5))) for _ in range(draw.randint(1, 9))}
    order = sorted(texts, key=len) if draw.random() < 0.7 else list(texts)
    vocab = {text: 256 + i for i, text in enumerate(order)}
    merges = []
    for text in order:
        known = [
            f"{text[:i]} {text[i:]}" for i in range(1, len(text)) if {text[:i], text[i:]} <= (BYTES | vocab).keys()
        ]
        most = len(known) if draw.random() < 0.5 else draw.randint(0, len(known))
        merges += draw.sample(known, most)
    if draw.random() < 0.1:
        draw.shuffle(merges)
    if merges and draw.random() < 0.1:
        merges.append(draw.choice(merges))
    return file_of(vocab, merges, ignore_merges=draw.random() < 0.5)


def test_random_merges_are_encoded_as_the_library_does_or_refused(tmp_path, monkeypatch):
    """The check of the merges alone, without the sample of text, lets nothing through that differs."""
    monkeypatch.setattr(hf_tokenizer, "sample_texts", lambda tokenizer: [])
    draw, taken, spare = random.Random(3), 0, 0
    for _ in range(400):
        content = random_file(draw)
        try:
            ours = read(tmp_path, content)
        except UserError:
            continue
        taken += len(ours.tokens) > 256
        spare += bool(ours.unreached)
        agree(ours, content, ["".join(draw.choices("aabb ", k=draw.randint(1, 14))) for _ in range(40)])
        agree(ours, content, list(content["model"]["vocab"])[256:])
    assert 60 < taken and 60 < spare


def test_sample_texts_alone_find_missing_merges(tmp_path, monkeypatch):
    """And whatever the check of the merges might miss, the sample of text may see."""
    monkeypatch.setattr(hf_tokenizer, "unreached", lambda *_: set())
    content = to_tokenizer_json(BPE)
    content["model"] |= {"ignore_merges": False, "merges": content["model"]["merges"][:-40]}
    with pytest.raises(UserError, match=r"it encodes .* as .*, but this program as"):
        read(tmp_path, content)


def test_no_text_becomes_a_token_without_a_merge(tmp_path):
    content = file_of({"the": 256, "th": 257}, ["t h"])
    ours = read(tmp_path, content)
    assert ours.encode("the") == [257, BYTES["e"]] and ours.decode([256]) == "the" and ours.token_bytes[256] == 3
    agree(ours, content)
    ours.save(tmp_path / "ours.json")
    assert load_tokenizer(tmp_path / "ours.json").encode("the the") == ours.encode("the the")
    assert load_tokenizer(tmp_path / "ours.json").decode([256]) == "the"
    write_hf_tokenizer(ours, tmp_path, seq_len=8)
    again = read_hf_tokenizer(tmp_path)
    assert again.encode(TEXT[:500]) == ours.encode(TEXT[:500]) and again.unreached == ours.unreached


def test_ignore_merges_makes_a_whole_piece_a_token(tmp_path):
    content = file_of({"the": 256}, ignore_merges=True)
    ours = read(tmp_path, content)
    assert ours.encode("the then") == [256, *(BYTES[c] for c in "Ġthen")]
    agree(ours, content)


def drop(content, at):
    del content["model"]["merges"][at]


def swap(content):
    merges = content["model"]["merges"]
    merges[100], merges[200] = merges[200], merges[100]


def vocab(content, **tokens):
    content["model"]["vocab"] |= tokens


REFUSED = {
    "a merge missing, whole pieces first": (
        lambda c: (drop(c, -1), c["model"].update(ignore_merges=True)),
        "it lacks the merge .* which makes its token",
    ),
    "order": (swap, "not in the order of its ids: .* comes too late"),
    "no such part": (lambda c: c["model"]["merges"].append(["Ġzzz", "a"]), "joins or makes a token that"),
    "no such whole": (lambda c: c["model"]["merges"].append(["z", "q"]), "joins or makes a token that"),
    "one word as a merge": (lambda c: c["model"]["merges"].append("zq"), "its merge 'zq' is not two tokens"),
    "three words as a merge": (lambda c: c["model"]["merges"].append("z q x"), "'z q x' is not two tokens"),
    "an id twice": (lambda c: vocab(c, zqzq=300), "'zqzq' has the id 300, which another token has too"),
    "a huge id": (lambda c: vocab(c, zqzq=1 << 30), "has the id 1073741824"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
    "prefix": (lambda c: c["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "dropout 0.1"),
    "byte_fallback": (lambda c: c["model"].update(byte_fallback=True), "only byte-level BPE"),
    "truncation": (
        lambda c: c.update(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
        "truncates text",
    ),
    "padding": (lambda c: c.update(padding={"strategy": {"Fixed": 9}}), "pads text"),
    "normalizer": (lambda c: c.update(normalizer={"type": "NFKC"}), "the normalizer NFKC"),
    "two normalizers": (
        lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
        "the normalizer Lowercase",
    ),
    "prefix space": (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "puts a space before"),
    "decoder": (lambda c: c.update(decoder={"type": "Metaspace"}), "the decoder Metaspace"),
    "lstrip": (lambda c: c["added_tokens"].append(added("<m>", 600, lstrip=True)), "'<m>' has lstrip"),
    "rstrip": (lambda c: c["added_tokens"].append(added("<m>", 600, rstrip=True, special=True)), "'<m>' has rstrip"),
    "single_word": (lambda c: c["added_tokens"].append(added("<m>", 600, single_word=True)), "'<m>' has single_word"),
    "an added token's id": (lambda c: c["added_tokens"].append(added("<m>", 700)), "has the id 700, but 600 in use"),
    "an added token twice": (lambda c: c["added_tokens"].extend([added("<m>", 600)] * 2), "adds a token twice"),
    "merges make a special": (
        lambda c: c["added_tokens"].append(added(token_at(c, 400), 400, special=True)),
        "makes the added token",
    ),
}


def token_at(content, i):
    return next(text for text, at in content["model"]["vocab"].items() if at == i)


REFUSED |= {
    f"behavior {behavior}": (split(r"\s+|\S+", behavior), "splits text in a way")
    for behavior in ("Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
}
REFUSED |= {
    "invert": (split(r"\s+|\S+", invert=True), "splits text in a way"),
    "a pattern that leaves text out": (split(r"\p{L}+|\s+"), "leaves out a part of"),
    "words": (split(r"\w+|\W+"), "its pattern is not supported"),
    "starts of lines": (split(r"^x|[\s\S]"), "its pattern is not supported"),
    "modes": (split(r"(?m)x.|[\s\S]"), "its pattern is not supported"),
    "no regex": (lambda c: c.update(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}), "has no pattern to split text"),
    "digits": (
        lambda c: c.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": False}],
            }
        ),
        "splits text in a way",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_change_ids_are_refused(tmp_path, case):
    change, message = REFUSED[case]
    content = copy.deepcopy(TRAINED)
    change(content)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, content)
    assert "tokenizer.json" in str(caught.value)


TAKEN = {
    "as it is": lambda c: None,
    "merges as strings": lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]]),
    "a merge twice": lambda c: c["model"]["merges"].insert(50, c["model"]["merges"][50]),
    "empty affixes": lambda c: c["model"].update(end_of_word_suffix="", continuing_subword_prefix="", dropout=None),
    "an unknown token that never comes": lambda c: c["model"].update(unk_token="!", fuse_unk=True),
    "whole pieces first": lambda c: c["model"].update(ignore_merges=True),
    "offsets": lambda c: c["pre_tokenizer"].update(trim_offsets=False),
    "padding to the longest": lambda c: c.update(
        padding={
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }
    ),
    "NFC in a sequence": lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
    "no normalizers": lambda c: c.update(normalizer={"type": "Sequence", "normalizers": []}),
    "a first token": lambda c: c.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
        }
    ),
    "the last merge missing": lambda c: drop(c, -1),
    "a merge missing that others need": lambda c: drop(c, 0),
    "a token of three parts, whole pieces first": lambda c: (vocab(c, zqz=600), c["model"].update(ignore_merges=True)),
    "a pattern": split(r"\p{N}|\s+|[^\s\p{N}]+"),
    "pieces of several words": split(r"\p{L}+(?: \p{L}+)*|[\s\S]"),
    "what tiktoken calls a pattern": split(r"\s+|\S+", "Removed", invert=True),
    "a line of version": lambda c: c["model"].update(
        merges=["#version: 0.2", *(" ".join(pair) for pair in c["model"]["merges"])]
    ),
    "NFC twice": lambda c: c.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Sequence", "normalizers": [NFC]}]}
    ),
    "sequences of one": lambda c: c.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}]},
        decoder={"type": "Sequence", "decoders": [BYTE_LEVEL]},
    ),
    "an added token of words": lambda c: c["added_tokens"].append(added("to be", 600)),
}


@pytest.mark.parametrize("case", TAKEN)
def test_harmless_settings_are_accepted(tmp_path, case):
    content = copy.deepcopy(TRAINED)
    TAKEN[case](content)
    agree(read(tmp_path, content), content)


def test_bytes_in_another_order_and_no_pattern(tmp_path):
    """Where no token has two bytes, any pattern splits alike; with longer tokens it would not."""
    content = file_of()
    content["model"]["vocab"] = {character: 255 - i for character, i in BYTES.items()}
    content["pre_tokenizer"] = BYTE_LEVEL | {"use_regex": False}
    ours = read(tmp_path, content)
    assert ours.encode("é a") == [255 - byte for byte in "é a".encode()]
    agree(ours, content)
    content["model"]["vocab"]["th"] = 256
    content["model"]["merges"] = ["t h"]
    with pytest.raises(UserError, match="it has no pattern to split text"):
        read(tmp_path, content)


# --- patterns and normalizers -----------------------------------------------------------------------------------------


def test_a_pattern_that_leaves_text_out_is_refused_at_the_text():
    """tiktoken passes over what its pattern does not match."""
    ours = BPETokenizer("x", r"\p{L}+|\s+", BPE.tokens, {})
    assert ours.decode(ours.encode("only words")) == "only words"
    with pytest.raises(UserError, match=r"leaves out a part of 'a 1'"):
        ours.encode("a 1")


def test_characters_with_a_normalizer_are_refused(tmp_path):
    from gpt.data.tokenizers import CharTokenizer

    content = to_tokenizer_json(CharTokenizer("ABab"))
    agree(read(tmp_path, content), content, ["abAB"])
    with pytest.raises(UserError, match="the normalizer Lowercase"):
        read(tmp_path, content | {"normalizer": {"type": "Lowercase"}})


def test_text_is_composed_as_the_library_composes_it(tmp_path):
    """Whose tables know fewer marks than Python's."""
    content = copy.deepcopy(TRAINED) | {"normalizer": NFC}
    ours = read(tmp_path, content)
    agree(ours, content, ["e\u0898\u0301", "e\u1ac1\u0323\u0301", "a\u08d3\u0325 e\u0301", "\u1112\u1161\u11ab"])
    assert ours.encode("e\u0301") == ours.encode("é")


# --- long text --------------------------------------------------------------------------------------------------------


def test_long_text_is_not_cut_where_that_changes_ids(tmp_path, monkeypatch):
    """Numbers with commas, words in lines, and added tokens are pieces that run over a letter with a mark after it."""
    new = [added("to be", 260), added("x" * 150 + " y", 261)]
    content = file_of({"1,": 256, "7,": 257, "aĊ": 258, "bĊ": 259}, ["1 ,", "7 ,", "a Ċ", "b Ċ"], new)
    split(r"\p{N}+(?:,\p{N}+)*|\p{L}+(?:\n\p{L}+)*|[\s\S]")(content)
    ours = read(tmp_path, content)
    draw = random.Random(0)
    parts = ["1,2", "7,1,7", "a\nb\na", "b\n1", "to be", " not to be ", ". ", "x" * 150 + " y"]
    for longest in (170, 200, 400):
        monkeypatch.setattr(tokenizer, "_SEGMENT", longest)
        for _ in range(40):
            text = " ".join(draw.choices(parts, weights=[9, 9, 9, 9, 9, 9, 9, 1], k=100))
            agree(ours, content, [text])
            assert [i for segment in ours.segments([text]) for i in ours.encode(segment)] == ours.encode(text)


@pytest.mark.parametrize("damage", ["name", "id"])
def test_characters_with_other_special_tokens_are_refused(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    write_hf_tokenizer(tokenizer.CharTokenizer("abc", document_token=True), tmp_path, seq_len=8)
    content = json.loads(path.read_text())
    (special,) = content["added_tokens"]
    vocab = content["model"]["vocab"]
    if damage == "name":
        vocab["<end>"] = vocab.pop(special["content"])
        special["content"] = "<end>"
    else:
        vocab[special["content"]] = special["id"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="its special tokens are not those of a character tokenizer"):
        read_hf_tokenizer(tmp_path)

"""Tokens that a tokenizer.json or its configuration adds to the model's own, and that a saved tokenizer keeps."""

import copy
import json
import re

import pytest
import tokenizers

from gpt.data.tokenizers import DOCUMENT, load_tokenizer
from gpt.errors import UserError
from gpt.interop.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer
from tests.hf_tokenizer_checks import TRAINED, added, agree, read
from tests.tokenizer_checks import BPE, TEXT

TOKENS = [added("<think>", 600), added("  ", 601), added("<t", 602), added(DOCUMENT, 603, special=True)]
SPELT = [
    "a<think>b",
    "<think><t <thin k>",
    "a  b   c    d",
    f"<t{DOCUMENT}<think>",
    "<think>\u0338 e\u0301<t",
    "<t\u0338",
]


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}], ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_added_tokens_that_are_not_special_are_found_in_any_text(tmp_path, normalizer, late):
    content = copy.deepcopy(TRAINED) | {"normalizer": normalizer, "added_tokens": copy.deepcopy(TOKENS)}
    content["added_tokens"][0]["normalized"] = late
    ours = read(tmp_path, content)
    agree(ours, content, [*SPELT, TEXT[:500]])
    assert ours.encode("<think>") == ([602, *ours.encode("hink>")] if late else [600])  # the shorter one comes first
    assert ours.decode([600, 601, 603]) == "<think>  " and ours.token_bytes[600:].tolist() == [7, 2, 2, 0]
    assert DOCUMENT in ours.decode(ours.encode(DOCUMENT))  # which is text
    assert ours.encode(f"<t{DOCUMENT}<t", allow_special=True) == [602, 603, 602]
    if normalizer is None or not late:
        whole = tokenizers.Tokenizer.from_str(json.dumps(content))
        assert [ours.encode(t, allow_special=True) for t in SPELT] == [whole.encode(t).ids for t in SPELT]
    ours.save(tmp_path / "ours.json")
    write_hf_tokenizer(ours, tmp_path, seq_len=8)
    for again in (load_tokenizer(tmp_path / "ours.json"), read_hf_tokenizer(tmp_path)):
        assert [again.encode(text) for text in SPELT] == [ours.encode(text) for text in SPELT]
        assert again.vocab_size == ours.vocab_size == 604
        assert (again.token_bytes == ours.token_bytes).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_prefix_space": True}, "puts a space before the text"),
        ({"added_tokens_decoder": {"600": {"content": "<x>"}}}, "adds the token '<x>' with id 600"),
        ({"added_tokens_decoder": {"5": {"content": DOCUMENT}}}, "with id 5, but it does not"),
        *(
            ({"added_tokens_decoder": {"600": {"content": DOCUMENT, flag: True}}}, f"{DOCUMENT!r} has {flag}")
            for flag in ("lstrip", "rstrip", "single_word")
        ),
    ],
    ids=str,
)
def test_changes_by_the_tokenizer_config_are_refused(tmp_path, settings, message):
    content = copy.deepcopy(TRAINED) | {"added_tokens": [added(DOCUMENT, 600, special=True)]}
    with pytest.raises(UserError, match=re.escape(message)):
        read(tmp_path, content, **settings)
    same = {"600": {"content": DOCUMENT}}
    assert read(tmp_path, content, add_prefix_space=False, added_tokens_decoder=same).document_token == 600


def test_the_configuration_makes_tokens_special(tmp_path):
    content = copy.deepcopy(TRAINED) | {"added_tokens": [added("<x>", 600)]}
    flags = {"content": "<x>", "special": True, "lstrip": False}
    ours = read(tmp_path, content, added_tokens_decoder={"600": flags})
    assert ours.specials == {"<x>": 600} and 600 not in ours.encode("a<x>")


def test_the_older_file_of_added_tokens_is_read(tmp_path):
    """transformers adds what it names, unless tokenizer_config.json names them."""
    content = copy.deepcopy(TRAINED) | {"added_tokens": [added("<x>", 600)]}
    (tmp_path / "added_tokens.json").write_text('{"<x>": 600, "<y>": 601}')
    with pytest.raises(UserError, match="its configuration adds the token '<y>' with id 601"):
        read(tmp_path, content)
    agree(read(tmp_path, content, added_tokens_decoder={"600": {"content": "<x>"}}), content, ["<x><y>"])
    (tmp_path / "added_tokens.json").write_text('{"<x>": 600}')
    agree(read(tmp_path, content), content, ["<x><y>"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"added": {"<x>": [300, False]}}, "holds an id that is taken"),
        ({"added": {"<x>": [900, 1]}}, '"added" does not say when'),
        ({"added": {"<x>": 900}}, '"added" is not a table of pairs'),
        ({"added": {"<x>": [900, False, True]}}, '"added" is not a table of pairs'),
        ({"added": []}, '"added" is not a table$'),
        ({"added": {"": [900, False]}}, '"special_tokens" is not a table'),
        ({"added": {DOCUMENT: [900, False]}}, '"special_tokens" and "added" share a spelling'),
        ({"added": {"<x>": [900, False], "<y>": [900, True]}}, "holds an id that is taken"),
        ({"added": {"<x>": [1 << 24, False]}}, "holds an impossible id"),
        ({"unreached": {"300": "eg=="}}, "holds an id that is taken"),
        ({"unreached": {"x": "eg=="}}, '"unreached" is not a table of ids'),
        ({"unreached": {"900": None}}, '"unreached" holds a token without bytes'),
        ({"unreached": {"900": ""}}, '"unreached" holds a token without bytes'),
        ({"unreached": []}, '"unreached" is not a table of ids'),
    ],
    ids=str,
)
def test_a_saved_tokenizer_with_wrong_tokens_is_refused(tmp_path, edit, message):
    BPE.save(tmp_path / "tokenizer.json")
    form = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(form | edit))
    with pytest.raises(UserError, match=f"is not a tokenizer of this program.*{message}"):
        load_tokenizer(tmp_path / "tokenizer.json")

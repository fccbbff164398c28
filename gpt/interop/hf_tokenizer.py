"""Tokenizers as others keep them: Hugging Face's tokenizer.json and tiktoken's rank files, both ways.

A tokenizer.json that we write gives the ids that ours gives, on any text. There, other than here, the spelling of a
special token in the text is the special token, unless transformers is called with split_special_tokens=True.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gpt.data.bpe import byte_characters
from gpt.data.tokenizers import (
    DOCUMENT,
    MAX_VOCAB,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    check_tokens,
    composed,
)
from gpt.errors import UserError
from gpt.interop.hf_merges import UNUSED, byte_tokens, check_order, unreached
from gpt.interop.hf_pattern import EACH_CHARACTER, GPT2_PATTERN, for_oniguruma, unlike
from gpt.interop.sample_texts import sample_texts


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


# Out.


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives this tokenizer's ids. UserError if the format cannot express it."""
    if tokenizer.characters is not None:
        vocab: dict[str, int] = {c: i for i, c in enumerate(tokenizer.characters)} | tokenizer.specials
        # With no unknown token, a character that is not in the vocabulary is refused there as well.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        split, decoder = _split(EACH_CHARACTER), {"type": "Fuse"}
    elif tokenizer.tokens is not None:
        model, decoder = _byte_level_model(tokenizer), _byte_level()
        split = _byte_level()
        if tokenizer.pattern is not None:
            if (pattern := for_oniguruma(tokenizer.pattern)) is None:
                raise UserError(f"the tokenizer's pattern cannot be said in tokenizer.json: {tokenizer.pattern}")
            split = {"type": "Sequence", "pretokenizers": [_split(pattern), _byte_level()]}
    else:
        raise UserError(
            f"tokenizer.json cannot express a {tokenizer.name} tokenizer: only characters and byte-level BPE"
        )
    form = tokenizer.normalization
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": spelling,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": late,
                "special": special,
            }
            for spelling, i, late, special in sorted(_added(tokenizer), key=lambda token: token[1])
        ],
        "normalizer": {"type": form} if form else None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _added(tokenizer: Tokenizer) -> Iterator[tuple[str, int, bool, bool]]:
    """Spelling, id, whether it is found in normalized text, and whether it is special, of each added token."""
    yield from ((spelling, i, False, True) for spelling, i in tokenizer.specials.items())
    yield from ((spelling, i, late, False) for spelling, (i, late) in tokenizer.added.items())


def _byte_level_model(tokenizer: Tokenizer) -> dict[str, Any]:
    """A BPE whose merges are every way to put a token together, in the order of ids: tiktoken's rule."""
    tokens, spelling = tokenizer.tokens, byte_characters()
    texts = [
        UNUSED.format(i) if token is None else "".join(spelling[b] for b in token) for i, token in enumerate(tokens)
    ]
    ids = {text: i for i, text in enumerate(texts) if tokens[i] is not None}
    merges = []
    for text in ids:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += [list(pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    vocab = ids | {spelling: i for spelling, i, _, _ in _added(tokenizer)}
    vocab |= {"".join(spelling[b] for b in token): i for i, token in tokenizer.unreached.items()}
    # With no id left out, len() there is vocab_size here.
    vocab |= {UNUSED.format(i): i for i in set(range(tokenizer.vocab_size)) - set(vocab.values())}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # A whole piece that is a token is that token; but not one that text never becomes.
        "ignore_merges": tokenizer.pattern is not None and not tokenizer.unreached,
        "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
        "merges": merges,
    }


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, seq_len: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, for AutoTokenizer.

    Raises UserError where a special token's spelling, as plain text, would be the special token there.
    """
    import tokenizers

    text = json.dumps(to_tokenizer_json(tokenizer), ensure_ascii=False)
    theirs = tokenizers.Tokenizer.from_str(text)
    theirs.encode_special_tokens = True
    for spelling in tokenizer.specials if tokenizer.characters is None else ():
        if theirs.encode(spelling).ids != tokenizer.encode(spelling):
            raise UserError(f"the special token {spelling!r} cannot be told from text in tokenizer.json")
    try:
        _compare(tokenizer, theirs)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be said in tokenizer.json: {error}") from None
    document = next((s for s, i in tokenizer.specials.items() if i == tokenizer.document_token), None)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if document is not None:
        settings |= {"bos_token": document, "eos_token": document}
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_tiktoken(tokenizer: Tokenizer, path: Path) -> None:
    """tiktoken's rank file: a line of base64 and id for each token. Pattern and special tokens are not in it.

    Raises UserError for a tokenizer that is not a byte-level BPE.
    """
    if tokenizer.tokens is None:
        raise UserError(
            f"a {tokenizer.name} tokenizer has no ranks: only byte and BPE tokenizers go into tiktoken's format"
        )
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokenizer.tokens) if token is not None]
    path.write_bytes(b"".join(lines))


# In.


def read_tiktoken(path: Path, pattern: str, specials: Mapping[str, int], name: str = "tiktoken") -> BPETokenizer:
    """The tokenizer of a tiktoken rank file, with the pattern and the special tokens that belong to it.

    Raises UserError, naming the file, for any other file.
    """
    try:
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in pairs}
        if len(ranks) != len(pairs) or min(ranks) < 0 or max(ranks) >= MAX_VOCAB:
            raise ValueError(f"an id is repeated, negative, or not below {MAX_VOCAB}")
        tokens = check_tokens([ranks.get(i) for i in range(max(ranks) + 1)], dict(specials))
        return BPETokenizer(name, pattern, tokens, specials)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path} is not a rank file of tiktoken: {error}") from None


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint's tokenizer.json (and of tokenizer_config.json, for which token ends a document).

    Byte-level BPE is read, with GPT-2's or a pattern of its own, and what write_hf_tokenizer wrote. Special tokens are
    so here too; other added tokens are found in any text. Raises UserError, naming the file, for whatever would give
    text other ids here than there: each token, and a sample of text, are compared.
    """
    path = folder / "tokenizer.json"
    content = read_json(path)
    config, legacy = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = read_json(config) if config.exists() else {}
    if "added_tokens_decoder" not in settings and legacy.exists():
        settings["added_tokens_decoder"] = {i: {"content": spelling} for spelling, i in read_json(legacy).items()}
    try:
        return _from_tokenizer_json(content, settings, path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None


def _library(text: str) -> Any:
    """The tokenizers library's tokenizer of the same file; special tokens in a text are text to it."""
    import tokenizers

    try:
        theirs = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library's own, of no class of its own
        raise ValueError(f"the tokenizers library refuses it ({error})") from None
    theirs.encode_special_tokens = True
    return theirs


def _from_tokenizer_json(content: dict[str, Any], settings: dict[str, Any], text: str) -> Tokenizer:
    model, given = content["model"], content.get("added_tokens") or []
    added = _with_settings(given, settings)
    if added != given:
        content = content | {"added_tokens": added}
        text = json.dumps(content)
    library = cache(lambda: _library(text))  # asked for once what it would refuse has been named better
    form = _check_settings(content, settings)
    specials = {entry["content"]: entry["id"] for entry in added if entry.get("special")}
    plain = {e["content"]: (e["id"], bool(e.get("normalized"))) for e in added if not e.get("special")}
    if model.get("type") == "WordLevel":
        ours: Tokenizer = _characters(content, specials | {spelling: i for spelling, (i, _) in plain.items()})
    else:
        ours = _byte_level_bpe(content, settings, specials, plain, form, library)
    theirs = library()
    for spelling, i, _, _ in _added(ours):
        if theirs.token_to_id(spelling) != i:
            raise ValueError(f"its added token {spelling!r} has the id {i}, but {theirs.token_to_id(spelling)} in use")
    _compare(ours, theirs)
    return ours


def _compare(ours: Tokenizer, theirs: Any) -> None:
    """ValueError where the tokenizers library's tokenizer gives a sample of text other ids than ours."""
    for text in sample_texts(ours):
        ids = ours.encode(text)
        found = theirs.encode(text, add_special_tokens=False).ids
        if found != ids:
            raise ValueError(f"it encodes {text!r} as {found[:20]}, and this program would as {ids[:20]}")


def _check_settings(content: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The normalization, NFC or none; ValueError for whatever else changes ids and is not supported."""
    model, forms = content["model"], [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if other := next((form for form in forms if form != "NFC"), None):
        raise ValueError(f"it has the normalizer {other}, and only NFC is supported")
    form = forms[0] if forms else None
    if content.get("truncation"):
        raise ValueError('it cuts text short ("truncation"): set that to null')
    padding = content.get("padding")
    if padding and (padding.get("strategy") != "BatchLongest" or padding.get("pad_to_multiple_of")):
        raise ValueError('it fills text up ("padding"): set that to null')
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its model has {key} {model[key]!r}, which is not supported")
    decoders = [step["type"] for step in _steps(content.get("decoder"), "decoders")]
    if other := next((decoder for decoder in decoders if decoder not in ("ByteLevel", "Fuse")), None):
        raise ValueError(f"it has the decoder {other}, and only ByteLevel is supported")
    if settings.get("add_prefix_space"):
        raise ValueError("tokenizer_config.json puts a space before the text (add_prefix_space)")
    added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    if len(added) < len(content.get("added_tokens") or []):
        raise ValueError("it adds a token twice")
    for spelling, entry in added.items():
        for key in ("lstrip", "rstrip", "single_word"):
            if entry.get(key):
                raise ValueError(f"its added token {spelling!r} has {key}, which is not supported")
        if form and entry.get("normalized") and (entry.get("special") or composed(spelling) != spelling):
            raise ValueError(f"its added token {spelling!r} is found in normalized text, which is not supported")
    return form


def _steps(step: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, in order; nested sequences are flattened."""
    if not step:
        return
    if step["type"] != "Sequence":
        yield step
    else:
        for part in step[name]:
            yield from _steps(part, name)


def _with_settings(added: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens with the flags that the files beside tokenizer.json set; ValueError where they add more."""
    ids = {entry["content"]: entry["id"] for entry in added}
    flags: dict[str, dict[str, Any]] = {}
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        spelling = entry["content"]
        if ids.get(spelling) != int(i):
            raise ValueError(f"its configuration adds the token {spelling!r} with id {i}, and it does not")
        flags[spelling] = {key: value for key, value in entry.items() if value or key == "normalized"}
    return [entry | flags.get(entry["content"], {}) for entry in added]


def _byte_level_bpe(
    content: dict[str, Any],
    settings: dict[str, Any],
    specials: dict[str, int],
    added: dict[str, tuple[int, bool]],
    form: str | None,
    library: Callable[[], Any],
) -> Tokenizer:
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"its model is {model.get('type')}, and only byte-level BPE is supported")
    pattern = _pattern(content.get("pre_tokenizer") or {})
    others = set(specials) | set(added)
    tokens = byte_tokens(model["vocab"], others)
    check_tokens(tokens, specials, added)
    check_order(model["merges"], model["vocab"], others)
    never = unreached(model, others, library().model)
    learned = sum(token is not None for token in tokens) > 256
    in_order = tokens == [bytes([i]) for i in range(256)]
    if in_order and pattern is None and specials == {DOCUMENT: 256} and not added:
        return ByteTokenizer()
    if pattern is None and not learned:
        pattern = EACH_CHARACTER
    if pattern is None:
        raise ValueError("it splits text by no pattern, and its tokens run over any")
    outside = {model["vocab"][text]: tokens[model["vocab"][text]] for text in never}
    tokens = [None if i in outside else token for i, token in enumerate(tokens)]
    document = _document(specials, settings)
    return BPETokenizer("hf", pattern, tokens, specials, form, document, added, outside)


def _characters(content: dict[str, Any], specials: dict[str, int]) -> CharTokenizer:
    vocab = {text: i for text, i in content["model"]["vocab"].items() if text not in specials or len(text) == 1}
    characters = "".join(sorted(vocab, key=vocab.__getitem__))
    if content.get("pre_tokenizer") != _split(EACH_CHARACTER) or list(characters) != sorted(vocab):
        raise ValueError("its model is WordLevel, and only one of single characters in their order is supported")
    ours = CharTokenizer(characters, document_token=bool(specials))
    if specials != ours.specials or list(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its special tokens are not a character tokenizer's")
    return ours


def _pattern(step: dict[str, Any]) -> str | None:
    """The pre-tokenizer's pattern; None where it is ByteLevel alone, without one."""
    steps = list(_steps(step, "pretokenizers"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(steps) > 2:
        raise ValueError("it is not byte-level, or puts a space before the text")
    pattern = GPT2_PATTERN if last.get("use_regex", True) else None
    if len(steps) == 2:
        split = steps[0]
        regex = (split.get("pattern") or {}).get("Regex")
        # tiktoken's way is the second of these: what the pattern does not match is left out.
        known = (split.get("behavior"), bool(split.get("invert"))) in (("Isolated", False), ("Removed", True))
        if not known or regex is None or pattern is not None:
            raise ValueError("it splits text in a way that is not supported")
        if part := unlike(regex):
            raise ValueError(f"its pattern is not supported from {part!r} on: {regex}")
        pattern = regex
    return pattern


def _document(specials: dict[str, int], settings: dict[str, Any]) -> str:
    """The token between documents: <|endoftext|>, else the checkpoint's first or last token."""
    names = [settings.get(key) for key in ("bos_token", "eos_token")]
    names = [name["content"] if isinstance(name, dict) else name for name in names]
    return next((name for name in (DOCUMENT, *names) if name in specials), DOCUMENT)

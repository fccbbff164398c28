"""Reads and writes tokenizers of other programs: Hugging Face's tokenizer.json and tiktoken's rank files.

An exported tokenizer.json gives our ids on any text, with one difference: there, the spelling of a special token in
text becomes that token, unless transformers is called with split_special_tokens=True.
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

_OFF = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)  # flags of added tokens that ours lack


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. UserError, naming the file, for any other content."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


# Out.


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json with this tokenizer's ids. UserError if the format cannot express it."""
    if tokenizer.characters is not None:
        vocab: dict[str, int] = {c: i for i, c in enumerate(tokenizer.characters)} | tokenizer.specials
        # The vocabulary lacks <unk>, so that an unknown character is refused there too.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        split, decoder = _split(EACH_CHARACTER), {"type": "Fuse"}
    elif tokenizer.tokens is not None:
        model, decoder = _byte_level_model(tokenizer), _byte_level()
        split = _byte_level()
        if tokenizer.pattern is not None:
            if (pattern := for_oniguruma(tokenizer.pattern)) is None:
                raise UserError(f"tokenizer.json cannot express the tokenizer's pattern: {tokenizer.pattern}")
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
            {"id": i, "content": spelling, **_OFF, "normalized": late, "special": special}
            for spelling, i, late, special in sorted(_added(tokenizer), key=lambda token: token[1])
        ],
        "normalizer": {"type": form} if form else None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _added(tokenizer: Tokenizer) -> Iterator[tuple[str, int, bool, bool]]:
    """Yield each added token: spelling, id, whether it is found after normalization, whether it is special."""
    yield from ((spelling, i, False, True) for spelling, i in tokenizer.specials.items())
    yield from ((spelling, i, late, False) for spelling, (i, late) in tokenizer.added.items())


def _byte_level_model(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a BPE with every merge that can make a token, in the order of ids, which is tiktoken's rule."""
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
    # Without gaps between ids, len() there equals vocab_size here.
    vocab |= {UNUSED.format(i): i for i in set(range(tokenizer.vocab_size)) - set(vocab.values())}
    return {
        "type": "BPE",
        **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
        **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
        # True makes any piece in the vocabulary one token, even an unreached one.
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

    Raises UserError if tokenizer.json cannot express the tokenizer.
    """
    text = json.dumps(to_tokenizer_json(tokenizer), ensure_ascii=False)
    try:
        theirs = _library(text)
        for spelling in tokenizer.specials if tokenizer.characters is None else ():
            if theirs.encode(spelling).ids != tokenizer.encode(spelling):
                raise ValueError(f"it cannot distinguish the special token {spelling!r} from its spelling in text")
        _compare(tokenizer, theirs)
    except ValueError as error:
        raise UserError(f"tokenizer.json cannot express the tokenizer: {error}") from None
    document = next((s for s, i in tokenizer.specials.items() if i == tokenizer.document_token), None)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    settings["clean_up_tokenization_spaces"] = False
    if document is not None:
        settings |= {"bos_token": document, "eos_token": document}
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_tiktoken(tokenizer: Tokenizer, path: Path) -> None:
    """Write tiktoken's rank file: a line of base64 and id per token, without pattern and special tokens.

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
    """Read a tiktoken rank file. The caller provides the pattern and special tokens that belong to it.

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
    """Read a checkpoint's tokenizer.json, and tokenizer_config.json for the token that ends a document.

    Reads byte-level BPE with GPT-2's or another pattern, and exports of write_hf_tokenizer. Added tokens that are not
    special are found in any text. Raises UserError, naming the file, if text would get other ids here: compares each
    token, and sample texts.
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
    """Load a file with the tokenizers library, so that special tokens' spellings stay text."""
    import tokenizers

    try:
        theirs = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(f"the tokenizers library refuses it ({error})") from None
    theirs.encode_special_tokens = True
    return theirs


def _from_tokenizer_json(content: dict[str, Any], settings: dict[str, Any], text: str) -> Tokenizer:
    model, given = content["model"], content.get("added_tokens") or []
    added = _with_settings(given, settings)
    if added != given:
        content = content | {"added_tokens": added}
        text = json.dumps(content)
    library = cache(lambda: _library(text))  # loaded after our own checks, whose messages are better
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
    """Raise ValueError if the tokenizers library's tokenizer encodes a sample text differently."""
    for text in sample_texts(ours):
        ids = ours.encode(text)
        found = theirs.encode(text, add_special_tokens=False).ids
        if found != ids:
            raise ValueError(f"it encodes {text!r} as {found[:20]}, but this program as {ids[:20]}")


def _check_settings(content: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Return the normalization, NFC or None. ValueError for any other setting that changes ids."""
    model, forms = content["model"], [step["type"] for step in _steps(content.get("normalizer"), "normalizers")]
    if other := next((form for form in forms if form != "NFC"), None):
        raise ValueError(f"it has the normalizer {other}, but only NFC is supported")
    form = forms[0] if forms else None
    if content.get("truncation"):
        raise ValueError('it truncates text: set "truncation" to null')
    padding = content.get("padding")
    if padding and (padding.get("strategy") != "BatchLongest" or padding.get("pad_to_multiple_of")):
        raise ValueError('it pads text: set "padding" to null')
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"its model has {key} {model[key]!r}, which is not supported")
    decoders = [step["type"] for step in _steps(content.get("decoder"), "decoders")]
    if other := next((decoder for decoder in decoders if decoder not in ("ByteLevel", "Fuse")), None):
        raise ValueError(f"it has the decoder {other}, but only ByteLevel is supported")
    if settings.get("add_prefix_space"):
        raise ValueError("tokenizer_config.json puts a space before the text (add_prefix_space)")
    added = {entry["content"]: entry for entry in content.get("added_tokens") or []}
    if len(added) < len(content.get("added_tokens") or []):
        raise ValueError("it adds a token twice")
    for spelling, entry in added.items():
        if flag := next(filter(entry.get, _OFF), None):
            raise ValueError(f"its added token {spelling!r} has {flag}, which is not supported")
        if form and entry.get("normalized") and (entry.get("special") or composed(spelling) != spelling):
            raise ValueError(f"its added token {spelling!r} is found in normalized text, which is not supported")
    return form


def _steps(step: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, pre-tokenizer or decoder, in order. Flattens nested sequences."""
    if not step:
        return
    if step["type"] != "Sequence":
        yield step
    else:
        for part in step[name]:
            yield from _steps(part, name)


def _with_settings(added: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Update the added tokens with the flags of the files beside tokenizer.json. ValueError if those add tokens."""
    ids = {entry["content"]: entry["id"] for entry in added}
    flags: dict[str, dict[str, Any]] = {}
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        spelling = entry["content"]
        if ids.get(spelling) != int(i):
            raise ValueError(f"its configuration adds the token {spelling!r} with id {i}, but it does not")
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
        raise ValueError(f"its model is {model.get('type')}, but only byte-level BPE is supported")
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
        raise ValueError("it has no pattern to split text, but tokens of several bytes")
    outside = {model["vocab"][text]: tokens[model["vocab"][text]] for text in never}
    tokens = [None if i in outside else token for i, token in enumerate(tokens)]
    document = _document(specials, settings)
    return BPETokenizer("hf", pattern, tokens, specials, form, document, added, outside)


def _characters(content: dict[str, Any], specials: dict[str, int]) -> CharTokenizer:
    vocab = {text: i for text, i in content["model"]["vocab"].items() if text not in specials or len(text) == 1}
    characters = "".join(sorted(vocab, key=vocab.__getitem__))
    if content.get("pre_tokenizer") != _split(EACH_CHARACTER) or list(characters) != sorted(vocab):
        raise ValueError("its model is WordLevel, but only single characters in their order are supported")
    ours = CharTokenizer(characters, document_token=bool(specials))
    if specials != ours.specials or list(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its special tokens are not those of a character tokenizer")
    return ours


def _pattern(step: dict[str, Any]) -> str | None:
    """Return the pre-tokenizer's pattern; None if it is ByteLevel without a pattern."""
    steps = list(_steps(step, "pretokenizers"))
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(steps) > 2:
        raise ValueError("it is not byte-level, or puts a space before the text")
    pattern = GPT2_PATTERN if last.get("use_regex", True) else None
    if len(steps) == 2:
        split = steps[0]
        regex = (split.get("pattern") or {}).get("Regex")
        # The second is tiktoken's way: text that the pattern does not match is left out.
        known = (split.get("behavior"), bool(split.get("invert"))) in (("Isolated", False), ("Removed", True))
        if not known or regex is None or pattern is not None:
            raise ValueError("it splits text in a way that is not supported")
        if part := unlike(regex):
            raise ValueError(f"its pattern is not supported from {part!r} on: {regex}")
        pattern = regex
    return pattern


def _document(specials: dict[str, int], settings: dict[str, Any]) -> str:
    """Return the token between documents: <|endoftext|>, else the checkpoint's bos or eos token."""
    names = [settings.get(key) for key in ("bos_token", "eos_token")]
    names = [name["content"] if isinstance(name, dict) else name for name in names]
    return next((name for name in (DOCUMENT, *names) if name in specials), DOCUMENT)

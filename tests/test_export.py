"""What is exported loads in transformers with equal logits and equal ids, and loads back here."""

import base64
import json
import shutil
from dataclasses import replace

import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import given
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import gpt
from gpt.config import PRESETS, ModelConfig
from gpt.data.tokenizers import DOCUMENT, BPETokenizer, CharTokenizer, load_tokenizer
from gpt.errors import UserError, run_command
from gpt.interop import export as export_module
from gpt.interop.export import CLASSES, FITS, Arguments, export, family_of, main
from gpt.interop.hf_tokenizer import (
    read_hf_tokenizer,
    read_tiktoken,
    to_tokenizer_json,
    write_hf_tokenizer,
    write_tiktoken,
)
from gpt.interop.hf_weights import fits_nanochat
from gpt.model import GPT
from tests.tokenizer_checks import BPE, BYTE, CHAR, LINES, PATTERNS, TEXT, anything, calm, nasty

SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 32, "seq_len": 24, "vocab_size": 257}
OLD = {"bias": False, "qk_norm": False, "position": "learned", "norm": "layernorm"}
CASES = {
    "gpt2": ("gpt2", PRESETS["gpt2"]),
    "gpt2-without-biases": ("gpt2", {**OLD, "activation": "relu2", "mlp_dim": 40}),
    "gpt2-exact-gelu": ("gpt2", {**PRESETS["gpt2"], "activation": "gelu", "tied_embeddings": False}),
    "llama": ("llama", {"qk_norm": False, "n_kv_head": 2, "rope_theta": 500.0, "vocab_size": 320}),
    "llama-bias": ("llama", {"qk_norm": False, "bias": True, "tied_embeddings": True}),
    "llama-relu2": ("llama", {"qk_norm": False, "activation": "relu2", "bias": True}),
    "mistral": ("mistral", {"qk_norm": False, "window": 5, "head_dim": 12}),
    "qwen3": ("qwen3", {"n_kv_head": 2, "head_dim": 12, "norm_eps": 1e-5}),
    "qwen3-window-pattern": ("qwen3", {"window": 3, "window_pattern": "LSS", "n_layer": 4}),
    "qwen3-window-relu2": ("qwen3", {"window": 5, "activation": "relu2"}),
    "nanochat": ("nanochat", {"activation": "relu2", "n_kv_head": 2}),
    "nanochat-softcap": ("nanochat", {"activation": "relu2", "logit_softcap": 2.0}),
}


def make_model(family: str = "", **options) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SMALL, **options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
            elif family != "nanochat":
                weight.normal_(std=0.3).add_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


def random_tokens() -> torch.Tensor:
    return torch.randint(257, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal_in_transformers_and_after_reading_back(tmp_path, case):
    family, options = CASES[case]
    model = make_model(family, **options)
    assert export(model, BYTE, tmp_path) == family
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == CLASSES[family]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model(random_tokens())
    assert expected.std() > 0.5
    torch.testing.assert_close(theirs.eval()(random_tokens()).logits, expected, atol=1e-4, rtol=1e-5)
    again = gpt.from_hf(tmp_path, device="cpu")
    torch.testing.assert_close(again(random_tokens()), expected, atol=1e-4, rtol=1e-5)
    if family == "nanochat":
        theirs.save_pretrained(tmp_path / "theirs")
        export(gpt.from_hf(tmp_path / "theirs", device="cpu"), BYTE, tmp_path / "twice")
        twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
        torch.testing.assert_close(twice(random_tokens()).logits, expected, atol=1e-4, rtol=1e-5)


def test_greedy_text_is_the_same(tmp_path):
    model = make_model(**CASES["qwen3"][1])
    export(model, BYTE, tmp_path)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("To be", return_tensors="pt")
    out = theirs.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=256)
    sampling = gpt.SamplingConfig(max_new_tokens=12, temperature=0)
    ours = [piece.token for piece in gpt.generate(model, BYTE, ["To be"], sampling)][:-1]
    assert out[0, 5:].tolist() == ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype(tmp_path, dtype):
    model = make_model()
    export(model, BYTE, tmp_path, dtype=str(dtype).removeprefix("torch."))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in theirs.parameters()} == {dtype}
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))
    torch.testing.assert_close(theirs.float()(random_tokens()).logits, model(random_tokens()), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "alibi"}, "nearest lack: .*qwen3: position alibi .not rotary"),
        ({"position": "none", "norm_order": "post"}, "position none .not rotary.; norm_order post .not pre"),
        ({"activation": "gelu"}, "activation gelu .not swiglu or relu2"),
        ({"bias": True}, "llama: qk_norm True .not False|qwen3: bias True .not False"),
        ({**PRESETS["gpt2"], "n_kv_head": 2}, "gpt2: n_kv_head 2 .not n_head"),
        ({**PRESETS["gpt2"], "window": 5}, "gpt2: window 5 .not None"),
        ({"value_embeds": 1}, "qwen3: value_embeds 1 .not 0"),
        ({"window": 5, "window_pattern": "SL", "qk_norm": False}, "mistral: window_pattern SL .not None"),
        ({**PRESETS["gpt2"], "head_dim": 16}, "gpt2: head_dim 16"),
    ],
    ids=str,
)
def test_options_of_no_family_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export(make_model(**options), BYTE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_learned_norms_do_not_go_into_nanochat(tmp_path):
    with pytest.raises(UserError, match="norms with weights other than 1"):
        export(make_model(activation="relu2", logit_softcap=2.0), BYTE, tmp_path / "out")


def test_an_export_makes_its_folder_and_ends_text_with_the_document_token(tmp_path):
    export(make_model(), BYTE, tmp_path / "new/folder")
    ends = json.loads((tmp_path / "new/folder/generation_config.json").read_text())
    assert ends == {"bos_token_id": 256, "eos_token_id": 256}


@torch.no_grad()
def test_what_fits_nanochat_has_norms_of_one_and_embeddings_within_the_sphere():
    """After the norm that nanochat has behind its table, no row is longer than sqrt(width)."""
    model = make_model("nanochat", activation="relu2", logit_softcap=2.0)
    model.embed.weight.fill_(1.0)
    assert fits_nanochat(model) == []
    model.embed.weight[3] *= 1.001
    assert fits_nanochat(model) == ["embeddings whose root mean square is above 1"]
    model.norm.weight[0] = 1.5
    assert len(fits_nanochat(model)) == 2


# Tokenizers.


def with_pattern(pattern: str) -> BPETokenizer:
    return BPETokenizer("x", pattern, BPE.tokens, BPE.specials)


SPARSE = BPETokenizer("sparse", PATTERNS["gpt2"], [*BPE.tokens, None, None, b"zqzq"], {DOCUMENT: 600, "<|end|>": 605})
COMPOSED = BPETokenizer("nfc", PATTERNS["cl100k"], BPE.tokens, BPE.specials, "NFC")
TOKENIZERS = {"byte": BYTE, "bpe": BPE, "sparse": SPARSE, "nfc": COMPOSED}
TOKENIZERS |= {name: with_pattern(pattern) for name, pattern in PATTERNS.items()}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> ours, theirs as transformers loads it, ours read back."""
    found = {}
    for name, ours in (TOKENIZERS | {"char": CHAR}).items():
        folder = tmp_path_factory.mktemp(name)
        write_hf_tokenizer(ours, folder, seq_len=24)
        found[name] = ours, AutoTokenizer.from_pretrained(folder), read_hf_tokenizer(folder)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_equal_on_any_text(pairs, name):
    ours, theirs, again = pairs[name]

    @calm
    @given(anything | nasty)
    def check(text):
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert again.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)

    for text in (TEXT, LINES, "", "zqzq zqzq", DOCUMENT, "a<|end|>b", "<unused 601>"):
        check.hypothesis.inner_test(text)
    check()


def test_characters(pairs):
    ours, theirs, again = pairs["char"]
    for text in (TEXT, "", DOCUMENT):
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text) == again.encode(text)
    assert theirs.decode(ours.encode(TEXT)) == TEXT
    with pytest.raises(Exception, match="UNK"):
        theirs("Ω")
    assert again.vocab_size == ours.vocab_size and again.document_token == ours.document_token


def test_special_tokens(pairs):
    for name, (ours, theirs, again) in pairs.items():
        assert theirs(f"a{DOCUMENT}b")["input_ids"] == ours.encode(f"a{DOCUMENT}b", allow_special=True), name
        assert theirs.eos_token_id == theirs.bos_token_id == ours.document_token == again.document_token
        assert len(theirs) == ours.vocab_size
        assert again.specials == ours.specials and (again.token_bytes == ours.token_bytes).all()


def test_reading_back_gives_the_same_kind(pairs, tmp_path):
    for name, (ours, _, again) in pairs.items():
        assert type(again) is type(ours), name
        again.save(tmp_path / "tokenizer.json")
        assert load_tokenizer(tmp_path / "tokenizer.json").encode(LINES) == ours.encode(LINES)


def test_nfc_survives_saving(tmp_path):
    COMPOSED.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode("e\u0301") == BPE.encode("é") != BPE.encode("e\u0301")
    assert loaded.fingerprint == COMPOSED.fingerprint != with_pattern(PATTERNS["cl100k"]).fingerprint


def test_gpt2_as_other_programs_write_it(tmp_path):
    """ByteLevel with its own pattern, merges of strings, the document token among the tokens, another name for it."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|start|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([TEXT], trainer)
    theirs = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|start|>")
    theirs.save_pretrained(tmp_path)
    ours = gpt.tokenizer_from_hf(tmp_path)
    assert ours.document_token == theirs.bos_token_id == 0
    assert ours.vocab_size == len(theirs)

    @calm
    @given(anything | nasty)
    def check(text):
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]

    check.hypothesis.inner_test(TEXT)
    check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda c: c["model"].update(byte_fallback=True), "only byte-level BPE"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "not byte-level"),
        (lambda c: c.update(pre_tokenizer=None), "not byte-level"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "splits text in a way"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="a$"), "pattern is not supported"),
        (lambda c: c["model"]["merges"].reverse(), "not in the order of its ids"),
        (lambda c: c["model"]["vocab"].pop("A"), "lacks single bytes|damaged"),
        (lambda c: c["model"]["vocab"].update({"日": 5000}), "'日' is not byte-level"),
        (lambda c: c.pop("model"), "damaged: KeyError"),
    ],
    ids=range(11),
)
def test_tokenizers_that_do_not_fit_are_refused(tmp_path, change, message):
    content = to_tokenizer_json(BPE)
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_hf_tokenizer(tmp_path)


def test_a_special_token_that_is_a_word_is_refused(tmp_path):
    """As one piece of text it would be the token, whatever is asked for."""
    with pytest.raises(UserError, match="cannot distinguish the special token 'pad'"):
        write_hf_tokenizer(BPETokenizer("x", BPE.pattern, BPE.tokens, {"pad": 600}), tmp_path, seq_len=24)


def test_tiktoken_ranks(tmp_path):
    path = tmp_path / "ranks.tiktoken"
    for ours in (BPE, SPARSE, BYTE):
        write_tiktoken(ours, path)
        pattern = ours.pattern or r"[\s\S]"
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
        theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=ours.specials)
        again = read_tiktoken(path, pattern, ours.specials)
        assert theirs.encode_ordinary(TEXT) == ours.encode(TEXT) == again.encode(TEXT)
        assert again.specials == ours.specials
    for damage in (b"Zm9v", b"Zm9v x\n", b"!!!! 5\n", b"Zm9v 5\n", b"", b"Zm9v 5\nZg== 5\n"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="is not a rank file"):
            read_tiktoken(path, BPE.pattern, {})
    with pytest.raises(UserError, match="cannot read"):
        read_tiktoken(tmp_path / "none", BPE.pattern, {})
    with pytest.raises(UserError, match="a char tokenizer has no ranks"):
        write_tiktoken(CharTokenizer("ab"), path)


# The command.


def status_of(*words) -> int:
    from gpt.command_line import parse_flags

    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(parse_flags(Arguments, list(map(str, words)), prog="gpt.export")))
    return stop.value.code


def test_command(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert status_of(tiny_run, out, "--dtype", "bfloat16") == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names | {"ranks.tiktoken"}
    assert AutoTokenizer.from_pretrained(out)("jack")["input_ids"] == list(b"jack")

    assert status_of(tiny_run, out) == 2
    assert "is not empty" in capsys.readouterr().err
    (out / "model.safetensors").write_text("from before")
    assert status_of(tiny_run, out, "--overwrite") == 0
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert status_of(tiny_run, tiny_run, "--overwrite") == 2
    assert "holds a run" in capsys.readouterr().err
    assert status_of(tiny_run, tiny_run / "config.toml") == 2
    assert status_of(tmp_path / "none", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


def test_overwrite_spares_other_files(tiny_run, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(tiny_run, runs / "mine")
    assert status_of(runs / "mine", runs, "--overwrite") == 2
    (runs / "config.json").write_text("{}")
    assert status_of(runs / "mine", runs, "--overwrite") == 2
    export(make_model(), BYTE, tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").write_text("beside a config.json")
    assert status_of(tiny_run, tmp_path / "out", "--overwrite") == 2
    assert (tmp_path / "out" / "thesis.txt").exists()
    assert capsys.readouterr().err.count("holds more than an export") == 3
    assert (runs / "mine/config.toml").exists()


def test_overwrite_spares_the_checkpoints_of_others(tiny_run, tmp_path, capsys):
    """Such as one that was trained on with transformers where it lay; an export that was killed is overwritten."""
    out = tmp_path / "out"
    assert status_of(tiny_run, out) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        (out / name).unlink()
    assert status_of(tiny_run, out, "--overwrite") == 0
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for content in (before["config.json"], b"", b"[]", b'{"model_type": "gpt2"}', b'{"model_type": "t5"}'):
        (out / "config.json").write_bytes(content)
        assert status_of(tiny_run, out, "--overwrite") == 2
        assert "that gpt.export did not write" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before | {"config.json": content}
    (out / "config.json").unlink()
    assert status_of(tiny_run, out, "--overwrite") == 2


def test_overwrite_takes_a_link_to_a_checkpoint(tiny_run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real").mkdir()
    (tmp_path / "real/config.json").write_text("{}")
    assert status_of(tiny_run, tmp_path / "link", "--overwrite") == 0
    assert (tmp_path / "real/model.safetensors").exists()


def test_an_option_that_no_family_is_known_to_have_is_refused(monkeypatch):
    """A new option is never dropped without a word: its default alone is exported until a family is said to have it."""
    fits = {family: {k: v for k, v in rules.items() if k != "activation"} for family, rules in FITS.items()}
    monkeypatch.setattr(export_module, "FITS", fits)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, seq_len=8, vocab_size=11)
    assert family_of(GPT(config)) == "qwen3"
    with pytest.raises(UserError, match=r"qwen3: activation relu2 \(not swiglu\)"):
        family_of(GPT(replace(config, activation="relu2")))

"""What a checkpoint's files hold besides the model changes nothing, or is refused; other directories are named."""

# ruff: noqa: F811 - fixtures are imported

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gpt
from gpt.errors import UserError
from gpt.interop.hf_config import DEFAULTS
from gpt.interop.initial import load_source
from gpt.training.command import load_config
from tests.hf_checks import CASES, checkpoint, checkpoints, edit, random_tokens  # noqa: F401 - fixtures


def with_weights(folder, **extra):
    """Add tensors to the checkpoint's file."""
    weights = load_file(folder / "model.safetensors") | extra
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def theirs_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(random_tokens()).logits


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_equal_those_of_transformers(family):
    theirs = transformers.CONFIG_MAPPING[family]()
    ours = {key: value for key, value in DEFAULTS[family].items() if value is not None and hasattr(theirs, key)}
    if "sliding_window" in ours and not getattr(theirs, "use_sliding_window", True):
        del ours["sliding_window"]  # transformers forgets a window that is switched off
    assert ours == {key: getattr(theirs, key) for key in ours} and "tie_word_embeddings" in ours


TIED = ("gpt2", "llama-bias-tied", "qwen2")


@pytest.mark.parametrize("case", TIED)
def test_a_head_that_differs_from_the_tied_table_is_kept(checkpoint, case, caplog):
    folder = checkpoint(case)
    with_weights(folder, **{"lm_head.weight": torch.randn(61, 32, generator=torch.Generator().manual_seed(2))})
    ours = gpt.from_hf(folder, device="cpu")
    assert "its head differs from its embedding table, so they are not tied" in caplog.text
    assert not ours.config.tied_embeddings
    torch.testing.assert_close(ours(random_tokens()), theirs_of(folder), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_equal_to_the_tied_table_stays_tied(checkpoint, case, dtype, caplog):
    folder = checkpoint(case)
    table = "transformer.wte.weight" if case == "gpt2" else "model.embed_tokens.weight"
    rows = load_file(folder / "model.safetensors")[table].to(dtype)
    with_weights(folder, **{table: rows, "lm_head.weight": rows.clone()})
    ours = gpt.from_hf(folder, device="cpu")
    assert ours.config.tied_embeddings and caplog.text == ""
    assert ours.embed.weight.equal(rows.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_that_differs_from_the_table_by_rounding_is_kept(checkpoint, dtype):
    folder = checkpoint("llama-bias-tied")
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_weights(folder, **{"model.embed_tokens.weight": rows.to(dtype), "lm_head.weight": rows.clone()})
    ours = gpt.from_hf(folder, device="cpu")
    assert not ours.config.tied_embeddings and ours.head.weight.equal(rows)
    torch.testing.assert_close(ours(random_tokens()), theirs_of(folder), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "name", "size"),
    [
        ("llama-attention-bias", "model.layers.1.mlp.gate_proj.bias", 72),
        ("llama-attention-bias", "model.layers.0.mlp.down_proj.bias", 32),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias", 32),
        ("qwen2", "model.layers.0.mlp.up_proj.bias", 72),
        ("qwen3", "model.layers.0.self_attn.q_proj.bias", 48),
        ("mistral", "model.layers.0.self_attn.q_proj.bias", 32),
        ("llama", "model.norm.bias", 32),
    ],
)
def test_a_bias_that_the_options_do_not_have_is_refused(checkpoint, case, name, size):
    """transformers leaves it out, though some of the linear layers have one."""
    folder = checkpoint(case)
    with_weights(folder, **{name: torch.ones(size)})
    with pytest.raises(UserError, match=f"that this model lacks: {name}"):
        gpt.from_hf(folder, device="cpu")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("gpt2", "transformer.ln_f.bias"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("llama-bias-tied", "model.layers.1.mlp.down_proj.bias"),
        ("llama", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_missing_weight_is_refused(checkpoint, case, name):
    folder = checkpoint(case)
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the weight {name}"):
        gpt.from_hf(folder, device="cpu")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused(checkpoint, value):
    folder = checkpoint("llama")
    with_weights(folder, **{"model.norm.weight": torch.ones(32).index_fill_(0, torch.tensor(7), float(value))})
    with pytest.raises(UserError, match=r"model.norm.weight holds NaN or infinity"):
        gpt.from_hf(folder, device="cpu")


@pytest.mark.parametrize(
    ("case", "name", "usual", "odd"),
    [
        ("gpt2", "transformer.h.1.attn.bias", torch.ones(24, 24).tril().bool()[None, None], torch.ones(1, 1, 24, 24)),
        ("gpt2", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4), torch.tensor(0.0)),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", 500.0 ** -(torch.arange(4) / 4), torch.ones(4)),
    ],
    ids=["mask", "masked score", "frequencies"],
)
def test_tables_beside_the_weights_are_compared(checkpoints, checkpoint, case, name, usual, odd, caplog):
    """transformers leaves them out too."""
    folder, expected = checkpoint(case), checkpoints(case)[0](random_tokens()).logits
    for table, said in ((usual, ""), (odd, f"{name} differs from what its options make it, and is ignored")):
        with_weights(folder, **{name: table})
        ours = gpt.from_hf(folder, device="cpu")
        torch.testing.assert_close(ours(random_tokens()), expected, atol=1e-4, rtol=1e-5)
        assert said in caplog.text and bool(said) == bool(caplog.text)


@pytest.mark.parametrize("case", ["gpt2", "llama", "llama-bias-tied"])
@pytest.mark.parametrize("name", ["score.weight", "model.layers.0.self_attn.bias", "h.0.attn.biases", "lm_head.bias"])
def test_an_unknown_tensor_is_refused(checkpoint, case, name):
    folder = checkpoint(case)
    with_weights(folder, **{name: torch.ones(3)})
    with pytest.raises(UserError, match=f"that this model lacks: {name}"):
        gpt.from_hf(folder, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn], ids=str)
def test_weights_of_another_type_are_refused(checkpoint, dtype):
    folder = checkpoint("llama")
    with_weights(folder, **{"model.norm.weight": torch.ones(32).to(dtype)})
    with pytest.raises(UserError, match=r"model\.norm\.weight has the type torch"):
        gpt.from_hf(folder, device="cpu")


def test_a_tensor_in_two_files_is_refused(checkpoint):
    folder = checkpoint("llama")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(32)}, folder / "b.safetensors")
    index = {"weight_map": {"model.norm.weight": "b.safetensors", "lm_head.weight": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"holds model.norm.weight in two files, a.safetensors and b.safetensors"):
        gpt.from_hf(folder, device="cpu")
    (folder / "b.safetensors").unlink()
    for weight_map, message in (
        ({"lm_head.weight": "a.safetensors", "x": "a.safetensors"}, "says that x is in a.safetensors, but it is not"),
        ({}, "names no weights"),
        ({"x": "../a.safetensors"}, "names files outside"),
        ([], "names no weights"),
        (None, "is not an index of safetensors files"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            gpt.from_hf(folder, device="cpu")
    (folder / "a.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model.safetensors and model.safetensors.index.json"):
        gpt.from_hf(folder, device="cpu")


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *((case, {"attn_logit_softcapping": 50.0}) for case in ("gpt2", "llama", "mistral", "qwen2", "qwen3")),
        *((case, {"final_logit_softcapping": 30.0}) for case in ("gpt2", "llama", "mistral", "qwen2", "qwen3")),
        *((case, {"is_causal": False}) for case in CASES),
        ("llama", {"logit_scale": 0.5}),
        ("llama", {"residual_multiplier": 0.22}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"sliding_window": 8}),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("llama", {"num_local_experts": 8}),
        ("llama", {"attention_chunk_size": 8}),
        ("mistral", {"attention_bias": True}),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen2", {"mlp_bias": True}),
        ("gpt2", {"pruned_heads": {"0": [1]}}),
        ("gpt2", {"sliding_window": 8}),
        ("nanochat", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_an_option_of_another_family_is_refused(checkpoint, case, changes):
    folder = checkpoint(case)
    edit(folder, **changes)
    with pytest.raises(UserError, match=f"has options that this model lacks: .*{next(iter(changes))}"):
        gpt.from_hf(folder, device="cpu")


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_weights": True, "pruned_heads": {}, "n_ctx": 24}),
        ("llama", {"pretraining_tp": 2, "logit_scale": 1.0, "is_causal": True, "sliding_window": None}),
        ("llama", {"layer_types": ["full_attention"] * 2, "num_experts": None, "partial_rotary_factor": 1.0}),
        ("mistral", {"attention_bias": False}),
        ("qwen2", {"use_mrope": False, "final_logit_softcapping": None}),
        ("qwen3-window", {"sliding_window": 5, "use_sliding_window": False, "layer_types": "delete"}),
    ],
    ids=str,
)
def test_a_neutral_option_is_accepted(checkpoint, case, changes):
    folder = checkpoint(case)
    edit(folder, **changes)
    torch.testing.assert_close(
        gpt.from_hf(folder, device="cpu")(random_tokens()), theirs_of(folder), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "has n_layer 2 and num_hidden_layers 1: they are one option"),
        ({"num_attention_heads": 2}, "has n_head 4 and num_attention_heads 2"),
        ({"n_positions": 8}, r"wpe.weight has shape \(24, 32\), not \(8, 32\)"),
        ({"n_positions": 30}, r"wpe.weight has shape \(24, 32\), not \(30, 32\)"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' is not true or false"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_or_the_weights_are_refused(checkpoint, changes, message):
    folder = checkpoint("gpt2")
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        gpt.from_hf(folder, device="cpu")


def test_gpt2s_options_by_their_second_names(checkpoint):
    folder = checkpoint("gpt2")
    names = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings"}
    names |= {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    options = json.loads((folder / "config.json").read_text())
    edit(folder, **dict.fromkeys(names, "delete"), **{names[key]: options[key] for key in names})
    torch.testing.assert_close(
        gpt.from_hf(folder, device="cpu")(random_tokens()), theirs_of(folder), atol=1e-4, rtol=1e-5
    )


def test_qwens_default_window(checkpoint):
    """4,096 is what their config means then."""
    folder = checkpoint("qwen3-window")
    edit(folder, sliding_window="delete")
    assert gpt.from_hf(folder, device="cpu").config.window == 4096


# --- other directories ------------------------------------------------------------------------------------------------

ADAPTER = '{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-0.6B"}'
OTHERS = {
    "adapter": ("adapter_config.json", ADAPTER, r"is a PEFT adapter \(LORA\) of the model Qwen/Qwen3-0.6B.*merge"),
    "odd adapter": ("adapter_config.json", "[]", "a PEFT adapter .* does not name.*merge_and_unload"),
    "diffusers": ("model_index.json", "{}", "a diffusers pipeline"),
    "gguf": ("model-Q4_1.gguf", "GGUF", r"a GGUF model \(model-Q4_1.gguf\): .*gguf_file"),
    "onnx": ("model.onnx", "", r"an ONNX model \(model.onnx\)"),
    "onnx folder": ("onnx/model.onnx", "", "an ONNX model"),
    "sentences": ("modules.json", "[]", "a sentence-transformers model"),
    "consolidated": ("consolidated.00.pth", "", r"authors' own format \(consolidated.00.pth\)"),
    "params": ("params.json", "{}", "authors' own format"),
    "pickle": ("pytorch_model.bin", "", "weights in a pickle, pytorch_model.bin"),
    "pt": ("model.pt", "", "weights in a pickle, model.pt"),
    "tensorflow": ("tf_model.h5", "", "TensorFlow's weights"),
    "flax": ("flax_model.msgpack", "", "Flax's weights"),
    "cache": ("snapshots/abc/config.json", "{}", "a folder of the Hub's cache: give snapshots/abc in it"),
    "trainer": (
        "checkpoint-500/config.json",
        "{}",
        "several checkpoints.*: give one of them, such as checkpoint-500",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_directories_are_named(tmp_path, kind):
    name, content, message = OTHERS[kind]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        gpt.from_hf(tmp_path)
    with pytest.raises(UserError, match=f"is not a run directory: .*{message}"):
        gpt.load(tmp_path)
    with pytest.raises(UserError, match=message):
        load_source(tmp_path)
    with pytest.raises(UserError, match=message):
        load_config(["--init-from", str(tmp_path)])


def test_of_several_pickles_the_models_is_named(tmp_path):
    for name in ("optimizer.bin", "pytorch_model-00001-of-00002.bin", "scheduler.pt"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"in a pickle, pytorch_model-00001-of-00002\.bin"):
        gpt.from_hf(tmp_path)


def test_an_adapter_beside_a_model_is_refused(checkpoint):
    """transformers would apply it."""
    folder = checkpoint("llama")
    (folder / "adapter_config.json").write_text(ADAPTER)
    with pytest.raises(UserError, match="is a PEFT adapter"):
        gpt.from_hf(folder)
    with pytest.raises(UserError, match="is not a run directory: it is a PEFT adapter"):
        gpt.load(folder)


def test_a_file_or_an_empty_directory_is_named(checkpoint):
    folder = checkpoint("llama")
    with pytest.raises(UserError, match=r"safetensors is a file: give the directory that holds it, "):
        gpt.from_hf(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"is not a run directory: give the directory that holds it"):
        gpt.load(folder / "model.safetensors")
    (folder / "x.gguf").write_text("GGUF")
    with pytest.raises(UserError, match=r"x.gguf is a file: it is a GGUF model: convert it"):
        gpt.from_hf(folder / "x.gguf")
    (folder / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"x.txt is a file: a Hugging Face checkpoint is a directory"):
        gpt.from_hf(folder / "x.txt")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not a Hugging Face checkpoint: it has no config.json"):
        gpt.from_hf(folder / "empty")
    (folder / "config.json").unlink()
    (folder / "x.gguf").unlink()
    with pytest.raises(UserError, match=r"is not a Hugging Face checkpoint: it has no config.json"):
        gpt.from_hf(folder)

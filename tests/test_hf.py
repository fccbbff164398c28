"""Hugging Face checkpoints give here the logits that they give in transformers; what does not fit is refused."""

# ruff: noqa: F811 - fixtures are imported

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt
from gpt.errors import UserError
from gpt.interop import hf_config
from tests.hf_checks import CASES, checkpoint, checkpoints, edit, make_theirs, random_tokens  # noqa: F401 - fixtures


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(checkpoints, case):
    theirs, folder = checkpoints(case)
    ours = gpt.from_hf(folder, device="cpu")
    assert not ours.training
    expected = theirs(random_tokens()).logits
    assert expected.std() > 0.5  # something to be wrong about
    torch.testing.assert_close(ours(random_tokens()), expected, atol=1e-4, rtol=1e-5)


def test_sharded_checkpoint(tmp_path):
    theirs = make_theirs(*CASES["llama"])
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(
        gpt.from_hf(tmp_path, device="cpu")(random_tokens()), theirs(random_tokens()).logits, atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_names_without_prefix_and_old_tables_are_read(checkpoints, checkpoint, case):
    """As the released GPT-2 has them: the bare decoder's names, the causal masks among the weights."""
    folder = checkpoint(case)
    prefix = "transformer." if case == "gpt2" else "model."
    weights = {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}
    extra = {"h.0.attn.bias": torch.ones(1, 1, 24, 24)} if case == "gpt2" else {"rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | extra, folder / "model.safetensors")
    expected = checkpoints(case)[0](random_tokens()).logits
    torch.testing.assert_close(gpt.from_hf(folder, device="cpu")(random_tokens()), expected, atol=1e-4, rtol=1e-5)


def test_the_older_form_of_rope_theta_is_read(checkpoints, checkpoint):
    folder = checkpoint("llama")
    edit(folder, rope_parameters="delete", rope_theta=500.0, rope_scaling=None)
    expected = checkpoints("llama")[0](random_tokens()).logits
    torch.testing.assert_close(gpt.from_hf(folder, device="cpu")(random_tokens()), expected, atol=1e-4, rtol=1e-5)


def test_the_older_form_of_window_layers_is_read(checkpoint):
    folder = checkpoint("qwen3-window")
    edit(folder, layer_types="delete", max_window_layers=1)
    config = gpt.from_hf(folder, device="cpu").config
    assert (config.window, config.window_pattern) == (5, "LS")


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_a_shorter_context_cuts_the_position_table(checkpoints, case):
    theirs, folder = checkpoints(case)
    ours = gpt.from_hf(folder, seq_len=10, device="cpu")
    assert ours.config.seq_len == 10
    idx = random_tokens()[:, :10]
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=1e-5)


def test_a_longer_context_than_the_learned_table_is_refused(checkpoints):
    with pytest.raises(UserError, match="has 24 learned positions: seq_len 25 is too long"):
        gpt.from_hf(checkpoints("gpt2")[1], seq_len=25)


def test_an_unusable_device_is_named_before_a_download(monkeypatch):
    monkeypatch.setattr(hf_config, "fetch", lambda source: pytest.fail("the download began"))
    with pytest.raises(UserError, match="device 'gpu' cannot be used here"):
        gpt.from_hf("openai-community/gpt2", device="gpu")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type 'mixtral' is not supported: known are gpt2, llama"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_type 'llama3'"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "wrong kind: int too large to convert to float"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters that differ between layers",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu' .known are silu, swish, relu"),
        ("llama", {"hidden_act": "relu"}, "only ReLU.2, where both are equal"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": "delete"}, "lacks the key 'hidden_size'"),
        ("llama", {"hidden_size": "wide"}, "config.json"),
        ("llama", {"hidden_size": True}, "config.json: n_embd must be a whole number, not True"),
        ("llama", {"vocab_size": None}, "config.json: vocab_size must be a whole number, not None"),
        ("llama", {"num_hidden_layers": 1.5}, "config.json: n_layer must be a whole number, not 1.5"),
        ("gpt2", {"n_inner": 128.0}, "config.json: mlp_dim must be a whole number or None, not 128.0"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type .'gpt2'. is not supported"),
        ("llama", {"intermediate_size": 80}, r"up_proj|gate_proj.* has shape \(72, 32\), not \(80, 32\)"),
        ("llama", {"num_hidden_layers": 1}, "that this model lacks: model.layers.1"),
        ("llama", {"num_hidden_layers": 3}, "lacks the weight model.layers.2"),
        ("qwen3-window", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types .*chunked_attention"),
        ("qwen3-window", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True .not False"),
        ("gpt2", {"n_inner": 100}, r"mlp.c_fc.weight has shape \(32, 128\), not \(32, 100\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_checkpoints_are_refused(checkpoint, case, changes, message):
    folder = checkpoint(case)
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        gpt.from_hf(folder, device="cpu")


def test_all_unsupported_options_are_listed(checkpoint):
    folder = checkpoint("gpt2")
    edit(folder, scale_attn_weights=False, add_cross_attention=True, activation_function="mish")
    with pytest.raises(UserError, match=r"scale_attn_weights False.*add_cross_attention True.*activation 'mish'"):
        gpt.from_hf(folder, device="cpu")


def test_damaged_files_are_refused(checkpoint):
    folder = checkpoint("gpt2")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        gpt.from_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        gpt.from_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"in a pickle, pytorch_model\.bin"):
        gpt.from_hf(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="names files outside"):
        gpt.from_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        gpt.from_hf(folder)


def test_a_name_downloads_only_json_and_safetensors(checkpoints, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns))
        return str(checkpoints("gpt2")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert gpt.from_hf("openai-community/gpt2", device="cpu").config.n_embd == 32
    assert asked == [("openai-community/gpt2", ["*.json", "*.safetensors"])]


def test_a_name_that_cannot_be_downloaded_is_reported(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"could not be downloaded \(OSError: no route to host\)"):
        gpt.from_hf("gpt2")
    with pytest.raises(UserError, match="no/such/folder is neither a directory nor the name of a Hugging Face"):
        gpt.from_hf("no/such/folder")

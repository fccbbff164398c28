"""Small Hugging Face checkpoints of every family, and copies of them to spoil."""

import json

import pytest
import torch
import transformers

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": None,
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
GPT2 = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-gelu": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40}),
    "llama": ("Llama", {**LLAMA, **THETA}),
    "llama-bias-tied": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-attention-bias": ("Llama", {**LLAMA, "attention_bias": True, "head_dim": 24}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**LLAMA, **WINDOW, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**LLAMA, **THETA, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "qwen2-window-above": ("Qwen2", {**LLAMA, **WINDOW, "max_window_layers": 1}),
    "qwen3-window-below": ("Qwen3", {**LLAMA, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3-window": ("Qwen3", {**LLAMA, **WINDOW, "head_dim": 12}),
    "nanochat": ("NanoChat", {**LLAMA, **THETA, "final_logit_softcapping": None}),
    "nanochat-softcap": ("NanoChat", {**LLAMA, "final_logit_softcapping": 2.0}),
}


def random_tokens() -> torch.Tensor:
    return torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))


def make_theirs(kind: str, options: dict):
    """Their model with every weight random, so that neither zeros nor ones hide anything."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3).add_(1.0 if weight.ndim == 1 else 0.0)
    return model


def edit(folder, **changes):
    """Change keys of config.json; None deletes one."""
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value != "delete"}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(case): their model and the directory that it was saved to."""
    made = {}

    def get(case):
        if case not in made:
            model = make_theirs(*CASES[case])
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return get


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A copy of a checkpoint, to spoil."""

    def copy(case):
        _, folder = checkpoints(case)
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy

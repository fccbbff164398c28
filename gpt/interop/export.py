"""Writes a run as a Hugging Face checkpoint: python -m gpt.export RUN DIR [--dtype bfloat16] [--overwrite]

AutoModelForCausalLM and AutoTokenizer load the directory and compute the run's logits and token ids. Writing it does
not need transformers.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt.arguments import checked
from gpt.data.tokenizers import ByteTokenizer, Tokenizer
from gpt.errors import EXIT_DONE, UserError
from gpt.files import flush, make_folder
from gpt.interop.hf_config import GPT2_NAMES, LLAMA_NAMES
from gpt.interop.hf_tokenizer import write_hf_tokenizer, write_tiktoken
from gpt.interop.hf_weights import fits_nanochat, tensors_for
from gpt.model import GPT, ModelConfig
from gpt.run import load
from gpt.streams import do_without_output

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "nanochat": "NanoChatForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
WRITTEN = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
WRITTEN += ("ranks.tiktoken",)
Dtype = Literal["float32", "bfloat16", "float16"]
_ANY = None
# Options that every family has, or that a trained model no longer needs.
_COMMON = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "mlp_dim", "seq_len", "vocab_size", "rope_theta")
_COMMON += ("norm_eps", "tied_embeddings", "dropout", "init")
_LLAMA = dict.fromkeys(_COMMON, _ANY) | {
    "position": ("rotary",),
    "norm": ("rmsnorm",),
    "norm_order": ("pre",),
    "activation": ("swiglu", "relu2"),
    "qk_norm": (False,),
    "bias": _ANY,
}
# The option values that each family supports: without an entry, the default alone. Families are tried in this order.
FITS: dict[str, dict[str, tuple | None]] = {
    "gpt2": _LLAMA
    | {"position": ("learned",), "norm": ("layernorm",), "activation": ("gelu_tanh", "gelu", "relu", "relu2")},
    "nanochat": _LLAMA
    | {
        "activation": ("relu2",),
        "qk_norm": (True,),
        "bias": (False,),
        "tied_embeddings": (False,),
        "logit_softcap": _ANY,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA | {"bias": (False,), "window": _ANY},
    "qwen3": _LLAMA | {"bias": (False,), "window": _ANY, "window_pattern": _ANY, "qk_norm": (True,)},
}


@dataclass(frozen=True)
class Arguments:
    """Write a run as a Hugging Face checkpoint: config.json, model.safetensors, tokenizer.json."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    directory: tyro.conf.Positional[Path]
    """The directory to write."""
    dtype: Dtype = "float32"
    """Precision of the weights written."""
    overwrite: bool = False
    """Delete an earlier export in the directory. A directory with any other file is refused."""


def misfits(family: str, model: GPT) -> list[str]:
    """List the options of a model that a family lacks."""
    config, found = model.config, []
    for f in fields(config):
        option, value = f.name, getattr(config, f.name)
        allowed = FITS[family].get(option, (f.default,))
        if allowed is not None and value not in allowed:
            found.append(f"{option} {value} (not {' or '.join(map(str, allowed))})")
    if family == "gpt2" and config.kv_heads != config.n_head:
        found.append(f"n_kv_head {config.n_kv_head} (not n_head)")
    if family == "gpt2" and config.head_width * config.n_head != config.n_embd:
        found.append(f"head_dim {config.head_dim} (not n_embd / n_head)")
    if family == "llama" and config.n_embd % config.n_head:
        found.append(f"n_embd {config.n_embd} (not a multiple of n_head)")
    if family == "nanochat" and not found:
        found += fits_nanochat(model)
    return found


def family_of(model: GPT) -> str:
    """Return the Hugging Face family that computes what this model does. UserError lists the options that it lacks."""
    faults = {family: misfits(family, model) for family in FITS}
    least = min(map(len, faults.values()))
    nearest = {family: found for family, found in faults.items() if len(found) == least}
    if least:
        raise UserError(
            "no supported Hugging Face family has this model's options; the nearest lack: "
            + " | ".join(f"{family}: {'; '.join(found)}" for family, found in nearest.items())
        )
    return next(iter(nearest))


def hf_config(family: str, config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Return the content of config.json."""
    document = tokenizer.document_token
    common = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": document,
        "eos_token_id": document,
        "pad_token_id": None,
    }
    values = asdict(config) | {"n_kv_head": config.kv_heads, "head_dim": config.head_width, "mlp_dim": config.mlp_width}
    names = GPT2_NAMES if family == "gpt2" else LLAMA_NAMES
    common |= {key: values[option] for option, key in names.items()}
    if family == "gpt2":
        activation = "gelu_new" if config.activation == "gelu_tanh" else config.activation
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
        return common | {"activation_function": activation, **dropouts}
    gate = {"swiglu": "silu", "relu2": "relu"}
    return common | {
        "hidden_act": config.activation if family == "nanochat" else gate[config.activation],
        # The newer form and the older one.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "attention_bias": config.bias,
        **_extras(family, config),
    }


def _extras(family: str, config: ModelConfig) -> dict[str, Any]:
    """Return the keys that only this one of Llama's relatives has."""
    if family == "llama":
        return {"mlp_bias": config.bias}
    if family == "mistral":
        return {"sliding_window": config.window}
    if family == "nanochat":
        return {"final_logit_softcapping": config.logit_softcap}
    windows = map(config.window_of, range(config.n_layer))
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = {"sliding_window": config.window, "use_sliding_window": config.window is not None}
    return window | {"max_window_layers": 0, "layer_types": kinds}


@checked
def export(model: GPT, tokenizer: Tokenizer, directory: str | Path, *, dtype: Dtype = "float32") -> str:
    """Write the checkpoint into a directory. Returns the family's name.

    Raises UserError for a model that fits no family, before writing anything, and for a failing write.
    """
    family, folder = family_of(model), Path(directory)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the model's table has {model.config.vocab_size} rows, but the tokenizer has {tokenizer.vocab_size} "
            "tokens: export it with the tokenizer that it was trained with"
        )
    settings = hf_config(family, model.config, tokenizer, dtype)
    ends = {"bos_token_id": tokenizer.document_token, "eos_token_id": tokenizer.document_token}
    try:
        make_folder(folder)
        # config.json first, so that an unfinished export can be recognized as one.
        for name, content in (("config.json", settings), ("generation_config.json", ends)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors_for(family, model, getattr(torch, dtype)), folder / "model.safetensors", {"format": "pt"})
        write_hf_tokenizer(tokenizer, folder, seq_len=model.config.seq_len)
        if tokenizer.tokens is not None:
            write_tiktoken(tokenizer, folder / "ranks.tiktoken")
        for path in (*filter(Path.exists, (folder / name for name in WRITTEN)), folder):
            flush(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    return family


def is_export(folder: Path, names: set[str]) -> bool:
    """Whether this program wrote a folder with these files, rather than transformers or another program.

    A lone config.json counts, whoever wrote it: it holds nothing worth keeping.
    """
    if names == {"config.json"}:
        return True
    try:
        config = json.loads((folder / "config.json").read_bytes())
        written = set(hf_config(config["model_type"], ModelConfig(), ByteTokenizer(), "float32"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return config["model_type"] in CLASSES and set(config) == written


def main(arguments: Arguments) -> int:
    """Export a run and list the files written. Returns the exit status."""
    do_without_output()
    folder = arguments.directory
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a directory to write to")
    left = list(folder.iterdir()) if folder.is_dir() else []
    if (folder / "config.toml").exists():
        raise UserError(f"{folder} holds a run, which an export does not overwrite: give another directory")
    if left and not arguments.overwrite:
        raise UserError(f"{folder} is not empty: give another directory, or --overwrite to delete what it holds")
    # A user who names the folder above their runs must not lose them.
    if any(path.name not in WRITTEN or path.is_dir() for path in left):
        raise UserError(f"{folder} holds more than an export and is not overwritten: give another directory")
    if left and not is_export(folder, {path.name for path in left}):
        raise UserError(f"{folder} holds a checkpoint that gpt.export did not write: give another directory")
    model, tokenizer = load(arguments.run, "cpu")
    family_of(model)
    for path in left:
        path.unlink()
    family = export(model, tokenizer, folder, dtype=arguments.dtype)
    print(f"{CLASSES[family]}, {model.num_parameters():,} parameters, {arguments.dtype}; written:")
    print("\n".join(f"  {path}" for path in sorted(folder.iterdir())))
    return EXIT_DONE

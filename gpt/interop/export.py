"""Write a run as a Hugging Face checkpoint: python -m gpt.export RUN DIR [--dtype bfloat16] [--overwrite]

AutoModelForCausalLM and AutoTokenizer load the directory, with the run's logits and token ids. Transformers is not
needed to write it.
"""

import json
from dataclasses import dataclass
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
_NONE, _ANY = (None,), None
_LLAMA = {
    "position": ("rotary",),
    "norm": ("rmsnorm",),
    "norm_order": ("pre",),
    "activation": ("swiglu", "relu2"),
    "qk_norm": (False,),
    "bias": _ANY,
    "window": _NONE,
    "window_pattern": _NONE,
    "value_embeds": (0,),
    "logit_softcap": _NONE,
}
# The values of our options that a family can say; in the order in which families are tried.
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
    """Where to write."""
    dtype: Dtype = "float32"
    """Precision of the weights written."""
    overwrite: bool = False
    """Delete what an earlier export left in the directory; a directory with anything else is refused."""


def misfits(family: str, model: GPT) -> list[str]:
    """Why a family cannot say this model's options, one clause each; none if it can."""
    config, found = model.config, []
    for option, allowed in FITS[family].items():
        value = getattr(config, option, None)
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
    """The Hugging Face family that computes what this model does. UserError lists the options that none has."""
    faults = {family: misfits(family, model) for family in FITS}
    least = min(map(len, faults.values()))
    nearest = {family: found for family, found in faults.items() if len(found) == least}
    if least:
        raise UserError(
            "no Hugging Face family known here has this model's options; the nearest lack: "
            + " | ".join(f"{family}: {'; '.join(found)}" for family, found in nearest.items())
        )
    return next(iter(nearest))


def hf_config(family: str, config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of config.json."""
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
    if family == "gpt2":
        names = {"gelu_tanh": "gelu_new"}
        return common | {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.mlp_width,
            "n_positions": config.seq_len,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": names.get(config.activation, config.activation),
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        }
    gate = {"swiglu": "silu", "relu2": "relu"}
    return common | {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation if family == "nanochat" else gate[config.activation],
        # The newer spelling and the older one.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "attention_bias": config.bias,
        **_extras(family, config),
    }


def _extras(family: str, config: ModelConfig) -> dict[str, Any]:
    """What one of Llama's kin says beyond the others."""
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
    """Write the checkpoint into a directory, made if need be; returns the family's name.

    Raises UserError for a model that no family fits, before anything is written, and where the disk refuses.
    """
    family, folder = family_of(model), Path(directory)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the model's table has {model.config.vocab_size} rows and the tokenizer {tokenizer.vocab_size} tokens: "
            "export it with the tokenizer that it was trained with"
        )
    settings = hf_config(family, model.config, tokenizer, dtype)
    ends = {"bos_token_id": tokenizer.document_token, "eos_token_id": tokenizer.document_token}
    try:
        make_folder(folder)
        # config.json first: by it an export that was killed is known as one.
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
    """Whether a folder with these files was written here, and not by transformers or another program.

    A lone config.json may be anyone's: nothing is lost with it.
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
    """Export and say what was written. Returns the exit status."""
    do_without_output()
    folder = arguments.directory
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a directory to write to")
    left = list(folder.iterdir()) if folder.is_dir() else []
    if (folder / "config.toml").exists():
        raise UserError(f"{folder} holds a run, which an export does not overwrite: give another directory")
    if left and not arguments.overwrite:
        raise UserError(f"{folder} is not empty: give another directory, or --overwrite to delete what it holds")
    # Whoever names the folder above their runs must not lose them.
    if any(path.name not in WRITTEN or path.is_dir() for path in left):
        raise UserError(f"{folder} holds more than an export, and is not overwritten: give another directory")
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

"""Reads Hugging Face checkpoints without transformers: config.json into a ModelConfig, safetensors into a GPT.

Reads GPT-2, Llama, Mistral, Qwen2, Qwen3 and nanochat if this model has the checkpoint's options; one message lists all
options that it lacks. Nothing is unpickled.
"""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt.arguments import checked
from gpt.data.tokenizers import Tokenizer
from gpt.device import Device, pick_device
from gpt.errors import UserError
from gpt.files import is_folder
from gpt.folders import adapter, instead
from gpt.interop.hf_tokenizer import read_hf_tokenizer, read_json
from gpt.interop.hf_weights import biased, copy_from, has_other_head
from gpt.model import GPT, ModelConfig

log = logging.getLogger(__name__)

ANY = None

# The defaults of transformers for keys that config.json leaves out, as far as the model depends on them.
_LLAMA = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "max_position_embeddings": 2048,
}
_QWEN = _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "max_window_layers": 28}
_QWEN |= {"sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "n_inner": None,
    },
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": _QWEN | {"attention_bias": True},
    "qwen3": _QWEN | {"head_dim": 128},
    "nanochat": _LLAMA | {"hidden_act": "relu2", "final_logit_softcapping": 15.0},
}
# GPT-2's options have two names each.
ALIASES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}
ALIASES |= {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
# Options of other families that this model lacks, with the values that change nothing (the usual one first).
NEUTRAL: dict[str, tuple] = {
    "is_causal": (True, None),
    **dict.fromkeys(("is_encoder_decoder", "use_bidirectional_attention", "alibi", "parallel_attn"), (False, None)),
    **dict.fromkeys(("use_parallel_residual", "use_mrope", "use_qk_norm", "qk_layernorm"), (False, None)),
    **dict.fromkeys(("attention_out_bias", "attn_output_gate"), (False, None)),
    **dict.fromkeys(("attention_chunk_size", "attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    **dict.fromkeys(("query_pre_attn_scalar", "clip_qkv", "attention_multiplier", "lm_head_multiplier"), (None,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (1, None)),
    **dict.fromkeys(("rotary_pct", "partial_rotary_factor"), (1, None)),
    **dict.fromkeys(("num_experts", "num_local_experts"), (None, 0)),
    "no_rope_layers": (None, []),
    "pruned_heads": ({}, None),
}
_NO_WINDOW = {"sliding_window": (None,), "use_sliding_window": (False, None)}
FIXED: dict[str, dict[str, tuple | None]] = {
    "gpt2": NEUTRAL
    | _NO_WINDOW
    | {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    "llama": NEUTRAL | _NO_WINDOW,
    "mistral": NEUTRAL | dict.fromkeys(("attention_bias", "mlp_bias"), (False,)),
    "qwen2": NEUTRAL | {"mlp_bias": (False,)},
    "qwen3": NEUTRAL | {"mlp_bias": (False,)},
    # nanochat's norm after the table is folded into the table, which the head must not share.
    "nanochat": NEUTRAL
    | _NO_WINDOW
    | {"mlp_bias": (False,), "final_logit_softcapping": ANY, "tie_word_embeddings": (False,)},
}
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
UNGATED = GELUS | {"relu": "relu", "relu2": "relu2"}
# relu(x) * x = relu(x)^2, so an export writes ReLU^2 as a gated MLP whose two projections are equal.
GATED = {"silu": "swiglu", "swish": "swiglu", "relu": "relu2"}
# Our options and the keys of config.json, for import and export.
GPT2_NAMES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "mlp_dim": "n_inner"}
GPT2_NAMES |= {"seq_len": "n_positions", "norm_eps": "layer_norm_epsilon"}
LLAMA_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")  # must be true or false


@checked
def from_hf(source: str | Path, *, seq_len: int | None = None, device: Device = "auto") -> GPT:
    """Load the model of a Hugging Face checkpoint, a directory or a name on the Hub (in eval mode, fp32).

    seq_len: a shorter context than the checkpoint's; a learned position table is cut to it.
    Raises UserError if the checkpoint cannot be read, is damaged, or has options that this model lacks.
    """
    device, folder = pick_device(device), fetch(source)
    family, config = config_from_hf(folder)
    given, positions = DEFAULTS[family] | read_json(folder / "config.json"), config.seq_len
    if seq_len is not None:
        config = crop(config, seq_len, str(source))
    if given["tie_word_embeddings"] and not config.tied_embeddings:
        log.warning("%s: its head differs from its embedding table, so they are not tied", source)
    model = GPT(config)
    copy_from(folder, family, model, biased(family, given), positions)
    return model.eval().to(device)


@checked
def tokenizer_from_hf(source: str | Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face checkpoint. UserError if it has none, or one that is not byte-level."""
    return read_hf_tokenizer(fetch(source))


def crop(config: ModelConfig, seq_len: int, source: str) -> ModelConfig:
    """Change the context of a config. UserError if a learned position table would have to grow."""
    if config.position == "learned" and seq_len > config.seq_len:
        raise UserError(f"{source} has {config.seq_len} learned positions: seq_len {seq_len} is too long for it")
    return replace(config, seq_len=seq_len)


def fetch(source: str | Path) -> Path:
    """Return a checkpoint's directory. A name on the Hub is downloaded: its JSON and safetensors files."""
    folder = Path(source)
    if is_folder(folder):
        return folder
    if folder.exists():
        hint = instead(folder) or "a Hugging Face checkpoint is a directory, or a name on the Hub"
        raise UserError(f"{source} is a file: {hint}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise UserError(f"{source} is neither a directory nor the name of a Hugging Face checkpoint")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"no directory {source} exists; to download by name, pip install huggingface_hub") from None
    try:
        # Only files of the root: folders hold other formats, and consolidated* a second copy of the weights.
        patterns = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*", "consolidated*"]}
        return Path(snapshot_download(str(source), **patterns))
    except Exception as error:  # the Hub's client raises errors of many types
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no directory {source} exists, and the checkpoint of that name could not be downloaded "
            f"({type(error).__name__}: {reason})"
        ) from error


def config_from_hf(folder: Path) -> tuple[str, ModelConfig]:
    """Read a checkpoint's family and ModelConfig. UserError lists every option that this model lacks."""
    path = folder / "config.json"
    hint = adapter(folder) if path.exists() else instead(folder) or "it has no config.json"
    if hint:
        raise UserError(f"{folder} is not a Hugging Face checkpoint: {hint}")
    content = read_json(path)
    family = content.get("model_type")
    if not isinstance(family, str) or family not in DEFAULTS:
        raise UserError(f"{path}: model_type {family!r} is not supported: known are {', '.join(DEFAULTS)}")
    given = DEFAULTS[family] | _renamed(family, content, path)
    misfits = [
        f"{key} {given[key]!r} (not {allowed[0]!r})"
        for key, allowed in FIXED[family].items()
        if allowed is not ANY and key in given and given[key] not in allowed
    ]
    if given.get("quantization_config"):
        misfits.append("quantization_config (full weights only)")
    try:
        names, options_of = (GPT2_NAMES, _gpt2) if family == "gpt2" else (LLAMA_NAMES, _llama)
        options = {option: given[key] for option, key in names.items()}
        options |= {"vocab_size": given["vocab_size"], "tied_embeddings": given["tie_word_embeddings"]}
        options |= options_of(family, given, misfits)
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} holds a value of the wrong kind: {error}") from None
    if odd := [key for key in SWITCHES if not isinstance(given.get(key), bool | None)]:
        raise UserError(f"{path} holds a value of the wrong kind: {odd[0]} {given[odd[0]]!r} is not true or false")
    if options["vocab_size"] is None:  # a ModelConfig may leave it to the tokenizer, but a checkpoint has its rows
        raise UserError(f"{path}: vocab_size must be a whole number, not None")
    if misfits:
        raise UserError(f"{path} has options that this model lacks: {'; '.join(misfits)}")
    options["tied_embeddings"] = bool(options["tied_embeddings"]) and not has_other_head(folder, family)
    try:
        return family, ModelConfig(**options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _renamed(family: str, content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Give the options one name each. UserError if an option has two values."""
    others = ALIASES if family == "gpt2" else {}
    for other, name in others.items():
        if other in content and content.get(name, content[other]) != content[other]:
            raise UserError(f"{path} has {name} {content[name]!r} and {other} {content[other]!r}: they are one option")
    return content | {name: content[other] for other, name in others.items() if other in content}


def _activation(name: str, known: dict[str, str], misfits: list[str]) -> str:
    if name not in known:
        misfits.append(f"activation {name!r} (known are {', '.join(known)})")
    return known.get(name, next(iter(known.values())))


def _gpt2(family: str, given: dict[str, Any], misfits: list[str]) -> dict[str, Any]:
    return {
        "position": "learned",
        "norm": "layernorm",
        "activation": _activation(given["activation_function"], UNGATED, misfits),
        "bias": True,
        "qk_norm": False,
        "init": "gpt2",
    }


def _llama(family: str, given: dict[str, Any], misfits: list[str]) -> dict[str, Any]:
    window, pattern = _window(family, given, misfits)
    return {
        "rope_theta": _rope_theta(given, misfits),
        "activation": _activation(given["hidden_act"], UNGATED if family == "nanochat" else GATED, misfits),
        # If only some of the linear layers have a bias, the others' are zeros.
        "bias": bool(given["attention_bias"] or (family == "llama" and given["mlp_bias"])),
        "qk_norm": family in ("qwen3", "nanochat"),
        "window": window,
        "window_pattern": pattern,
        "logit_softcap": given.get("final_logit_softcapping") if family == "nanochat" else None,
    }


def _rope_theta(given: dict[str, Any], misfits: list[str]) -> float:
    """Return the base of plain rotary positions, in the newer form (rope_parameters) or the older one (rope_theta)."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        misfits.append("rope_parameters that differ between layers")
    elif kind != "default":
        misfits.append(f"rope_type {kind!r} (not 'default')")
    share = rope.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        misfits.append(f"partial_rotary_factor {share!r} (not 1)")
    return float(rope.get("rope_theta") or given.get("rope_theta") or 10000.0)


def _window(family: str, given: dict[str, Any], misfits: list[str]) -> tuple[int | None, str | None]:
    """Return the sliding window, and a window_pattern if only some layers have it."""
    window, layers = given["sliding_window"], given["num_hidden_layers"]
    if family not in ("qwen2", "qwen3") and given.get("layer_types"):
        kind = "full_attention" if family != "mistral" or window is None else "sliding_attention"
        if any(other != kind for other in given["layer_types"]):
            misfits.append(f"layer_types {given['layer_types']!r} (not {kind} in all layers)")
    if family == "mistral":
        return window, None
    if family not in ("qwen2", "qwen3") or not given.get("use_sliding_window") or window is None:
        return None, None
    kinds = given.get("layer_types") or [
        "sliding_attention" if i >= given["max_window_layers"] else "full_attention" for i in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        misfits.append(f"layer_types {kinds!r} (not full_attention or sliding_attention for each of {layers} layers)")
    pattern = "".join("S" if kind == "sliding_attention" else "L" for kind in kinds)
    if "L" not in pattern:
        return window, None
    return (window, pattern) if "S" in pattern else (None, None)

"""Recognise directories of other formats, and say in one clause what they hold and what to do with them."""

import json
from pathlib import Path

_SAVE = "load it with transformers and save_pretrained it as safetensors"
# Glob pattern, what the directory is, what to do; the first match counts.
_SIGNS = (
    ("model_index.json", "a diffusers pipeline, not a language model", "give a language model's directory"),
    ("*.gguf", "a GGUF model ({})", "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=...) and save_pretrained it"),
    ("modules.json", "a sentence-transformers model", "give the directory of a language model"),
    ("*_Transformer", "a sentence-transformers model", "give the directory of a language model"),
    ("consolidated*", "a checkpoint in its authors' own format ({})", "convert it to transformers' format first"),
    ("params.json", "a checkpoint in its authors' own format ({})", "convert it to transformers' format first"),
    ("*.onnx", "an ONNX model ({})", "give the checkpoint that it was exported from"),
    ("onnx", "an ONNX model", "give the checkpoint that it was exported from"),
    ("pytorch_model*.bin", "weights in a pickle, {}, which can run any code when it is read", _SAVE),
    ("*.bin", "weights in a pickle, {}, which can run any code when it is read", _SAVE),
    ("*.pt", "weights in a pickle, {}, which can run any code when it is read", _SAVE),
    ("*.pth", "weights in a pickle, {}, which can run any code when it is read", _SAVE),
    ("*.h5", "TensorFlow's weights ({})", _SAVE),
    ("*.msgpack", "Flax's weights ({})", _SAVE),
    ("snapshots/*", "a folder of the Hub's cache", "give {} in it"),
    ("checkpoint-*", "several checkpoints", "give one of them, such as {}"),
)


def adapter(folder: Path) -> str | None:
    """Write the clause for a PEFT adapter, which is a change to a model; None for anything else."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_bytes())
        kind, base = settings.get("peft_type", "PEFT"), settings.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        if not (folder / "adapter_config.json").exists():
            return None
        kind, base = "PEFT", None
    return (
        f"it is a PEFT adapter ({kind}) of the model {base or 'that its adapter_config.json does not name'}, not a "
        "whole model: merge it into that with peft (merge_and_unload), save_pretrained it, and give that directory"
    )


def instead(folder: Path) -> str | None:
    """Say what a directory or file holds instead of config.json and safetensors; None if it is not recognised."""
    if found := adapter(folder):
        return found
    if folder.is_file():
        if folder.suffix == ".gguf":
            return "it is a GGUF model: convert it to transformers' format first, and give that directory"
        if folder.suffix in (".safetensors", ".json", ".bin"):
            return f"give the directory that holds it, {folder.parent}"
        return None
    for pattern, what, todo in _SIGNS:
        if found := sorted(folder.glob(pattern)):
            name = found[0].relative_to(folder).as_posix()
            return f"it holds {what}: {todo}".replace("{}", name)
    return None

"""What training may begin with, and evaluation read: a run of ours, or a Hugging Face checkpoint."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from gpt.config import Config
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError
from gpt.interop.hf_config import config_from_hf, crop, fetch, from_hf, tokenizer_from_hf
from gpt.model import GPT, ModelConfig
from gpt.run.loading import load, read_run, run_tokenizer

# What training on may change: the rest is in the shape or the meaning of the weights.
FREE = ("seq_len", "dropout", "init")


def is_run(source: str | Path) -> bool:
    """Whether the source is a run directory; else it is a Hugging Face directory or name."""
    return (Path(source) / "config.toml").exists()


def load_source(source: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer]:
    """Model (in eval mode, fp32) and tokenizer of a run or a Hugging Face checkpoint. Raises UserError."""
    if is_run(source):
        return load(source, device)
    model, tokenizer = from_hf(source, device=device), tokenizer_from_hf(source)
    tokenizer.check_table(model.config.vocab_size, str(source))
    return model, tokenizer


def initial_config(source: str | Path) -> ModelConfig:
    """The model options of a run or a Hugging Face checkpoint. Raises UserError."""
    return read_run(Path(source))[0].model if is_run(source) else config_from_hf(fetch(source))[1]


def has_tokenizer(source: str | Path) -> bool:
    """Whether the source brings a tokenizer: each run does, a checkpoint with a tokenizer.json. Raises UserError."""
    return is_run(source) or (fetch(source) / "tokenizer.json").exists()


def initial_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of config.train.init_from; None where that is not given, or is a checkpoint without tokenizer.json.

    Raises UserError where the model asked for is not the source's.
    """
    source = config.train.init_from
    if source is None:
        return None
    theirs = initial_config(source)
    for key, value in asdict(config.model).items():
        if key == "vocab_size" and (value is None or value > theirs.vocab_size):
            continue  # rows are added
        if key not in FREE and value != getattr(theirs, key):
            raise UserError(f"the model of {source} has {key} {getattr(theirs, key)}, not {value}: leave {key} out")
    crop(theirs, config.model.seq_len, source)
    if is_run(source):
        return run_tokenizer(Path(source))
    return tokenizer_from_hf(source) if has_tokenizer(source) else None


@torch.no_grad()
def copy_initial_weights(config: Config, model: GPT, say: Callable[[str], None] = print) -> None:
    """Copy the weights of config.train.init_from, if that is given; a learned position table is cut to the context.

    Rows that a table of tokens has beyond the source's are the mean of those.
    """
    source = config.train.init_from
    if source is None:
        return
    theirs = load(source, "cpu")[0] if is_run(source) else from_hf(source, device="cpu")
    weights = dict(theirs.named_parameters())
    for name, weight in model.named_parameters():
        rows = weights[name]
        if name == "position_embed.weight":
            rows = rows[: len(weight)]
        elif len(weight) > len(rows):
            rows = torch.cat((rows, rows.mean(0, keepdim=True).expand(len(weight) - len(rows), -1)))
        weight.copy_(rows)
    have, had = model.config.vocab_size, theirs.config.vocab_size
    if have > had:
        say(
            f"the tables of {source} have {had} rows and this vocabulary {have}: those added are the mean of the others"
        )

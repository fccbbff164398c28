"""Loads the source of --init-from or of an evaluation: a run, or a Hugging Face checkpoint."""

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

# Options that fine-tuning may change. The others decide the shape or the meaning of the weights.
FREE = ("seq_len", "dropout", "init")


def is_run(source: str | Path) -> bool:
    """Whether the source is a run directory rather than a Hugging Face directory or name."""
    return (Path(source) / "config.toml").exists()


def load_source(source: str | Path, device: str = "auto") -> tuple[GPT, Tokenizer]:
    """Load the model (in eval mode, fp32) and tokenizer of a source. Raises UserError."""
    if is_run(source):
        return load(source, device)
    model, tokenizer = from_hf(source, device=device), tokenizer_from_hf(source)
    tokenizer.check_table(model.config.vocab_size, str(source))
    return model, tokenizer


def initial_config(source: str | Path) -> ModelConfig:
    """Read the model options of a source. Raises UserError."""
    return read_run(Path(source))[0].model if is_run(source) else config_from_hf(fetch(source))[1]


def has_tokenizer(source: str | Path) -> bool:
    """Whether the source has a tokenizer: a run always, a checkpoint with a tokenizer.json. Raises UserError."""
    return is_run(source) or (fetch(source) / "tokenizer.json").exists()


def initial_tokenizer(config: Config) -> Tokenizer | None:
    """Load the tokenizer of config.train.init_from. None without init_from, or if the source has no tokenizer.

    Raises UserError if config's model is not the source's.
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
    """Copy the weights of config.train.init_from, if set. A learned position table is cut to the context.

    Rows that a token table has beyond the source's become the mean of the source's rows.
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
        say(f"the tables of {source} have {had} rows, this vocabulary {have}: each new row is the mean of the others")

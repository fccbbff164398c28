"""The loss due to int8 weights, in nats per token."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.data.provenance import tokenized_folders
from gpt.data.token_files import read_tokens
from gpt.data.tokenizers import Tokenizer
from gpt.inference.decoder import Decoder
from gpt.inference.generation import generate
from gpt.inference.sampling import SamplingConfig
from gpt.model import GPT

PIECE = 64  # tokens of a row whose logits are computed at a time


def loss_of_int8(run_dir: Path, model: GPT, tokenizer: Tokenizer, dtype: str | None = None) -> str:
    """Measure the loss due to int8 weights, and describe it in one line.

    It is measured on the run's validation text if it is still in the cache, else on text that the model generates.
    """
    T = model.config.seq_len
    tokens, what = _validation_tokens(run_dir, tokenizer), "the run's validation text"
    if tokens is None:
        config = SamplingConfig(num_samples=8, max_new_tokens=max(2, T // 2), rolling=True, temperature=1.0)
        pieces = [p for p in generate(model, tokenizer, [""], config) if p.token is not None]
        rows = [[p.token for p in pieces if p.sample == j] for j in range(8)]
        rows = [row for row in rows if len(row) > 1]
        if not rows:
            return "int8 weights: loss not measured: the validation text is gone, and the model generated none"
        shortest = min(map(len, rows))
        tokens, what = torch.tensor([row[:shortest] for row in rows]), "text that the model generated"
    else:
        width = min(T, len(tokens))
        rows = min(len(tokens) // width, max(1, 2048 // width))
        tokens = torch.from_numpy(tokens[: rows * width].astype("int64")).view(rows, width)
    kind = None if dtype is None else getattr(torch, dtype)
    lost = quantization_loss(model, tokens.to(model.embed.weight.device), dtype=kind)
    return f"int8 weights: {lost:+.4f} nats per token, on {tokens[:, 1:].numel():,} tokens of {what}"


def _validation_tokens(run_dir: Path, tokenizer: Tokenizer) -> np.ndarray | None:
    """Read the run's validation tokens, or return None if fewer than two are still in the cache."""
    try:
        tokens = read_tokens(tokenized_folders(run_dir)[0] / "val.tokens", tokenizer)
    except (OSError, ValueError, KeyError, TypeError):  # a UserError is a ValueError
        return None
    return tokens if len(tokens) > 1 else None


@torch.inference_mode()
def quantization_loss(model: nn.Module, tokens: Tensor, *, dtype: torch.dtype | None = None) -> float:
    """Compute by how many nats per token int8 weights raise the loss on tokens (B, T).

    dtype: of the int8 model's activations, see Decoder.
    """
    losses = []
    for options in ({"quantize": "int8", "dtype": dtype}, {}):
        decoder = Decoder(model, tokens.shape[0], tokens.shape[1] - 1, **options)
        nats = 0.0
        for given, wanted in zip(tokens[:, :-1].split(PIECE, dim=1), tokens[:, 1:].split(PIECE, dim=1)):
            nats += float(F.cross_entropy(decoder.step(given).flatten(0, 1), wanted.flatten(), reduction="sum"))
        losses.append(nats / tokens[:, 1:].numel())
    return losses[0] - losses[1]

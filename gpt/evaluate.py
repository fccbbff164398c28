"""What a run looks at now and then: its validation loss, and what the model writes."""

import math
from typing import Any

import torch

from gpt.config import Config
from gpt.device import autocast
from gpt.distributed import Parallel, World, whole_model
from gpt.generate import SamplingConfig, generate
from gpt.loader import target_bytes, validation_batches
from gpt.model import GPT
from gpt.tokenizer import Tokenizer


@torch.no_grad()
def evaluate(
    model: GPT, parallel: Parallel, world: World, tokens: Any, tokenizer: Tokenizer, config: Config
) -> dict[str, float]:
    """Loss over the validation slice, each token but the first once, in windows of the context; over all ranks."""
    T, limit = config.model.seq_len, config.train.eval_tokens
    rows = max(config.train.batch_size, 8192 // T)
    share = {"rank": world.rank, "world_size": world.size}
    nats, count = 0.0, 0
    model.eval()
    for x, y in validation_batches(tokens, batch_size=rows, seq_len=T, max_tokens=limit, **share):
        with autocast(world.device, config.train.dtype):
            nats += float(parallel.eval_loss(x.to(world.device), y.to(world.device)))
        count += int((y >= 0).sum())
    model.train()
    nats, count = world.sum(nats, count)
    bits = nats / math.log(2)
    return {"val_loss": nats / count, "bits_per_byte": bits / max(1, target_bytes(tokens, tokenizer, limit))}


def sample_text(model: GPT, parallel: Parallel, world: World, tokenizer: Tokenizer, config: Config) -> str | None:
    """What the model writes now, for rank 0 to show. It draws from a generator of its own; None if not asked for."""
    if not config.log.sample_tokens:
        return None
    whole = whole_model(model, parallel.mode, world)
    if whole is None:
        return None
    sampling = SamplingConfig(max_new_tokens=config.log.sample_tokens, rolling=True, seed=config.train.seed)
    pieces = generate(whole, tokenizer, [config.log.sample_prompt], sampling)
    text = config.log.sample_prompt + "".join(piece.text for piece in pieces)
    return "\n".join("  | " + line for line in text.split("\n"))

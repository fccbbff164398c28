"""From a prompt to text: cached autoregressive decoding, and how the next token is drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.config import require
from gpt.errors import UserError
from gpt.model import GPT, KVCache
from gpt.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and when to stop."""

    max_new_tokens: int | None = None
    """Tokens to generate at most. None: as many as the context holds, or 500 when rolling."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to this (nucleus sampling, Holtzman et al. 2020)."""
    seed: int = 1337
    """Seed of the draws; the same seed and prompt give the same text."""
    rolling: bool = False
    """Past the context, forget the older half of the text and go on; otherwise that is an error."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        require(self.temperature >= 0, f"temperature must be at least 0, not {self.temperature}")
        require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(self.seed >= 0, f"seed must be at least 0, not {self.seed}")


@dataclass(frozen=True)
class Piece:
    """One generated token of prompt number `prompt`. `text` is what it completes: never half a character, so it may
    be empty; the last piece of a prompt has token None and whatever was still held back."""

    prompt: int
    token: int | None
    text: str


def sample_token(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """Draw one token from logits (V,)."""
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits.float() / config.temperature
    if config.top_k is not None and config.top_k < logits.numel():
        kept, index = logits.topk(config.top_k)  # sorted, likeliest first
    elif config.top_p < 1:
        kept, index = logits.sort(descending=True)
    else:
        kept, index = logits, None
    probs = kept.softmax(-1)
    if config.top_p < 1:
        # A token stays while the ones before it add up to less than top_p, so that the first always stays.
        probs = probs * (probs.cumsum(-1) - probs < config.top_p)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return int(drawn if index is None else index[drawn])


def room_for(prompt: Sequence[int], config: SamplingConfig, context: int) -> int:
    """How many tokens to generate. UserError where prompt and tokens pass the context and config.rolling is off."""
    wanted = config.max_new_tokens or (500 if config.rolling else max(1, context - len(prompt)))
    if len(prompt) + wanted > context and not config.rolling:
        raise UserError(
            f"the prompt's {len(prompt)} tokens and {wanted} new ones are more than the model's context of {context}: "
            "lower --max-new-tokens, shorten the prompt, or add --rolling"
        )
    return wanted


@torch.inference_mode()
def generate_tokens(
    model: GPT, prompt: Sequence[int], config: SamplingConfig, *, vocab_size: int | None = None, stop: int | None = None
) -> Iterator[int]:
    """Tokens that follow prompt, one by one, through a KV cache.

    vocab_size: the tokenizer's, where the model's table is padded beyond it. stop: a token that ends the text.
    Raises UserError as room_for does.
    """
    context, device = model.config.seq_len, model.embed.weight.device
    count = room_for(prompt, config, context)
    generator = torch.Generator(device=device).manual_seed(config.seed)
    # What the projections return under autocast is what the cache holds.
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    cache = KVCache(model.config, 1, min(context, len(prompt) + count), device=device, dtype=dtype)
    text = list(prompt)[-context:]
    pending = text
    for _ in range(count):
        if cache.length + len(pending) > cache.capacity:  # full: begin again with the newer half
            pending = text = text[-(context // 2 or 1) :]
            cache.length = 0
        idx = torch.tensor([pending], device=device)
        logits = model.logits(model.hidden(idx, cache=cache)[:, -1])[0, :vocab_size]  # (V,)
        token = sample_token(logits, config, generator)
        if token == stop:
            return
        yield token
        text.append(token)
        pending = [token]


def generate(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], config: SamplingConfig) -> Iterator[Piece]:
    """Continue each prompt in turn, yielding pieces as they come; the prompts themselves are not repeated.

    The text of prompt i is "".join(p.text for p in generate(...) if p.prompt == i). An empty prompt starts from the
    tokenizer's start token. Generation ends at the document token. The model is put into eval mode while it runs, and
    put back. Raises UserError, at once, for a prompt with a character that the tokenizer lacks or without room in the
    context.
    """
    encoded = [tokenizer.encode(prompt) or [tokenizer.start_token] for prompt in prompts]
    for tokens in encoded:
        room_for(tokens, config, model.config.seq_len)
    return _generate(model, tokenizer, encoded, config)


def _generate(model: GPT, tokenizer: Tokenizer, encoded: list[list[int]], config: SamplingConfig) -> Iterator[Piece]:
    was_training = model.training
    model.eval()
    try:
        for number, prompt in enumerate(encoded):
            decoder = StreamDecoder(tokenizer)
            stop, vocab_size = tokenizer.document_token, tokenizer.vocab_size
            for token in generate_tokens(model, prompt, config, vocab_size=vocab_size, stop=stop):
                yield Piece(number, token, decoder.push(token))
            yield Piece(number, None, decoder.flush())
    finally:
        model.train(was_training)

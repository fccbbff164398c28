"""How the next token is chosen: from logits to a filtered distribution, and from that to a draw.

A draw has no state: it is a function of the sample's seed and of the token's position in the text, so that no
neighbour in a batch, and no order of work, changes it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gpt.arguments import check_fields, checked, shown
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require
from gpt.option import option

# Independent draws at one position: the token itself; whether a proposed token is accepted; the draft's proposal.
TOKEN, ACCEPT, PROPOSE = 0, 1, 2

_GOLDEN, _FIRST, _SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LIKELIEST = 1024  # tokens among which a nucleus is looked for first


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and when to stop."""

    max_new_tokens: int | None = option(None, at_least=1)
    """Tokens to generate at most. None: as many as the context holds, or 500 when rolling."""
    temperature: float = option(0.8, at_least=0)
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = option(None, at_least=1)
    """Draw from the k likeliest tokens only, and from those as likely as the last of them."""
    top_p: float = option(1.0, above=0, at_most=1)
    """Draw from the fewest tokens whose probabilities add up to this (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float = option(0.0, at_least=0, at_most=1)
    """Leave out tokens less likely than this share of the likeliest one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = option(1.0, above=0)
    """Above 1: positive logits of tokens that the text holds already, prompt included, are divided by this and
    negative ones multiplied (CTRL, Keskar et al. 2019)."""
    logit_bias: Mapping[int | str, float] | Sequence[str] = ()
    """Numbers added to tokens' logits: {token: number}, or "TOKEN=NUMBER" strings. A token is an id, or text that is
    one token."""
    stop: Sequence[str] = ()
    """Strings that end the text; they are not shown, nor what follows them."""
    stop_tokens: Sequence[int | str] = ()
    """Tokens that end the text: ids, spellings of special tokens, or text that is one token."""
    num_samples: int = option(1, at_least=1)
    """Samples of each prompt."""
    seed: int = option(1337, at_least=0, is_wide=True)
    """Seed of the draws; the same seed and prompt give the same text."""
    rolling: bool = False
    """Past the context, forget the older half of the text and go on; otherwise that is an error."""
    batch_size: int = option(16, at_least=1)
    """Samples that are worked on at a time, at most."""
    batch_invariant: bool = False
    """Compute each row so that its bits do not depend on the others; slower, and with speculation one at a time."""
    cuda_graphs: bool = True
    """On a GPU, record the model's step once and replay it, unless batch_invariant."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of weights and activations. None: that of the model, float32, or under autocast that of autocast; with
    int8 weights bfloat16."""
    quantize: Literal["int8"] | None = None
    """int8: weights of one byte each, scaled by row."""
    speculate: Literal["ngram"] | None = None
    """ngram: propose what followed the last tokens where they stood before, and check it in one step."""
    draft_tokens: int | None = option(None, at_least=1, at_most=64)
    """Tokens proposed at a time by a draft model or by ngram. None: 4."""

    def __post_init__(self) -> None:
        # Strings are sequences of strings: a lone one would be taken letter by letter.
        for name in ("stop", "stop_tokens", "logit_bias"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else value)
        check_fields(self, SamplingConfig)  # the command line's own class knows no mapping
        require(all(self.stop), "stop must not be an empty string")
        for text in self.stop:
            require(not re.search("[\ud800-\udfff]", text), f"stop {text!a} is not text: no sample can hold it")
        if not isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(map(_parse_bias, self.logit_bias)))
        for token, number in self.logit_bias.items():
            require(abs(number) < 1e300, f"logit_bias of {shown(token)} must be below 1e300, not {shown(number)}")


def _parse_bias(word: str) -> tuple[int | str, float]:
    """ "the=-5" as a token and a number; a token of digits is an id."""
    token, equals, number = word.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    require(bool(equals and token) and math.isfinite(value), f"logit_bias must be TOKEN=NUMBER, not {shown(word)}")
    return int(token) if token.isdecimal() and len(token) < 20 else token, value


def token_id(tokenizer: Tokenizer, token: int | str, what: str) -> int:
    """The id that an option means. UserError, naming the option `what`, for none or for several."""
    if isinstance(token, int):
        require(
            0 <= token < tokenizer.vocab_size,
            f"{what}: {shown(token)} is not a token id (0 to {tokenizer.vocab_size - 1})",
        )
        return token
    try:
        ids = tokenizer.encode(token, allow_special=True)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    require(len(ids) == 1, f"{what}: {shown(token)} is {len(ids)} tokens, not one")
    return ids[0]


def bias_vector(
    tokenizer: Tokenizer, config: SamplingConfig, device: torch.device, vocab_size: int | None = None
) -> Tensor | None:
    """(V,) float64 that logit_bias adds to the logits of vocab_size tokens (None: all); None where it adds nothing."""
    if not config.logit_bias:
        return None
    bias = torch.zeros(tokenizer.vocab_size, dtype=torch.float64)
    for token, number in config.logit_bias.items():
        bias[token_id(tokenizer, token, "logit_bias")] += number
    return bias[:vocab_size].to(device)


def distribution(
    logits: Tensor, config: SamplingConfig, *, bias: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """(..., V) float64 probabilities of the next token, as config asks.

    In this order, that of transformers: repetition penalty, logit bias, temperature, top-k, top-p, min-p. Each filter
    takes the distribution that the one before left, normalised. bias (V,); seen (..., V) bool: tokens that the text
    holds already, needed where there is a repetition penalty.
    """
    logits = _adjusted(logits, config, bias, seen)
    if config.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
    # A tiny temperature must not overflow: relative to the likeliest all logits are at most 0.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(config.temperature)
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        last = logits.topk(config.top_k).values[..., -1:]
        logits.masked_fill_(logits < last, -math.inf)
    probs = logits.softmax(-1)
    if config.top_p < 1:
        probs = _nucleus(probs, config.top_p)
    if config.min_p > 0:
        probs *= probs >= config.min_p * probs.amax(-1, keepdim=True)
    return probs.div_(probs.sum(-1, keepdim=True)) if config.top_p < 1 or config.min_p > 0 else probs


def _adjusted(logits: Tensor, config: SamplingConfig, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """A float64 copy of the logits, with repetition penalty and bias."""
    logits = logits.to(torch.float64, copy=True)
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits if bias is None else logits.add_(bias)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """A token stays while the likelier ones, and equally likely ones of smaller id, add up to less than top_p."""
    V = probs.shape[-1]
    # Few tokens are enough, mostly, and a CPU sorts 50,000 for longer than a small model takes for a step.
    for count in (min(_LIKELIEST, V) if probs.device.type == "cpu" else V, V):
        ordered = probs.topk(count).values
        before = ordered.cumsum(-1) - ordered  # what the likelier ones add up to
        if count == V or bool((before[..., -1] >= top_p).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True)
    last = ordered.gather(-1, kept - 1)
    # Of tokens as likely as the last one, those of the smallest ids.
    equal = probs == last
    room = kept - (ordered > last).sum(-1, keepdim=True)
    return probs * ((probs > last) | (equal & (equal.cumsum(-1) <= room)))


def pick(
    logits: Tensor,
    uniform: Tensor | None,
    config: SamplingConfig,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """The token that uniform (...) draws from the distribution of logits (..., V); at temperature 0 the likeliest,
    for which no uniform is needed.
    """
    if config.temperature == 0:
        return _adjusted(logits, config, bias, seen).argmax(-1)
    return draw(distribution(logits, config, bias=bias, seen=seen), uniform)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative sum of probs (..., V), in the order of ids, first passes uniform (...)."""
    cumulative = probs.cumsum(-1)
    # uniform has 52 bits, so that the product is below the last sum and a token without probability is never met.
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)


def uniforms(seeds: Tensor, positions: Tensor, stream: int = TOKEN) -> Tensor:
    """Numbers in [0, 1), float64 of 52 random bits, for seeds and positions (int64 on the CPU, broadcast).

    Each is a hash of (seed, position, stream): two rounds of SplitMix64's finaliser (Steele et al. 2014).
    """
    seeds, positions = (x.numpy().astype(np.uint64) for x in (seeds, positions))
    key = _mix(seeds + _GOLDEN)
    bits = _mix(key + (positions * np.uint64(4) + np.uint64(stream)) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(12)) * 2.0**-52)


@checked
def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """The seed of sample number `sample` of prompt number `prompt`.

    That is `seed` itself for the first of both, and else 53 bits of a hash of the three; so that any sample can be had
    alone, as the only one of its prompt, with the seed that is reported for it. UserError for a negative number, or one
    that has more than 63 bits.
    """
    for name, number in (("seed", seed), ("prompt", prompt), ("sample", sample)):
        require(0 <= number < 1 << 63, f"{name} must be at least 0 and below {1 << 63}, not {shown(number)}")
    if prompt == sample == 0:
        return seed
    key = np.zeros(1, np.uint64)
    for number in (seed, prompt, sample):
        key = _mix(key + _GOLDEN + np.uint64(number))
    return int(key[0]) >> 11


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of uint64, whose products wrap."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))

"""Choose the next token: filter the distribution that the logits give, then draw from it.

A draw depends on the sample's seed and the token's position in the text alone, so that neither the batch nor the order
of work changes it.
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

# Streams of independent draws at one position: the token, the acceptance of a proposal, the draft's proposal.
TOKEN, ACCEPT, PROPOSE = 0, 1, 2

_GOLDEN, _FIRST, _SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LIKELIEST = 1024  # the nucleus is searched for among this many tokens first


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw tokens, and when to stop."""

    max_new_tokens: int | None = option(None, at_least=1)
    """Generate at most this many tokens. None: as many as fit the context, or 500 when rolling."""
    temperature: float = option(0.8, at_least=0)
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = option(None, at_least=1)
    """Draw from the k likeliest tokens only, and those as likely as the k-th."""
    top_p: float = option(1.0, above=0, at_most=1)
    """Draw from the fewest tokens whose probabilities reach this sum (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float = option(0.0, at_least=0, at_most=1)
    """Exclude tokens less likely than this share of the likeliest token's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = option(1.0, above=0)
    """Divides the positive logits of tokens in the text, prompt included, and multiplies their negative ones
    (CTRL, Keskar et al. 2019)."""
    logit_bias: Mapping[int | str, float] | Sequence[str] = ()
    """Numbers to add to tokens' logits: {token: number}, or "TOKEN=NUMBER" strings. A token is an id, or text that is
    one token."""
    stop: Sequence[str] = ()
    """Strings that end the text; they are not part of it."""
    stop_tokens: Sequence[int | str] = ()
    """Tokens that end the text: ids, spellings of special tokens, or text that is one token."""
    num_samples: int = option(1, at_least=1)
    """Samples of each prompt."""
    seed: int = option(1337, at_least=0, is_wide=True)
    """Seed of the draws. The same seed and prompt give the same text."""
    rolling: bool = False
    """Continue past the context by dropping the older half of the text. Without it, that is an error."""
    batch_size: int = option(16, at_least=1)
    """Generate at most this many samples at a time."""
    batch_invariant: bool = False
    """Make each sample's bits independent of the others in its batch. Slower; speculation then takes one at a time."""
    cuda_graphs: bool = True
    """On a GPU, record the model's step once and replay it. batch_invariant turns this off."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of weights and activations. None: bfloat16 with int8 weights, else autocast's if it is on, else the
    model's, float32."""
    quantize: Literal["int8"] | None = None
    """int8: one byte for each weight, scaled by row."""
    speculate: Literal["ngram"] | None = None
    """ngram: propose what followed the last tokens earlier in the text, and check it in one step."""
    draft_tokens: int | None = option(None, at_least=1, at_most=64)
    """Tokens that a draft model or ngram proposes at a time. None: 4."""

    def __post_init__(self) -> None:
        # A string is a sequence of strings, too: its letters.
        for name in ("stop", "stop_tokens", "logit_bias"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else value)
        check_fields(self, SamplingConfig)  # the command line's subclass has no mapping
        require(all(self.stop), "stop must not be an empty string")
        for text in self.stop:
            require(not re.search("[\ud800-\udfff]", text), f"stop {text!a} is not text: no sample can contain it")
        if not isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(map(_parse_bias, self.logit_bias)))
        for token, number in self.logit_bias.items():
            require(abs(number) < 1e300, f"logit_bias of {shown(token)} must be below 1e300, not {shown(number)}")


def _parse_bias(word: str) -> tuple[int | str, float]:
    """Split "the=-5" into a token and a number. A token of digits is an id."""
    token, equals, number = word.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    require(bool(equals and token) and math.isfinite(value), f"logit_bias must be TOKEN=NUMBER, not {shown(word)}")
    return int(token) if token.isdecimal() and len(token) < 20 else token, value


def token_id(tokenizer: Tokenizer, token: int | str, what: str) -> int:
    """Return the id of a token. Raises UserError, naming the option `what`, unless it is exactly one."""
    if isinstance(token, int):
        last = tokenizer.vocab_size - 1
        require(0 <= token <= last, f"{what}: {shown(token)} is not a token id (0 to {last})")
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
    """Make the vector (V,), float64, that logit_bias adds to the logits, or None. vocab_size: V; None: all tokens."""
    if not config.logit_bias:
        return None
    bias = torch.zeros(tokenizer.vocab_size, dtype=torch.float64)
    for token, number in config.logit_bias.items():
        bias[token_id(tokenizer, token, "logit_bias")] += number
    return bias[:vocab_size].to(device)


def distribution(
    logits: Tensor, config: SamplingConfig, *, bias: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """Compute the next token's probabilities (..., V), float64.

    The order is that of transformers: repetition penalty, logit bias, temperature, top-k, top-p, min-p. Each filter
    gets the normalised distribution of the one before. bias (V,). seen (..., V) bool: tokens in the text; required with
    a repetition penalty.
    """
    logits = _adjusted(logits, config, bias, seen)
    if config.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
    # Subtract the largest first, so that a tiny temperature cannot overflow.
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
    """Copy the logits to float64, and apply repetition penalty and bias."""
    logits = logits.to(torch.float64, copy=True)
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits if bias is None else logits.add_(bias)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep tokens while the likelier ones, and equally likely ones of smaller id, add up to less than top_p."""
    V = probs.shape[-1]
    # Few tokens are usually enough, and on a CPU sorting 50,000 takes longer than a small model's step.
    for count in (min(_LIKELIEST, V) if probs.device.type == "cpu" else V, V):
        ordered = probs.topk(count).values
        before = ordered.cumsum(-1) - ordered  # the sum of the likelier ones
        if count == V or bool((before[..., -1] >= top_p).all()):
            break
    kept = (before < top_p).sum(-1, keepdim=True)
    last = ordered.gather(-1, kept - 1)
    # Among tokens as likely as the last, keep the smallest ids.
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
    """Draw a token by uniform (...) from logits (..., V), or at temperature 0 take the likeliest without it."""
    if config.temperature == 0:
        return _adjusted(logits, config, bias, seen).argmax(-1)
    return draw(distribution(logits, config, bias=bias, seen=seen), uniform)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return the first token at which the cumulative sum of probs (..., V), in id order, passes uniform (...)."""
    cumulative = probs.cumsum(-1)
    # uniform has 52 bits, so the product is below the last sum, and no token of probability 0 is drawn.
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)


def uniforms(seeds: Tensor, positions: Tensor, stream: int = TOKEN) -> Tensor:
    """Hash seeds and positions (int64, on the CPU, broadcast) to numbers in [0, 1), float64 with 52 random bits.

    The hash of (seed, position, stream) is two rounds of SplitMix64's finaliser (Steele et al. 2014).
    """
    seeds, positions = (x.numpy().astype(np.uint64) for x in (seeds, positions))
    key = _mix(seeds + _GOLDEN)
    bits = _mix(key + (positions * np.uint64(4) + np.uint64(stream)) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(12)) * 2.0**-52)


@checked
def sample_seed(seed: int, prompt: int, sample: int) -> int:
    """Return the seed of sample number `sample` of prompt number `prompt`.

    It is `seed` itself for the first sample of the first prompt, else 53 bits of a hash of the three numbers. With it
    the sample can be generated alone. Raises UserError for numbers that are negative or longer than 63 bits.
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
    """Apply SplitMix64's finaliser to uint64, whose products wrap."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))

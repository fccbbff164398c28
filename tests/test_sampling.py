"""The sampling distribution against a slow reference in plain Python, and the draws."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data.build_tokenizer import build_tokenizer
from gpt.data.config import TokenizerConfig
from gpt.errors import UserError
from gpt.inference import sampling
from gpt.inference.sampling import (
    ACCEPT,
    PROPOSE,
    TOKEN,
    SamplingConfig,
    bias_vector,
    distribution,
    draw,
    sample_seed,
    token_id,
    uniforms,
)


def reference(logits, config: SamplingConfig, bias, seen) -> np.ndarray:
    """Compute the distribution of one row in loops over float64."""
    x = np.array(logits, np.float64)
    for i in range(len(x)):
        if seen[i]:
            x[i] = x[i] / config.repetition_penalty if x[i] > 0 else x[i] * config.repetition_penalty
        x[i] += bias[i]
    if config.temperature == 0:
        return np.eye(len(x))[int(np.argmax(x))]
    x = x / config.temperature
    kept = set(range(len(x)))
    if config.top_k is not None:
        edge = sorted(x, reverse=True)[min(config.top_k, len(x)) - 1]
        kept = {i for i in kept if x[i] >= edge}
    p = normalised(x, kept)
    total, nucleus = 0.0, set()
    for i in sorted(kept, key=lambda i: (-p[i], i)):
        if total < config.top_p:
            nucleus.add(i)
        total += p[i]
    p = normalised(x, nucleus)
    return normalised(x, {i for i in nucleus if p[i] >= config.min_p * p.max()})


def normalised(x: np.ndarray, kept: set[int]) -> np.ndarray:
    weights = np.array([math.exp(v - x.max()) if i in kept else 0.0 for i, v in enumerate(x)])
    return weights / weights.sum()


# A few quarters, so that ties are common and rounding cannot decide which tokens stay.
LOGITS = st.lists(st.integers(-12, 12).map(lambda i: i / 4), min_size=2, max_size=12)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(1, 14),
        "top_p": st.sampled_from([1e-6, 0.317, 0.613, 0.929]),
        "min_p": st.sampled_from([0.0113, 0.171, 0.523, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.3, 2.0]),
    },
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LOGITS, OPTIONS, st.sampled_from([1, 3, 1024]), st.randoms(use_true_random=False))
def test_distribution_equals_a_slow_reference(logits, options, likeliest, random):
    """Also if the nucleus is larger than the number of tokens that are searched first."""
    config = SamplingConfig(**options)
    bias = [random.choice([0.0, 0.0, 1.5, -2.0]) for _ in logits]
    seen = [random.random() < 0.4 for _ in logits]
    # A second row must not change the first.
    rows = torch.tensor([logits, logits[::-1]])
    seen_rows = torch.tensor([seen, [not s for s in seen]])
    with mock.patch.object(sampling, "_LIKELIEST", likeliest):
        result = distribution(rows, config, bias=torch.tensor(bias).double(), seen=seen_rows)[0]
    np.testing.assert_allclose(result, reference(logits, config, bias, seen), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.3, 0.5, 0.15]),
        ({"temperature": 0.5}, [0.0025 / 0.365, 0.09 / 0.365, 0.25 / 0.365, 0.0225 / 0.365]),
        ({"temperature": 0.0}, [0, 0, 1, 0]),
        ({"temperature": 1e-300}, [0, 0, 1, 0]),
        ({"top_k": 2}, [0, 0.375, 0.625, 0]),
        ({"top_k": 9}, [0.05, 0.3, 0.5, 0.15]),
        ({"top_p": 0.79}, [0, 0.375, 0.625, 0]),
        ({"top_p": 0.81}, [0, 0.3 / 0.95, 0.5 / 0.95, 0.15 / 0.95]),
        ({"top_p": 1e-6}, [0, 0, 1, 0]),
        ({"min_p": 0.29}, [0, 0.3 / 0.95, 0.5 / 0.95, 0.15 / 0.95]),
        ({"min_p": 0.31}, [0, 0.375, 0.625, 0]),
        # top_p counts shares of what top_k left: 0.5 / 0.8 already passes 0.6, though 0.5 does not.
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 1, 0]),
        # Temperature comes before the filters: the flatter distribution needs three tokens for 0.79.
        ({"temperature": 2.0, "top_p": 0.79}, None),
    ],
    ids=str,
)
def test_filters_on_four_known_probabilities(options, expected):
    probs = torch.tensor([0.05, 0.3, 0.5, 0.15], dtype=torch.float64)
    result = distribution(probs.log(), SamplingConfig(**{"temperature": 1.0, **options}))
    if expected is None:
        assert (result > 0).tolist() == [False, True, True, True]
    else:
        torch.testing.assert_close(result, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


def test_the_penalty_comes_before_the_bias():
    """2 becomes 1, then 4; with the bias first it would become 2.5. A negative logit is multiplied."""
    seen = torch.tensor([True, False, True])
    bias = torch.tensor([3.0, 0.0, 0.0]).double()
    config = SamplingConfig(temperature=1.0, repetition_penalty=2.0)
    result = distribution(torch.tensor([2.0, 0.0, -1.0]), config, bias=bias, seen=seen)
    torch.testing.assert_close(result, torch.tensor([4.0, 0.0, -2.0]).double().softmax(-1))


def test_ties_at_the_edge_of_top_k_stay_and_of_top_p_do_not():
    equal = torch.zeros(4)
    assert (distribution(equal, SamplingConfig(top_k=2)) > 0).all()
    assert (distribution(equal, SamplingConfig(top_p=0.4)) > 0).tolist() == [True, True, False, False]


# Draws.


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Compute by how many standard deviations the chi-square statistic exceeds its mean."""
    freedom = int((expected > 0).sum()) - 1
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0].double(), expected[expected > 0]
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


def grid(seeds: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(seeds).repeat_interleave(positions), torch.arange(positions).repeat(seeds)


def test_draws_are_uniform():
    """Over seeds and positions; neighbouring pairs and the three streams are independent."""
    u = uniforms(*grid(300, 300))
    assert 0 <= u.min() and u.max() < 1
    cells = torch.full((400,), len(u) / 400).double()
    assert abs(chi_square(torch.bincount((u * 400).long(), minlength=400), cells)) < 4
    square = (u.view(300, 300) * 20).long()
    for one, other in (
        (square[:, :-1], square[:, 1:]),
        (square[:-1], square[1:]),
        (square, (uniforms(*grid(300, 300), ACCEPT).view(300, 300) * 20).long()),
        (square, (uniforms(*grid(300, 300), PROPOSE).view(300, 300) * 20).long()),
    ):
        pairs = (one * 20 + other).flatten()
        expected = torch.full((400,), len(pairs) / 400).double()
        assert abs(chi_square(torch.bincount(pairs, minlength=400), expected)) < 4


def test_the_low_bits_are_uniform_too():
    low = (uniforms(*grid(300, 300)) * 2.0**52).long() % 256
    expected = torch.full((256,), len(low) / 256).double()
    assert abs(chi_square(torch.bincount(low, minlength=256), expected)) < 4


@pytest.mark.parametrize("stream", [TOKEN, ACCEPT, PROPOSE])
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 5), (1337, 100), (2**63 - 1, 2**20)])
def test_draws_equal_the_documented_hash(seed, position, stream):
    """SplitMix64's finaliser in Python's unbounded integers."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    bits = mix((mix((seed + golden) & mask) + (position * 4 + stream) * golden) & mask)
    assert uniforms(torch.tensor([seed]), torch.tensor([position]), stream).item() == (bits >> 12) / 2**52


def test_draws_follow_the_distribution():
    probs = distribution(torch.linspace(-3, 2, 40), SamplingConfig(temperature=0.9, top_k=30))
    seeds, positions = grid(200, 200)
    tokens = draw(probs.expand(len(seeds), -1), uniforms(seeds, positions))
    assert abs(chi_square(torch.bincount(tokens, minlength=40), probs * len(seeds))) < 4


def test_a_token_without_probability_is_never_drawn():
    probs = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.5]]).double()
    edge = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    assert draw(probs[:, None].expand(2, 2, 4), edge.expand(2, 2)).tolist() == [[2, 2], [1, 3]]


def test_sample_seeds_are_distinct_and_the_first_is_the_seed():
    seeds = {sample_seed(s, i, j) for s in range(10) for i in range(30) for j in range(30)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert sample_seed(7, 0, 0) == 7
    assert sample_seed(7, 1, 0) == 8859094898244408  # what was reported once must stay good


# Options.


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**30},
        {"repetition_penalty": math.inf},
        {"num_samples": 0},
        {"batch_size": 0},
        {"draft_tokens": 0},
        {"draft_tokens": 65},
        {"seed": -1},
        {"seed": 2**63},
        {"dtype": "int4"},
        {"quantize": "int4"},
        {"speculate": "magic"},
        {"stop": ("a", "")},
        {"logit_bias": ("a",)},
        {"logit_bias": ("=3",)},
        {"logit_bias": ("a=b",)},
        {"logit_bias": ("a=inf",)},
        {"logit_bias": {3: math.nan}},
    ],
    ids=str,
)
def test_bad_sampling_values_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingConfig(**bad)


def test_a_lone_string_is_one_stop_string():
    assert SamplingConfig(stop="end").stop == ("end",)


def test_logit_bias_takes_ids_and_texts_that_are_one_token():
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer="byte"), list)
    config = SamplingConfig(logit_bias=("a=-5", "98=2", "==1.5", "<|endoftext|>=3"))
    assert config.logit_bias == {"a": -5, 98: 2, "=": 1.5, "<|endoftext|>": 3}
    bias = bias_vector(tokenizer, config, torch.device("cpu"))
    assert bias.nonzero().flatten().tolist() == [ord("="), 97, 98, 256]
    assert bias[[97, 98, ord("="), 256]].tolist() == [-5, 2, 1.5, 3]
    same = bias_vector(tokenizer, SamplingConfig(logit_bias={"a": -5, 98: 2, "=": 1.5, 256: 3}), torch.device("cpu"))
    assert torch.equal(bias, same)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("ab", "'ab' is 2 tokens, not one"),
        ("", "'' is 0 tokens"),
        (300, r"300 is not a token id \(0 to 256\)"),
        (-1, "-1 is"),
    ],
)
def test_anything_but_one_token_is_refused(token, message):
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer="byte"), list)
    with pytest.raises(UserError, match=f"stop_tokens: {message}"):
        token_id(tokenizer, token, "stop_tokens")

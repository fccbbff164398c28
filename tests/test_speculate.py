"""Speculative decoding: the model's distribution, whatever proposes; the same tokens if proposals are not drawn."""

import itertools
import math

import pytest
import torch

from gpt.config import ModelConfig
from gpt.data.build_tokenizer import build_tokenizer
from gpt.data.config import TokenizerConfig
from gpt.inference.generation import generate
from gpt.inference.sampling import SamplingConfig, distribution, sample_seed
from gpt.inference.speculate import Ngrams, Proposals, judge
from gpt.model import GPT
from tests.test_generate import model_of, text_of, tokenizer_of, tokens_of
from tests.test_sampling import chi_square

PROMPTS = ["the the the ", "dog", "", "o"]
SPECULATIONS = ["draft", "good-draft", "ngram"]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer).eval()


def speculative(kind: str, tokenizer, model, prompts, *, seq_len: int = 32, **options):
    """Generate with a draft model, a slightly disturbed copy of the model, or lookup."""
    if kind == "ngram":
        return generate(model, tokenizer, prompts, SamplingConfig(speculate="ngram", **options))
    draft = model_of(tokenizer, seq_len=seq_len, n_layer=1) if kind == "draft" else disturbed(model)
    return generate(model, tokenizer, prompts, SamplingConfig(**options), draft=draft)


def disturbed(model: GPT, std: float = 0.03) -> GPT:
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in copy.parameters():
            weight += std * torch.randn(weight.shape, generator=generator)
    return copy


@pytest.mark.parametrize("kind", SPECULATIONS)
@pytest.mark.parametrize("penalty", [1.0, 1.5], ids=["", "penalty"])
def test_greedy_gives_the_same_tokens(tokenizer, model, kind, penalty):
    options = {"temperature": 0.0, "max_new_tokens": 15, "batch_size": 3, "repetition_penalty": penalty}
    plain = list(generate(model, tokenizer, PROMPTS, SamplingConfig(**options)))
    pieces = speculative(kind, tokenizer, model, PROMPTS, **options, draft_tokens=3)
    found = list(pieces)
    assert pieces.proposed > pieces.accepted > 0 or (kind == "draft" and pieces.proposed > 0)
    for i in range(len(PROMPTS)):
        assert tokens_of(found, i) == tokens_of(plain, i)
        own, other = ([p.logprob for p in ps if p.prompt == i and p.token is not None] for ps in (plain, found))
        assert own == pytest.approx(other, abs=1e-4)


def test_lookup_gives_the_same_tokens_when_sampling_too(tokenizer, model):
    """Its proposals are not drawn, so only the model's draws decide."""
    options = {"temperature": 0.5, "num_samples": 2, "max_new_tokens": 12, "stop": "z", "batch_size": 4}
    options["repetition_penalty"] = 0.4  # it likes to repeat itself
    plain = list(generate(model, tokenizer, PROMPTS, SamplingConfig(**options)))
    pieces = speculative("ngram", tokenizer, model, PROMPTS, **options)
    found = list(pieces)
    assert pieces.accepted > 0
    for i, j in itertools.product(range(len(PROMPTS)), range(2)):
        assert tokens_of(found, i, j) == tokens_of(plain, i, j)
        assert text_of([p for p in found if p.sample == j], i) == text_of([p for p in plain if p.sample == j], i)


@pytest.mark.parametrize("kind", SPECULATIONS)
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
def test_a_sample_does_not_depend_on_its_batch(tokenizer, model, kind, invariant):
    """Rows accept different numbers of tokens and end at different times; one starts with a single token."""
    options = {"temperature": 1.0, "max_new_tokens": 8, "batch_invariant": invariant, "draft_tokens": 2, "stop": "e"}
    together = list(speculative(kind, tokenizer, model, PROMPTS, batch_size=3, **options))
    for i, prompt in enumerate(PROMPTS):
        seed = sample_seed(1337, i, 0)
        alone = list(speculative(kind, tokenizer, model, [prompt], seed=seed, **options))
        assert tokens_of(together, i) == tokens_of(alone)
        if invariant:  # bit by bit
            assert [p.logprob for p in together if p.prompt == i] == [p.logprob for p in alone]


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "alibi"])
@pytest.mark.parametrize("seq_len", [7, 20])
def test_a_row_at_the_end_of_its_context_does_not_change_others(tokenizer, position, seq_len):
    """Rows with room, in model and draft, get as many proposals as alone, even beside rows without room."""
    model = model_of(tokenizer, seq_len=20, position=position, window=9).eval()
    draft = model_of(tokenizer, seq_len=seq_len, n_layer=1, position=position)
    prompts = ["the quick brown fo", "dog", "the quick bro", "o"]
    for rolling in (False, True):
        options = {"temperature": 1.0, "rolling": rolling, "max_new_tokens": 30 if rolling else None}
        config = SamplingConfig(batch_size=3, draft_tokens=4, num_samples=3, **options)
        together = list(generate(model, tokenizer, prompts, config, draft=draft))
        for i, j in itertools.product(range(len(prompts)), range(3)):
            one = SamplingConfig(draft_tokens=4, seed=sample_seed(1337, i, j), **options)
            alone = tokens_of(generate(model, tokenizer, [prompts[i]], one, draft=draft))
            assert tokens_of(together, i, j) == alone
            assert len(alone) == (30 if rolling else 20 - len(prompts[i]))


@pytest.mark.parametrize("kind", ["draft", "ngram"])
@pytest.mark.parametrize("seq_len", [5, 8])
def test_rolling_with_proposals_gives_the_same_text(tokenizer, kind, seq_len):
    """Greedy, many times past the context, with a draft whose context has another size."""
    model = model_of(tokenizer, seq_len=8).eval()
    options = {"temperature": 0.0, "max_new_tokens": 18, "rolling": True, "batch_size": 2}
    prompts = ["the quick brown fox", "do", ""]
    plain = list(generate(model, tokenizer, prompts, SamplingConfig(**options)))
    found = list(speculative(kind, tokenizer, model, prompts, seq_len=seq_len, **options))
    for i in range(len(prompts)):
        assert tokens_of(found, i) == tokens_of(plain, i)


def test_a_draft_that_is_the_model_is_always_accepted(tokenizer, model):
    pieces = generate(
        model, tokenizer, ["the"], SamplingConfig(max_new_tokens=16, temperature=1.0, draft_tokens=3), draft=model
    )
    assert len(tokens_of(pieces)) == 16
    assert pieces.accepted == pieces.proposed == 12


def test_texts_end_within_accepted_proposals(tokenizer, model):
    """A bias forces q, so every proposal is accepted; the text still ends where it must."""
    for options, text, reason in (
        ({"stop": "qqqqq"}, "", "stop"),
        ({"max_new_tokens": 6}, "qqqqqq", "length"),
    ):
        config = SamplingConfig(**{"max_new_tokens": 20, "logit_bias": {"q": 1e4}, "draft_tokens": 3, **options})
        pieces = list(generate(model, tokenizer, ["the"], config, draft=disturbed(model)))
        assert text_of(pieces) == text and pieces[-1].finish_reason == reason
        assert len(pieces) - 1 == len((reason == "stop" and "qqqqq") or text)


# The distribution.


def small(layers: int, seed: int) -> GPT:
    """Make a model of 4 characters whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(ModelConfig(n_layer=layers, n_head=2, n_embd=16, seq_len=8, vocab_size=4))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2).add_(1.0 if weight.ndim == 1 else 0.0)
    known, forward = {}, model.forward

    def remembering(idx, **options):
        """Texts are few and repeat often."""
        key = (tuple(idx.flatten().tolist()), idx.shape)
        if options or len(idx) > 1:
            return forward(idx, **options)
        if key not in known:
            known[key] = forward(idx)
        return known[key]

    model.forward = remembering
    return model.eval()


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3, "repetition_penalty": 1.4},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.1, "logit_bias": {"b": 0.5}},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_samples_follow_the_models_distribution(kind, options):
    """Compare the frequencies of all 64 texts of three tokens with their exact probabilities."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer="char"), lambda: ["abcd"], document_token=False)
    model, draft = small(2, seed=2), small(1, seed=1) if kind == "draft" else None
    count = 2000
    prompt = "abcab"
    config = SamplingConfig(
        **options, max_new_tokens=3, num_samples=count, batch_size=count, speculate=None if draft else "ngram"
    )
    pieces = generate(model, tokenizer, [prompt], config, draft=draft)
    texts: list[list[int]] = [[] for _ in range(count)]
    for piece in pieces:
        if piece.token is not None:
            texts[piece.sample].append(piece.token)
    assert 0.05 < pieces.accepted / pieces.proposed < 0.95
    codes = torch.tensor(texts) @ torch.tensor([16, 4, 1])
    expected = exact(model, tokenizer.encode(prompt), SamplingConfig(**options))
    frequent = expected * count >= 5
    groups = torch.where(frequent, frequent.cumsum(0) - 1, frequent.sum())
    pool = lambda values: torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, values.double())
    assert abs(chi_square(pool(torch.bincount(codes, minlength=64)), pool(expected * count))) < 3.5


def exact(model: GPT, prompt: list[int], config: SamplingConfig) -> torch.Tensor:
    """Compute the probabilities (64,) of the texts of three tokens by the chain rule."""
    bias = torch.tensor([0.0, config.logit_bias.get("b", 0.0), 0.0, 0.0]).double()
    result = torch.ones(64, dtype=torch.float64)
    for code, text in enumerate(itertools.product(range(4), repeat=3)):
        for t in range(3):
            before = [*prompt, *text[:t]]
            seen = torch.zeros(4, dtype=torch.bool)
            seen[before] = True
            with torch.no_grad():
                logits = model(torch.tensor([before]))[0, -1]
            result[code] *= distribution(logits, config, bias=bias, seen=seen)[text[t]]
    assert math.isclose(float(result.sum()), 1)
    return result


def test_judge_keeps_the_distribution_for_any_proposer():
    """Over many seeds the first token follows p though q proposed it; so do rows without proposals."""
    p = torch.tensor([0.5, 0.2, 0.3, 0.0]).double()
    q = torch.tensor([0.1, 0.6, 0.2, 0.1]).double()
    n = 40_000
    proposed = torch.multinomial(q, n, replacement=True, generator=torch.Generator().manual_seed(0)).view(n, 1)
    lengths = (torch.arange(n) % 4 > 0).long()
    proposals = Proposals(proposed, lengths, q.expand(n, 1, 4))
    positions = torch.tensor([[3, 4]]).expand(n, 2)
    tokens, counts = judge(p.expand(n, 2, 4), proposals, torch.arange(n).unsqueeze(1), positions)
    for rows in (lengths == 0, lengths == 1):
        first = torch.bincount(tokens[rows, 0], minlength=4)
        assert abs(chi_square(first, p * int(rows.sum()))) < 4
    # The acceptance rate is the overlap of p and q: the sum of min(p, q), 0.5.
    assert (counts[lengths == 1] == 2).double().mean() == pytest.approx(0.5, abs=0.01)
    assert (counts[lengths == 0] == 1).all()
    second = torch.bincount(tokens[counts == 2, 1], minlength=4)
    assert abs(chi_square(second, p * int((counts == 2).sum()))) < 4


def test_ngrams_find_what_followed_the_longest_match():
    lookup = Ngrams()
    assert lookup.propose([1, 2, 3, 4], 2) == []
    assert lookup.propose([1, 2, 3, 4, 2, 3], 2) == [4, 2]
    assert lookup.propose([1, 2, 3, 4, 2, 3, 9, 2, 3], 1) == [9]  # the latest of two
    assert lookup.propose([1, 2, 3, 4, 2, 3, 9, 2, 3, 4, 1, 2, 3], 3) == [4, 2, 3]  # the longer match, though older
    assert lookup.propose([5], 3) == []


def test_a_refusal_draws_from_the_model_if_proposals_cover_its_distribution():
    """q covers p everywhere, as rounding may cause; here by so much that half of the proposals are refused."""
    n, p, q = 400, torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.5])
    proposals = Proposals(torch.ones(n, 1, dtype=torch.int64), torch.ones(n, dtype=torch.int64), q.expand(n, 1, 2))
    positions = torch.tensor([[3, 4]]).expand(n, 2)
    tokens, counts = judge(p.expand(n, 2, 2), proposals, torch.arange(n).unsqueeze(1), positions)
    drawn = torch.bincount(tokens[counts == 1, 0], minlength=2)
    assert abs(chi_square(drawn, p / p.sum() * int((counts == 1).sum()))) < 4

"""Batches of samples: each is independent of the others; log-probabilities and finish reasons are right."""

import math
import sys
from unittest import mock

import pytest
import torch

from gpt.errors import UserError
from gpt.inference.decoder import Decoder
from gpt.inference.generation import generate
from gpt.inference.sampling import SamplingConfig, sample_seed
from tests.test_generate import model_of, text_of, tokenizer_of, tokens_of

generate_module = sys.modules["gpt.inference.generation"]
PROMPTS = ["the ", "dog", "", "the quick brown", "o", "the "]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer).eval()


def reasons(pieces) -> dict[tuple[int, int], str]:
    return {(p.prompt, p.sample): p.finish_reason for p in pieces if p.finish_reason}


ALONE = {"temperature": 1.0, "max_new_tokens": 9, "stop": ("a", "e"), "batch_invariant": True}


@pytest.fixture(scope="module")
def alone(tokenizer, model) -> dict[tuple[int, int], list[int]]:
    """The tokens of three samples of each prompt, each generated alone."""
    seeds = {(i, j): sample_seed(1337, i, j) for i in range(len(PROMPTS)) for j in range(3)}
    run = lambda i, seed: generate(model, tokenizer, [PROMPTS[i]], SamplingConfig(seed=seed, **ALONE))
    return {(i, j): tokens_of(run(i, seed)) for (i, j), seed in seeds.items()}


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_each_sample_is_independent_of_its_batch(tokenizer, model, alone, batch_size):
    """Rows of other lengths, rows that stop early and rows that join later change no token."""
    config = SamplingConfig(num_samples=3, batch_size=batch_size, **ALONE)
    together = list(generate(model, tokenizer, PROMPTS, config))
    assert {key: tokens_of(together, *key) for key in alone} == alone
    assert len({len(tokens) for tokens in alone.values()}) > 3


def test_samples_of_a_prompt_differ_and_repeat(tokenizer, model):
    config = SamplingConfig(num_samples=8, max_new_tokens=10, temperature=1.0)
    first, second = (list(generate(model, tokenizer, ["the "], config)) for _ in range(2))
    assert first == second
    assert len({tuple(tokens_of(first, 0, j)) for j in range(8)}) == 8


@pytest.mark.parametrize("draft", [False, True], ids=["", "draft"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {"max_new_tokens": 3}),
        ({"window": 4, "seq_len": 150}, {"max_new_tokens": 100}),
        ({"window": 4, "seq_len": 500}, {"max_new_tokens": 400}),
        ({"window": 4, "seq_len": 150, "n_layer": 2, "window_pattern": "LS"}, {"max_new_tokens": 100}),
        ({}, {"max_new_tokens": 40, "rolling": True}),
        ({"seq_len": 6}, {"max_new_tokens": 3, "rolling": True}),
    ],
    ids=["plain", "window", "window-that-slides", "pattern", "rolling", "rolling-longer-than-the-context"],
)
def test_a_prompt_is_read_once_for_all_its_samples(tokenizer, monkeypatch, shape, options, draft):
    """Also for samples that begin after others end, for an equal prompt that follows, and by a draft."""
    model = model_of(tokenizer, **({"n_layer": 1} | shape)).eval()
    prompt, context = "the quick", model.config.seq_len
    read, prefill = [], Decoder.prefill

    def noting(self, row, tokens):
        read.append(tokenizer.decode(tokens))
        return prefill(self, row, tokens)

    monkeypatch.setattr(Decoder, "prefill", noting)
    config = SamplingConfig(num_samples=5, batch_size=2, temperature=1.0, **options)
    pieces = generate(model, tokenizer, [prompt, prompt, "dog"], config, draft=model if draft else None)
    assert len(reasons(pieces)) == 15
    seen = prompt[-context:]
    expected = [seen[:-1], seen[:-2], "do", "d"] if draft else [seen[:-1], "do"]
    assert [text for text in read if text in (prompt, *expected)] == expected
    if not config.rolling and not draft:
        assert read == expected


def test_a_prompt_is_kept_no_longer_than_needed(tokenizer, model):
    """The copy of its row is dropped when its last sample begins; a single sample needs none."""
    kept = []
    config = SamplingConfig(num_samples=3, batch_size=1, max_new_tokens=2)
    drawer_of = generate_module._Drawer

    class Noting(drawer_of):
        def begin(self, row, jobs):
            sample = super().begin(row, jobs)
            kept.append(self.reader._kept is not None)
            return sample

    with mock.patch.object(generate_module, "_Drawer", Noting):
        list(generate(model, tokenizer, ["the ", "dog"], config))
    assert kept == [True, True, False] * 2


def test_the_batch_shrinks_as_rows_end_and_never_passes_its_size(tokenizer, model, monkeypatch):
    rows = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, tokens: (rows.append(len(tokens)), step(self, tokens))[1])
    config = SamplingConfig(batch_size=3, temperature=1.0, stop="e", seed=2)
    list(generate(model, tokenizer, PROMPTS, config))
    assert rows[0] == max(rows) == 3
    assert rows == sorted(rows, reverse=True) and rows[-1] == 1


def test_logprobs_are_the_models_own(tokenizer, model):
    """Natural logs, before bias, temperature, penalty and filters."""
    config = SamplingConfig(
        temperature=2.0, top_k=5, repetition_penalty=2.0, logit_bias={0: 1.0}, max_new_tokens=8, num_samples=2
    )
    pieces = list(generate(model, tokenizer, ["the ", "dog"], config))
    for i, prompt in enumerate(["the ", "dog"]):
        own = [p for p in pieces if (p.prompt, p.sample) == (i, 1) and p.token is not None]
        text = tokenizer.encode(prompt) + [p.token for p in own]
        with torch.no_grad():
            expected = model(torch.tensor([text])).double().log_softmax(-1)[0]
        begin = len(tokenizer.encode(prompt))
        for at, piece in enumerate(own, start=begin):
            assert piece.logprob == pytest.approx(float(expected[at - 1, piece.token]), abs=2e-5)


def test_the_penalty_counts_prompt_and_text(tokenizer, model):
    config = SamplingConfig(temperature=0.0, repetition_penalty=3.0, max_new_tokens=15)
    tokens = tokens_of(generate(model, tokenizer, ["the quick"], config))
    text = tokenizer.encode("the quick")
    for token in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([text]))[0, -1].tolist()
        penalised = [x if i not in text else x / 3 if x > 0 else x * 3 for i, x in enumerate(logits)]
        assert token == penalised.index(max(penalised))
        text.append(token)
    plain = SamplingConfig(temperature=0.0, max_new_tokens=15)
    assert tokens != tokens_of(generate(model, tokenizer, ["the quick"], plain))


def test_a_bias_forces_and_forbids(tokenizer, model):
    forced = SamplingConfig(logit_bias={"q": 1e4}, max_new_tokens=4)
    assert text_of(list(generate(model, tokenizer, ["the"], forced))) == "qqqq"
    letters = dict.fromkeys("abcdefghijklmnopqrstuvwxyz ", -10000.0)
    forbidden = SamplingConfig(logit_bias=letters, max_new_tokens=20)
    assert not set(text_of(list(generate(model, tokenizer, ["the"], forbidden)))) & set(letters)


# Ends.


def test_finish_reasons(tokenizer, model):
    """Length, a stop string, a stop token by text and by id, and the document token."""
    config = SamplingConfig(logit_bias={"q": 1e4}, max_new_tokens=4)
    for options, reason, text in (
        ({}, "length", "qqqq"),
        ({"stop": "qqq"}, "stop", ""),
        ({"stop": ("x", "uqq")}, "length", "qqqq"),
        ({"stop_tokens": ("q",)}, "stop", ""),
        ({"stop_tokens": tuple(tokenizer.encode("q"))}, "stop", ""),
    ):
        pieces = list(generate(model, tokenizer, ["the"], SamplingConfig(**{**vars(config), **options})))
        assert reasons(pieces) == {(0, 0): reason}
        assert text_of(pieces) == text
        assert [p.finish_reason is None for p in pieces] == [True] * (len(pieces) - 1) + [False]
    byte = tokenizer_of("byte")
    config = SamplingConfig(logit_bias={"<|endoftext|>": 1e4}, max_new_tokens=4)
    assert reasons(generate(model_of(byte), byte, ["a"], config)) == {(0, 0): "end"}


def test_a_stop_string_is_cut_out_wherever_tokens_end(tokenizer, model):
    """Across tokens: the text before it is shown, and nothing of it or after it."""
    whole = text_of(list(generate(model, tokenizer, ["the"], SamplingConfig(max_new_tokens=25, temperature=1.0))))
    for stop in (whole[5:8], whole[10:11], whole[:2]):
        config = SamplingConfig(max_new_tokens=25, temperature=1.0, stop=stop)
        pieces = list(generate(model, tokenizer, ["the"], config))
        assert text_of(pieces) == whole[: whole.index(stop)]
        assert reasons(pieces) == {(0, 0): "stop"}
        assert len(pieces) - 1 == whole.index(stop) + len(stop)


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(tokenizer, model):
    config = SamplingConfig(logit_bias={"q": 1e4}, max_new_tokens=4, stop="qqqqq")
    pieces = list(generate(model, tokenizer, ["the"], config))
    assert [p.text for p in pieces] == ["", "", "", "", "qqqq"]


def test_stop_ends_running_samples_and_begins_no_others(tokenizer, model):
    config = SamplingConfig(batch_size=2, max_new_tokens=10, stop="!", logit_bias={"q": 1e4})
    pieces = generate(model, tokenizer, ["the", "dog", "fox"], config)
    first = [next(pieces) for _ in range(6)]
    pieces.stop()
    rest = list(pieces)
    assert reasons(rest) == {(0, 0): "interrupted", (1, 0): "interrupted"}
    assert text_of(first + rest, 0) == "qqq"


def test_without_prompts_there_are_no_pieces(tokenizer, model):
    assert list(generate(model, tokenizer, [], SamplingConfig())) == []


def test_errors_are_raised_at_once_and_name_the_prompt(tokenizer, model):
    for prompts, options, message in (
        (["the", "Q"], {}, r"^prompt 1: .*'Q'"),
        (["the", "t" * 40], {}, r"^prompt 1: .*40 tokens and 1 new"),
        (["t" * 40], {}, r"^the prompt's 40 tokens"),
        (["the"], {"stop_tokens": ("the",)}, r"stop_tokens: 'the' is 3 tokens"),
        (["the"], {"stop_tokens": ("<|endoftext|>",)}, r"stop_tokens: "),
        (["the"], {"logit_bias": {999: 1.0}}, r"logit_bias: 999 is not a token id"),
        (["the"], {"draft_tokens": 3}, r"draft_tokens needs a draft model or speculate"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, tokenizer, prompts, SamplingConfig(**options))
    with pytest.raises(UserError, match="contradict"):
        generate(model, tokenizer, ["the"], SamplingConfig(speculate="ngram"), draft=model)


def test_logits_that_are_not_finite_are_an_error(tokenizer):
    broken = model_of(tokenizer)
    broken.head.weight.data[3, 3] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        list(generate(broken, tokenizer, ["the"], SamplingConfig()))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_roll_independently(tokenizer, batch_size):
    """Rows outgrow a context of 8 at different times, one in its prompt, and continue as they would alone."""
    model = model_of(tokenizer, seq_len=8).eval()
    prompts = ["the quick brown fox", "do", "", "the qui"]
    config = SamplingConfig(max_new_tokens=21, rolling=True, temperature=0.0, batch_size=batch_size)
    pieces = list(generate(model, tokenizer, prompts, config))
    for i, prompt in enumerate(prompts):
        text = (tokenizer.encode(prompt) or [tokenizer.start_token])[-8:]
        for token in tokens_of(pieces, i):
            with torch.no_grad():
                assert token == int(model(torch.tensor([text]))[0, -1].argmax())
            text = [*text, token] if len(text) < 8 else [*text[-3:], token]
        assert len(tokens_of(pieces, i)) == 21


@pytest.mark.parametrize("count", [390, 420], ids=["within", "rolling"])
@pytest.mark.parametrize("blocks", [{"n_layer": 1}, {"n_layer": 2, "window_pattern": "LS"}], ids=["all", "some"])
def test_a_row_whose_window_has_moved_can_be_reused(tokenizer, count, blocks):
    """Rows of 400 tokens, of which a window of 4 keeps 330 at most, pass to other samples, and roll."""
    model = model_of(tokenizer, seq_len=400, window=4, **blocks)
    config = SamplingConfig(max_new_tokens=count, num_samples=2, batch_size=1, rolling=True, temperature=1.0)
    pieces = list(generate(model, tokenizer, ["the "], config))
    for j in range(2):
        alone = SamplingConfig(max_new_tokens=count, rolling=True, temperature=1.0, seed=sample_seed(1337, 0, j))
        assert len(tokens_of(pieces, 0, j)) == count
        assert tokens_of(pieces, 0, j) == tokens_of(generate(model, tokenizer, ["the "], alone))


def test_greedy_tokens_under_a_pattern_are_the_uncached_models(tokenizer):
    """Past the point at which the windows' buffer slides. Where tokens differ, the model's logits nearly tie."""
    model = model_of(tokenizer, seq_len=400, window=4, n_layer=3, window_pattern="SSL").eval()
    tokens = tokens_of(generate(model, tokenizer, ["the "], SamplingConfig(max_new_tokens=380, temperature=0.0)))
    text = torch.tensor([tokenizer.encode("the ") + tokens])
    with torch.no_grad():
        logits = model(text)[0, 3:-1]
    assert len(tokens) == 380
    assert (logits.max(-1).values - logits.gather(1, text[0, 4:, None])[:, 0]).max() < 1e-5


def test_dtype_and_quantize_reach_the_decoder(tokenizer, model):
    """Log-probabilities change by each one's rounding error only."""
    logprob = []
    for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantize": "int8", "dtype": "float32"}):
        config = SamplingConfig(max_new_tokens=1, logit_bias={"q": 1e4}, **options)
        logprob.append(next(generate(model, tokenizer, ["the "], config)).logprob)
    exact, *others = logprob
    for other in others:
        assert 0 < abs(other - exact) < 1.0

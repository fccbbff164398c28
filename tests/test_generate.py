"""Generation: draws, the cache, the end of the context, and streaming."""

import pytest
import torch

from gpt.config import PRESETS, ModelConfig
from gpt.data.build_tokenizer import build_tokenizer
from gpt.data.config import TokenizerConfig
from gpt.data.tokenizers import load_tokenizer
from gpt.errors import UserError
from gpt.inference.generation import Piece, generate
from gpt.inference.sampling import SamplingConfig, sample_seed
from gpt.model import GPT

TEXT = "the quick brown fox\njumps over the lazy dog: é漢🙂"


def tokenizer_of(kind: str = "char", text: str = TEXT, document_token: bool = False):
    return build_tokenizer(TokenizerConfig(tokenizer=kind), lambda: [text], document_token=document_token)


def model_of(tokenizer, seq_len: int = 32, **options) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": seq_len, "vocab_size": tokenizer.vocab_size}
    config = ModelConfig(**{**sizes, **options})
    model = GPT(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3).add_(1.0 if weight.ndim == 1 else 0.0)
    return model


def text_of(pieces: list[Piece], prompt: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.prompt == prompt)


def tokens_of(pieces: list[Piece], prompt: int = 0, sample: int = 0) -> list[int]:
    return [p.token for p in pieces if (p.prompt, p.sample) == (prompt, sample) and p.token is not None]


@pytest.mark.parametrize("preset", PRESETS)
def test_cached_greedy_tokens_equal_the_uncached_ones(preset):
    tokenizer = tokenizer_of()
    model = model_of(tokenizer, **PRESETS[preset]).eval()
    prompt = tokenizer.encode("the quick")
    tokens = tokens_of(generate(model, tokenizer, ["the quick"], SamplingConfig(temperature=0.0)))
    assert len(prompt) + len(tokens) == 32
    text = list(prompt)
    for token in tokens:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(token)


def test_tokens_are_drawn_after_the_softcap():
    """A bound near 0 makes all logits equal."""
    tokenizer = tokenizer_of()
    capped, uniform = model_of(tokenizer, logit_softcap=1e-9).eval(), model_of(tokenizer).eval()
    with torch.no_grad():
        capped.head.weight.normal_()
        uniform.head.weight.zero_()
    one, other = ([p.token for p in generate(m, tokenizer, ["th"], SamplingConfig())] for m in (capped, uniform))
    assert one == other


def test_same_seed_same_text_and_the_global_generator_is_left_alone():
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    state = torch.get_rng_state()
    texts = [
        text_of(list(generate(model, tokenizer, ["the"], SamplingConfig(temperature=1.0, seed=seed))))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.get_rng_state())


def test_each_of_several_prompts_gets_the_text_it_gets_alone():
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    together = list(generate(model, tokenizer, ["the ", "dog", ""], SamplingConfig(max_new_tokens=12)))
    for i, prompt in enumerate(["the ", "dog", ""]):
        alone = SamplingConfig(max_new_tokens=12, seed=sample_seed(1337, i, 0))
        assert text_of(together, i) == text_of(list(generate(model, tokenizer, [prompt], alone)))


def test_a_lone_string_and_models_with_too_few_tokens_are_refused():
    """A string is a sequence of letters, too."""
    tokenizer = tokenizer_of()
    model, small = model_of(tokenizer), model_of(tokenizer, vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(UserError, match=r"prompts must be a list of texts, not .the.: for a single text"):
        generate(model, tokenizer, "the")
    with pytest.raises(UserError, match=f"the tokenizer of this model has the token {small.config.vocab_size}"):
        generate(small, tokenizer, ["the"])
    with pytest.raises(UserError, match=f"the tokenizer of this draft has the token {small.config.vocab_size}"):
        generate(model, tokenizer, ["the"], draft=small)


def test_passing_the_context_is_an_error_unless_rolling():
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    with pytest.raises(UserError, match=r"3 tokens and 30 new ones are more than the model's context of 32.*--rolling"):
        generate(model, tokenizer, ["the"], SamplingConfig(max_new_tokens=30))
    with pytest.raises(UserError, match="40 tokens and 1 new"):
        generate(model, tokenizer, ["t" * 40], SamplingConfig())
    pieces = list(generate(model, tokenizer, ["t" * 40], SamplingConfig(max_new_tokens=100, rolling=True)))
    assert sum(piece.token is not None for piece in pieces) == 100


def test_rolling_continues_from_the_newer_half():
    """At the end of a context of 8 the next token depends on the last 4 alone."""
    tokenizer = tokenizer_of()
    model = model_of(tokenizer, seq_len=8).eval()
    prompt = tokenizer.encode("the quic")
    config = SamplingConfig(max_new_tokens=2, temperature=0.0, rolling=True)
    first, second = tokens_of(generate(model, tokenizer, ["the quic"], config))
    assert first == int(model(torch.tensor([prompt]))[0, -1].argmax())
    assert second == int(model(torch.tensor([[*prompt[-3:], first]]))[0, -1].argmax())


def test_padding_of_the_vocabulary_is_never_drawn():
    tokenizer = tokenizer_of()
    model = model_of(tokenizer, vocab_size=tokenizer.vocab_size + 500)
    pieces = list(generate(model, tokenizer, [""], SamplingConfig(temperature=5.0, max_new_tokens=31)))
    assert all(piece.token is None or piece.token < tokenizer.vocab_size for piece in pieces)


def test_streamed_text_is_never_half_a_character():
    """The pieces of a byte model's random output join to the decoding of all tokens."""
    tokenizer = tokenizer_of("byte")
    model = model_of(tokenizer, seq_len=64)
    pieces = list(generate(model, tokenizer, ["é"], SamplingConfig(temperature=3.0, max_new_tokens=60)))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    assert text_of(pieces) == tokenizer.decode_bytes(tokens).decode("utf-8", "replace")


def test_generation_ends_at_the_document_token():
    tokenizer = tokenizer_of("byte")
    model = model_of(tokenizer)
    with torch.no_grad():
        model.head.weight.zero_()
        model.norm.weight.zero_()  # all logits are equal: greedy takes token 0, unless the document token is lifted
    model.head.bias = torch.nn.Parameter(torch.zeros(tokenizer.vocab_size))
    assert len(list(generate(model, tokenizer, ["a"], SamplingConfig(temperature=0.0, max_new_tokens=5)))) == 6
    model.head.bias.data[tokenizer.document_token] = 1.0
    pieces = list(generate(model, tokenizer, ["a"], SamplingConfig(temperature=0.0, max_new_tokens=5)))
    assert [piece.token for piece in pieces] == [None]


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (tokenizer_of("byte"), tokenizer_of("byte").document_token),
        (tokenizer_of(document_token=True), tokenizer_of(document_token=True).document_token),
        (tokenizer_of(), tokenizer_of().encode("\n")[0]),
        (tokenizer_of(text="cab"), 2),
    ],
    ids=["byte-document", "char-document", "char-newline", "char-first"],
)
def test_an_empty_prompt_starts_like_a_document(tokenizer, start, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").start_token == start
    model, config = model_of(tokenizer).eval(), SamplingConfig(max_new_tokens=1, temperature=0.0)
    (piece, _) = generate(model, tokenizer, [""], config)
    assert piece.token == int(model(torch.tensor([[start]]))[0, 0, : tokenizer.vocab_size].argmax())


def test_an_unknown_character_is_named():
    tokenizer = tokenizer_of()
    with pytest.raises(UserError, match="Q"):
        generate(model_of(tokenizer), tokenizer, ["Quick"], SamplingConfig())


def test_training_mode_is_kept_but_dropout_is_not_applied():
    tokenizer = tokenizer_of()
    texts, sampling = [], SamplingConfig(max_new_tokens=8)
    for training in (False, True):
        model = model_of(tokenizer, dropout=0.5).train(training)
        pieces = generate(model, tokenizer, ["the"], sampling)
        texts.append([next(pieces).text, *(piece.text for piece in pieces)])
        assert model.training == training
    assert texts[0] == texts[1]

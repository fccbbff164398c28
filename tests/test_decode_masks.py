"""Generation with custom masks: each block uses its own mask on every path, or the mask is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch

from gpt.errors import UserError
from gpt.inference import attend
from gpt.inference import decoder as decode
from gpt.inference.decoder import Decoder
from gpt.inference.generation import generate
from gpt.inference.kv_cache import CHUNK
from gpt.inference.quantize import quantize_weight
from gpt.inference.sampling import SamplingConfig
from gpt.model import GPT
from kernels import masks
from kernels.masks import CAUSAL, Mask
from tests.rounding import model_deviation
from tests.test_generate import model_of, tokenizer_of

LAYOUT = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]])


def no_multiple(q, k, n):
    return (k % n != 1) | (q == k)


def long_ago(q, k, n):
    return q - k >= n


def within_window(q, k, window):
    """A predicate with the parameter name of the sliding window's, but another meaning."""
    return (q >= k) & ((q - k < window) | (k % 2 == 0))


OWN = CAUSAL & Mask(no_multiple, 4)
# The masks of the blocks in turn, and the model's options.
CASES = {
    "own": ([OWN], {}),
    "own-alibi": ([OWN], {"position": "alibi"}),
    "own-under-a-window": ([masks.sliding_window(5) & Mask(no_multiple, 4)], {"window": 5}),
    "own-named-as-the-window": ([Mask(within_window, 5)], {"window": 5}),
    "different-masks-of-one-window": ([masks.sliding_window(5), masks.sliding_window(5) & OWN], {"window": 5}),
    "windows-of-different-sizes": ([masks.sliding_window(3), masks.sliding_window(9)], {}),
    "a-window-made-wider": ([CAUSAL], {"window": 5}),
    "a-window-made-narrower": ([masks.sliding_window(3)], {"window": 5, "position": "alibi"}),
    "nothing-to-see-at-first": ([CAUSAL, CAUSAL & Mask(long_ago, 3)], {}),
    "nothing-to-see-alibi": ([CAUSAL & Mask(long_ago, 3)], {"position": "alibi"}),
    "window-and-sinks": ([CAUSAL & (masks.sliding_window(5) | masks.sink_tokens(2))], {}),
    "window-or-sinks": ([masks.sliding_window(5) | CAUSAL & masks.sink_tokens(2)], {"window": 5}),
    "strided": ([CAUSAL & (masks.sliding_window(4) | masks.strided(4))], {}),
    "dilated": ([masks.sliding_window(9) & masks.strided(3)], {"window": 9}),
    "global-tokens": ([CAUSAL & (masks.sliding_window(3) | masks.global_tokens([1, 6, 7, 20]))], {}),
    "bigbird": ([masks.bigbird(3, 2, 1, seed=0, block=4)], {}),
    "layout": ([CAUSAL & masks.block_sparse(LAYOUT, 8)], {}),
    "a-layout-not-combined": ([masks.block_sparse(torch.eye(32), 1) | OWN], {}),
    "three": ([OWN, masks.sliding_window(4), CAUSAL & masks.strided(2)], {"n_layer": 3, "window": 4}),
}
PROMPTS = ["the quick", "t", "the lazy dog: "]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of()


def masked(tokenizer, name: str, **options) -> GPT:
    """Make a model whose blocks take the case's masks in turn, each with its own ALiBi slopes."""
    each, own = CASES[name]
    model = model_of(tokenizer, **({"n_head": 4, "n_kv_head": 2} | own | options)).eval()
    put_on(model, each)
    for layer, block in enumerate(model.blocks):
        if block.attn.slopes is not None:
            block.attn.slopes = block.attn.slopes * (1 + layer)
    return model


def put_on(model: GPT, each: list[Mask]) -> None:
    for layer, block in enumerate(model.blocks):
        block.attn.mask = each[layer % len(each)]


def assert_follows_the_model(tokenizer, model: GPT, prompts, config: SamplingConfig, draft: GPT | None = None) -> None:
    """Assert that log-probabilities equal the float64 model's, and that greedy tokens are its likeliest."""
    exact = copy.deepcopy(model).double()
    pieces = list(generate(model, tokenizer, prompts, config, draft=draft))
    for i, prompt in enumerate(prompts):
        for j in range(config.num_samples):
            own = [p for p in pieces if (p.prompt, p.sample) == (i, j) and p.token is not None]
            begin = tokenizer.encode(prompt)
            text = torch.tensor([begin + [p.token for p in own]])
            with torch.no_grad():
                expected = exact(text)[0, len(begin) - 1 : -1].log_softmax(-1)  # (new, V)
            tolerance = model_deviation(exact, text)
            assert tolerance < 1e-3
            found = torch.tensor([p.logprob for p in own], dtype=torch.float64)
            chosen = expected.gather(1, text[0, len(begin) :, None])[:, 0]
            assert len(own) == config.max_new_tokens
            assert (found - chosen).abs().max() <= tolerance
            if config.temperature == 0:
                assert (expected.max(-1).values - chosen).max() <= tolerance


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_equal_the_models(tokenizer, name, prompts):
    """For one row, and for rows of different lengths."""
    config = SamplingConfig(max_new_tokens=16, temperature=0.0)
    assert_follows_the_model(tokenizer, masked(tokenizer, name), prompts, config)


@pytest.mark.parametrize("options", [{"num_samples": 2}, {"batch_invariant": True}, {"speculate": "ngram"}], ids=str)
@pytest.mark.parametrize("name", ["own-alibi", "different-masks-of-one-window", "nothing-to-see-at-first", "bigbird"])
def test_log_probabilities_by_every_way_to_sample(tokenizer, name, options):
    config = SamplingConfig(max_new_tokens=16, temperature=1.0, **options)
    assert_follows_the_model(tokenizer, masked(tokenizer, name), PROMPTS, config)


@pytest.mark.parametrize("name", ["own", "different-masks-of-one-window"])
def test_a_draft_model_uses_its_own_masks(tokenizer, name):
    """The draft is the model itself: since every greedy proposal is accepted, it uses its masks."""
    model, config = masked(tokenizer, name), SamplingConfig(max_new_tokens=16, temperature=0.0, draft_tokens=3)
    assert_follows_the_model(tokenizer, model, PROMPTS, config, draft=model)
    pieces = generate(model, tokenizer, PROMPTS[:1], config, draft=model)
    list(pieces)
    assert pieces.accepted == pieces.proposed > 8


@pytest.mark.parametrize("name", ["own-alibi", "own-named-as-the-window", "nothing-to-see-alibi", "layout"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_log_probabilities_by_attention_decode(tokenizer, name, impl, monkeypatch):
    """The path of a GPU, by plain PyTorch and by the kernel in Triton's interpreter."""
    monkeypatch.setattr(decode, "decode_impl", lambda device: impl)
    config = SamplingConfig(max_new_tokens=4 if impl == "triton" else 16, temperature=0.0)
    assert_follows_the_model(tokenizer, masked(tokenizer, name), PROMPTS, config)


def test_int8_weights_keep_masks(tokenizer):
    """The weights are multiples of their scales, so int8 is exact."""
    model = masked(tokenizer, "own-alibi")
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        weight, scale = quantize_weight(linear.weight)
        linear.weight.data = weight * scale[:, None]
    config = SamplingConfig(max_new_tokens=16, temperature=0.0, quantize="int8", dtype="float32")
    assert_follows_the_model(tokenizer, model, PROMPTS, config)


@pytest.mark.parametrize("name", ["own", "own-under-a-window", "window-and-sinks"])
def test_rolling_restarts_positions_at_0(tokenizer, name):
    """Past a context of 16, the newer half of a text is read again from position 0."""
    model = masked(tokenizer, name, seq_len=16)
    config = SamplingConfig(max_new_tokens=40, temperature=0.0, rolling=True)
    pieces = list(generate(model, tokenizer, PROMPTS, config))
    exact = copy.deepcopy(model).double()
    for i, prompt in enumerate(PROMPTS):
        text = tokenizer.encode(prompt)
        for piece in (p for p in pieces if p.prompt == i and p.token is not None):
            with torch.no_grad():
                expected = exact(torch.tensor([text]))[0, -1].log_softmax(-1)
            assert abs(piece.logprob - expected[piece.token]) <= model_deviation(exact, torch.tensor([text]), 1)
            text = [*text, piece.token] if len(text) < 16 else [*text[-7:], piece.token]


def test_a_mask_may_change_between_two_generations(tokenizer):
    """Of one block, of all, and back."""
    model, config = masked(tokenizer, "own"), SamplingConfig(max_new_tokens=8, temperature=0.0)
    for each in ([OWN, CAUSAL], CASES["strided"][0], [masks.sliding_window(2), OWN], [CAUSAL]):
        put_on(model, each)
        assert_follows_the_model(tokenizer, model, PROMPTS, config)


def test_only_a_sliding_window_drops_keys(tokenizer):
    """Compare logits of rows far longer than a window's buffer. Other masks keep all keys, whatever their bands."""
    own = masks.sliding_window(6) & Mask(no_multiple, 4)
    model = masked(tokenizer, "own", n_layer=4, seq_len=CHUNK + 300)
    put_on(model, [masks.sliding_window(6), own, masks.sliding_window(6), OWN])
    text = torch.randint(tokenizer.vocab_size, (1, CHUNK + 280), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, 1, CHUNK + 300)
    assert [(len(c.kv), c.kv.shape[4] >= CHUNK + 300) for c in decoder._caches] == [
        (2, False),
        (1, True),
        (1, True),
    ]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        expected = exact(text)[0].log_softmax(-1)
    decoder.prefill(0, text[0, : CHUNK + 200].tolist())
    found = torch.cat([decoder.step(text[:, [n]])[0] for n in range(CHUNK + 200, CHUNK + 280)])
    assert decoder._caches[0].starts[0] > 0
    difference = found.double().log_softmax(-1) - expected[CHUNK + 200 :]
    assert difference.abs().max() <= model_deviation(exact, text)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.FULL, "block 1: the mask lets the token at position 0 see the later one at 1: .* masks.CAUSAL & mask"),
        (CAUSAL | masks.sink_tokens(3), "position 0 see the later one at 1"),
        (masks.sink_tokens(3), "position 0 see the later one at 1"),
        (CAUSAL | Mask(no_multiple, 4), "position 0 see the later one at 2"),
        (masks.block_sparse(torch.ones(8, 8), 4), "position 0 see the later one at 1"),
        (CAUSAL & masks.prefix(torch.tensor([3], dtype=torch.int32)), "value for each row of a batch"),
        (None, "attn.mask must be a kernels.masks.Mask, not None"),
        ("causal", "attn.mask must be a kernels.masks.Mask, not 'causal'"),
    ],
    ids=["full", "prefix", "sinks", "own", "layout", "row-tensor", "none", "text"],
)
def test_masks_that_a_cache_cannot_serve_are_refused(tokenizer, mask, message):
    """At once, for the model and the draft, and by a decoder as a ValueError."""
    model, plain = model_of(tokenizer).eval(), model_of(tokenizer).eval()
    model.blocks[1].attn.mask = mask
    with pytest.raises(UserError, match=message):
        generate(model, tokenizer, ["the"])
    with pytest.raises(UserError, match=message):
        generate(plain, tokenizer, ["the"], draft=model)
    with pytest.raises(ValueError, match=message):
        Decoder(model, 1, 8)


@pytest.mark.parametrize("piece", [10, 70])
def test_masks_are_checked_up_to_the_texts_length(tokenizer, monkeypatch, piece):
    """A mask that looks ahead from position 20 on is accepted for 20 tokens. The check runs in pieces."""
    monkeypatch.setattr(attend, "PIECE", piece)
    model = model_of(tokenizer, seq_len=64).eval()
    model.blocks[0].attn.mask = CAUSAL | Mask(late, 20)
    list(generate(model, tokenizer, ["the"], SamplingConfig(max_new_tokens=18)))
    for count in (19, 40):
        with pytest.raises(UserError, match="position 20 see the later one at 21"):
            generate(model, tokenizer, ["the"], SamplingConfig(max_new_tokens=count))


def test_a_mask_with_causal_bands_needs_no_check(tokenizer):
    """A check at this length would take days."""
    model = model_of(tokenizer).eval()
    put_on(model, [CAUSAL, masks.sliding_window(5) | CAUSAL & masks.strided(3)])
    attend.check_masks(model, 1 << 28)


def test_a_query_that_sees_no_key_gets_zeros_from_any_attention(tokenizer, monkeypatch):
    """torch does not define that result: the replacement here gives NaN, as a plain softmax does."""

    def plain(q, k, v, attn_mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v

    monkeypatch.setattr(attend, "F", SimpleNamespace(scaled_dot_product_attention=plain))
    config = SamplingConfig(max_new_tokens=16, temperature=0.0)
    for name in ("nothing-to-see-at-first", "nothing-to-see-alibi"):
        assert_follows_the_model(tokenizer, masked(tokenizer, name), PROMPTS, config)


def late(q, k, n):
    return q >= n

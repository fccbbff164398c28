"""The decoder against the uncached model: options, rows of any lengths, copies, cuts, windows, batch invariance."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gpt.config import PRESETS, ModelConfig
from gpt.inference import attend
from gpt.inference import decoder as decode
from gpt.inference.decoder import Decoder
from gpt.inference.kv_cache import CHUNK, SLACK
from gpt.inference.prepare import prepared
from gpt.model import GPT

VOCAB = 61
OPTIONS = {
    **PRESETS,
    "alibi-grouped": {"position": "alibi", "n_kv_head": 2, "norm": "layernorm"},
    "none-relu2": {"position": "none", "activation": "relu2", "qk_norm": False, "n_kv_head": 1},
    "gelu-odd": {"activation": "gelu", "head_dim": 10, "n_embd": 36, "mlp_dim": 50, "bias": True},
    "window": {"window": 7, "n_kv_head": 2},
    "window-alibi-post": {"window": 5, "position": "alibi", "norm_order": "post", "qk_norm": False},
    "window-pattern": {"n_layer": 3, "window": 5, "window_pattern": "SSL", "n_kv_head": 2},
    "value-embeds": {"n_layer": 3, "value_embeds": 1, "n_kv_head": 2},
    "value-embeds-bias": {"value_embeds": 1, "bias": True, "head_dim": 8, "n_head": 12},
    "sinusoidal-tied": {"position": "sinusoidal", "tied_embeddings": True, "activation": "relu"},
}


def model_of(seq_len: int = 48, **options) -> GPT:
    """Make a small model in which every weight has an effect: none is 0, and no norm's weight is 1."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": VOCAB, "seq_len": seq_len}
    model = GPT(ModelConfig(**(shape | options))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.25).add_(1.0 if weight.ndim == 1 else 0.0)
    return model


def text_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def uncached(model: GPT, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Assert that logits differ by the tolerance at most, relative to the largest."""
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture(params=OPTIONS)
def model(request) -> GPT:
    return model_of(**OPTIONS[request.param])


@pytest.mark.parametrize("lengths", [(4,), (4, 4, 4), (1, 9, 4, 17)], ids=str)
@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_logits_equal_the_uncached_models(model, lengths, invariant):
    follow_the_model(model, lengths, invariant)


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_logits_by_attention_decode_equal_the_uncached_models(model, invariant, monkeypatch):
    """Every option, with the function that calls the kernel on a GPU."""
    monkeypatch.setattr(decode, "decode_impl", lambda device: "torch")
    follow_the_model(model, (1, 9, 17), invariant)


@pytest.mark.parametrize("name", ["modern", "window-alibi-post"])
def test_logits_by_the_kernel_equal_the_uncached_models(name, monkeypatch):
    """The kernel of a GPU, in Triton's interpreter."""
    monkeypatch.setattr(decode, "decode_impl", lambda device: "triton")
    follow_the_model(model_of(n_layer=1, **OPTIONS[name]), (1, 9), False, steps=(1, 3))


def follow_the_model(model: GPT, lengths: tuple[int, ...], invariant: bool, steps=(1, 1, 5, 1, 1)) -> None:
    """Compare after a prompt, single tokens, several tokens at once, and single tokens again."""
    decoder = Decoder(model, len(lengths), 48, batch_invariant=invariant)
    texts = [text_of(n + 9, seed) for seed, n in enumerate(lengths)]
    for row, n in enumerate(lengths):
        assert_near(decoder.prefill(row, texts[row][:n]), uncached(model, texts[row][:n])[-1])
    done = list(lengths)
    for T in steps:
        new = torch.tensor([text[n : n + T] for text, n in zip(texts, done)])
        logits = decoder.step(new)
        done = [n + T for n in done]
        assert decoder.lengths == done
        for text, n, ours in zip(texts, done, logits):
            assert_near(ours, uncached(model, text[:n])[-T:])


@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_restore_truncate_and_keep(model, invariant):
    decoder = Decoder(model, 4, 48, batch_invariant=invariant)
    first, last = text_of(12, 1), text_of(20, 2)
    decoder.prefill(0, first)
    decoder.prefill(3, last)
    for row in (0, 1, 3):
        decoder.restore(row, decoder.snapshot(0))
    decoder.prefill(1, [5, 6])
    decoder.truncate(3, 8)
    decoder.keep([3, 1, 0])
    held = [first[:8], [*first, 5, 6], first]
    assert decoder.lengths == [8, 14, 12]
    for _ in range(2):
        logits = decoder.step(torch.tensor([[1], [2], [3]]))
        for row in range(3):
            held[row] = [*held[row], row + 1]
            assert_near(logits[row, 0], uncached(model, held[row])[-1])


def test_a_row_may_be_empty_and_hold_one_token_after_a_cut():
    model = model_of()
    decoder = Decoder(model, 2, 48)
    decoder.prefill(0, text_of(30))
    decoder.truncate(0, 0)
    assert decoder.lengths == [0, 0]
    logits = decoder.step(torch.tensor([[7], [9]]))
    assert_near(logits[:, 0], torch.stack([uncached(model, [7])[0], uncached(model, [9])[0]]))


def test_nan_of_a_truncated_row_does_not_reach_other_rows():
    """Not even as 0 * NaN, though a shorter row has masked keys up to the longest row's length."""
    model = model_of()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    decoder = Decoder(model, 2, 48)
    decoder.prefill(0, [1, 2])
    decoder.prefill(1, [1, 2, 4, 4, 3, 3])
    decoder.restore(1, decoder.snapshot(0))
    decoder.prefill(0, [5, 6, 7, 8])
    decoder.truncate(1, 1)
    assert_near(decoder.step(torch.tensor([[1], [2]]))[1, 0], uncached(model, [1, 2])[-1])


def test_long_prompts_go_in_chunks():
    model = model_of(seq_len=2 * CHUNK + 30, window=40)
    text = text_of(2 * CHUNK + 20)
    expected = uncached(model, text)
    assert_near(Decoder(model, 1, len(text)).prefill(0, text), expected[-1])
    assert_near(Decoder(model, 1, len(text)).step(torch.tensor([text]))[0], expected)


@pytest.mark.parametrize("pattern", [None, "SL"])
@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_a_window_bounds_the_cache_and_can_go_back_by_the_slack(position, pattern):
    """Rows slide at different times, far past the buffer's end, with and without a block that sees all keys."""
    model = model_of(seq_len=1000, window=6, position=position, window_pattern=pattern)
    decoder = Decoder(model, 2, 1000)
    cache = decoder._caches[0]
    assert cache.kv.shape[4] <= 2 * 6 + CHUNK + SLACK + 16
    assert [(len(c.kv), c.window) for c in decoder._caches] == ([(1, 6), (1, None)] if pattern else [(2, 6)])
    texts = [text_of(900, 1), text_of(900, 2)]
    decoder.prefill(0, texts[0][:200])
    decoder.prefill(1, texts[1][:420])
    slides = 0
    for i in range(300):
        before = list(cache.starts)
        logits = decoder.step(torch.tensor([[texts[0][200 + i]], [texts[1][420 + i]]]))
        slides += cache.starts != before
        if cache.starts != before or i % 60 == 0:
            for row, n in ((0, 200 + i), (1, 420 + i)):
                assert_near(logits[row, 0], uncached(model, texts[row][: n + 1])[-1])
    assert slides >= 2
    decoder.prefill(0, text_of(int(cache.size - (500 - cache.starts[0])) + 1, 3))  # slides
    length = decoder.lengths[0]
    decoder.truncate(0, length - SLACK)
    with pytest.raises(ValueError, match="window has moved past"):
        decoder.truncate(0, 100)


@pytest.fixture(params=[None, "torch"], ids=["torch", "attention_decode"])
def slid(request, monkeypatch) -> tuple[GPT, Decoder, list[int]]:
    """A row of 700 tokens under a window of 6, whose buffer has slid, and an empty row.

    The prompt goes in as 256, 256 and 188 tokens. The buffer holds 336, so the third part drops all but the last 69.
    """
    monkeypatch.setattr(decode, "decode_impl", lambda device: request.param)
    model = model_of(seq_len=1000, window=6, n_kv_head=2, window_pattern="SL")
    decoder, text = Decoder(model, 2, 1000), text_of(700)
    decoder.prefill(0, text)
    assert decoder._caches[0].size == 336 and decoder._caches[0].starts == [2 * CHUNK - (6 - 1 + SLACK), 0]
    return model, decoder, text


def test_a_row_that_has_slid_can_be_cut_to_the_last_token_whose_window_it_holds(slid):
    """Later positions work too; a cut to one token less is refused and changes nothing."""
    model, decoder, text = slid
    first = decoder._caches[0].starts[0] + 6 - 1
    snapshot, expected = decoder.snapshot(0), uncached(model, text)
    for length in (first, first + 1, 699):
        decoder.restore(0, snapshot)
        decoder.truncate(0, length)
        assert_near(decoder.prefill(0, [text[length]]), expected[length])
    decoder.restore(0, snapshot)
    with pytest.raises(ValueError, match=f"row 0 cannot go back to {first - 1} tokens: its window has moved past them"):
        decoder.truncate(0, first - 1)
    assert decoder.lengths == [700, 0]


def test_a_snapshot_of_a_row_that_has_slid(slid):
    """Restored into rows that are empty, longer, and have slid further, after its source has changed."""
    model, decoder, text = slid
    snapshot, expected = decoder.snapshot(0), uncached(model, [*text, 7])[-1]
    decoder.prefill(0, text_of(250, 1))
    for before in ([], [5], text_of(320, 2), text_of(900, 3)):
        decoder.truncate(1, 0)
        if before:
            decoder.prefill(1, before)
        decoder.restore(1, snapshot)
        assert decoder.lengths == [950, 700]
        assert_near(decoder.prefill(1, [7]), expected)
        assert all(not cache.kv[:, 1, :, :, 701 - cache.starts[1] :].any() for cache in decoder._caches)


@pytest.mark.parametrize("name", ["modern", "window", "alibi-grouped"])
def test_even_rows_go_through_attention_at_once(name, monkeypatch):
    """One call for each layer, with a mask only if some query does not see all keys, such as for uneven rows."""
    calls = []

    def noting(q, k, v, attn_mask):
        calls.append((len(q), attn_mask is not None))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attend, "F", SimpleNamespace(scaled_dot_product_attention=noting))
    decoder = Decoder(model_of(**OPTIONS[name]), 3, 48)
    for row in range(3):
        decoder.prefill(row, text_of(12, row))
    decoder.step(torch.zeros(3, 1, dtype=torch.int64))
    assert calls == [(3, name == "alibi-grouped")] * 2
    calls.clear()
    decoder.truncate(1, 10)
    decoder.step(torch.zeros(3, 1, dtype=torch.int64))
    assert calls == [(3, True)] * 2


def test_padding_rows_of_a_tile_change_nothing(monkeypatch):
    """As on a processor that gives all rows of a tile equal bits; this one may not."""
    monkeypatch.setattr(Decoder, "_same_in_every_place", lambda self, tile: tile == 4)
    follow_the_model(model_of(window=7), (5, 1, 9, 5, 2), True)


def test_attention_depends_on_the_device():
    assert attend.decode_impl(torch.device("cpu")) is None and attend.decode_impl(torch.device("mps")) is None
    assert attend.decode_impl(torch.device("cuda")) == "auto"


def test_capacity_context_and_arguments_are_checked():
    model = model_of()
    decoder = Decoder(model, 1, 10)
    decoder.prefill(0, text_of(10))
    with pytest.raises(ValueError, match=r"11 tokens are more than row 0 .* capacity is 10"):
        decoder.step(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="context 48"):
        Decoder(model, 1, 100).prefill(0, text_of(49))
    with pytest.raises(ValueError, match="one token or more"):
        decoder.prefill(0, [])
    with pytest.raises(ValueError, match="cannot be cut to 11"):
        decoder.truncate(0, 11)
    with pytest.raises(ValueError, match="1 rows, not 2"):
        decoder.step(torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="int8 or None"):
        Decoder(model, 1, 10, quantize="int4")


def test_batch_invariant_rows_have_the_same_bits_in_any_batch(model):
    """Alone, between rows of other lengths, and in the second tile."""
    text = text_of(20, 3)

    def run(rows: int, place: int) -> torch.Tensor:
        decoder = Decoder(model, rows, 44, batch_invariant=True)
        for row in range(rows):
            if row != place:
                decoder.prefill(row, text_of(1 + 3 * row % 17, row))
        seen = [decoder.prefill(place, text[:6])]
        for n, T in ((6, 1), (7, 1), (8, 4), (12, 1), (13, 1)):
            new = torch.randint(VOCAB, (rows, T))
            new[place] = torch.tensor(text[n : n + T])
            seen += decoder.step(new)[place]
        decoder.keep(range(place, rows))
        new = torch.full((rows - place, 1), 5)
        seen.append(decoder.step(new)[0, 0])
        return torch.stack(seen)

    alone = run(1, 0)
    for rows, place in ((2, 0), (3, 2), (8, 5), (11, 9)):
        assert torch.equal(run(rows, place), alone)


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_is_as_exact_as_autocast(preset):
    """The RMS error against fp32 logits is at most twice that of the model under autocast."""
    model, text = model_of(**PRESETS[preset]), text_of(30)
    exact = uncached(model, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = uncached(model, text).float()
        decoder = Decoder(model, 2, 40)
        decoder.prefill(0, text[:10])
        decoder.restore(1, decoder.snapshot(0))
        inside = decoder.step(torch.tensor([text[10:], text[10:]]))
    assert decoder.dtype == torch.bfloat16
    decoder = Decoder(model, 2, 40, dtype=torch.bfloat16)
    decoder.prefill(0, text[:10])
    decoder.restore(1, decoder.snapshot(0))
    ours = torch.cat([decoder.step(torch.tensor([[t], [t]])) for t in text[10:]], dim=1)
    allowed = 2 * (expected - exact)[10:].square().mean().sqrt()
    for logits in (ours, inside):
        assert 0 < (logits[1] - exact[10:]).square().mean().sqrt() <= allowed


def test_a_bfloat16_model_decodes_in_bfloat16():
    model = model_of().bfloat16()
    decoder = Decoder(model, 1, 40)
    assert decoder.dtype == torch.bfloat16
    assert decoder.prefill(0, [1, 2, 3]).isfinite().all()


def test_a_decoder_shares_no_state_with_a_model_in_training():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, seq_len=8, vocab_size=11, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    tokens = [3, 1, 4, 1, 5]
    expected = model.eval()(torch.tensor([tokens]))[0, -1]
    torch.testing.assert_close(Decoder(model.train(), 1, 8).prefill(0, tokens), expected)
    twin = prepared(model, lambda linear: linear, torch.float32)
    assert not twin.training and list(twin.parameters()) == [] != list(model.parameters())

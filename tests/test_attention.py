"""The Triton kernels against the reference: out, lse and every gradient, over shapes, dtypes, masks and layouts."""

import pytest
import torch

from kernels import attention, attention_reference, configs, masks
from kernels.problem import within_reach
from tests.attention_checks import Case, assert_close, check, make_inputs, run

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
WINDOW_AND_SINKS = masks.CAUSAL & (masks.sliding_window(40) | masks.sink_tokens(3))


@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 128, 129, 203], ids="T{}".format)
def test_square_causal(T, device):
    check(Case(T, T, dtype=(FP32, FP16, BF16)[T % 3]), device)


@pytest.mark.parametrize(
    ("Tq", "Tk"), [(1, 129), (1, 1), (63, 200), (200, 63), (129, 1), (5, 64), (64, 5)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("mask", [masks.CAUSAL, masks.FULL], ids=["causal", "full"])
def test_different_numbers_of_queries_and_keys(Tq, Tk, mask, device):
    """Queries line up with the last keys, so with more queries than keys the first see no key under CAUSAL."""
    check(Case(Tq, Tk, H=1, mask=mask), device)


@pytest.mark.parametrize(
    "mask", [masks.CAUSAL, masks.FULL, masks.sliding_window(40), WINDOW_AND_SINKS], ids=["causal", "full", "win", "w&s"]
)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda d: str(d).removeprefix("torch."))
def test_masks_in_every_dtype(mask, dtype, device):
    check(Case(111, 150, mask=mask, dtype=dtype, D=32, seed=1), device)


@pytest.mark.parametrize(
    ("D", "Dv", "dtype"),
    [
        (8, None, BF16),
        (24, None, FP16),
        (40, None, FP32),
        (64, None, BF16),
        (80, None, FP16),
        (96, None, BF16),
        (128, None, FP16),
        (192, 128, BF16),
        (256, None, BF16),
        (256, None, FP32),
        (24, 40, FP32),
        (64, 8, FP16),
        (16, 192, FP32),
    ],
)
def test_head_dims(D, Dv, dtype, device):
    check(Case(70, 70, H=1, D=D, Dv=Dv, dtype=dtype), device)


@pytest.mark.parametrize(("H", "H_kv"), [(1, 1), (4, 4), (6, 2), (5, 1)], ids=lambda n: str(n))
def test_groups_of_heads(H, H_kv, device):
    check(Case(40, 70, B=2, H=H, H_kv=H_kv, mask=masks.sliding_window(30)), device)


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "strided"])
def test_layouts(layout, device):
    check(Case(70, 70, B=2, H=2, H_kv=2, D=24, Dv=40, layout=layout), device)


def test_one_projection_and_broadcast_batch(device):
    """q, k and v are slices of a fused projection; then the whole batch shares k and v."""
    qkv = torch.randn(2, 66, 6, 16, device=device, requires_grad=True)
    shared = torch.randn(1, 66, 4, 16, device=device, requires_grad=True)
    for fn in (lambda x, y: (*x.split(2, dim=2),), lambda x, y: (x[:, :, :2], *y.expand(2, -1, -1, -1).split(2, 2))):
        grads = []
        for options in ({"impl": "triton"}, {"impl": "reference"}):
            out = attention(*fn(qkv, shared), **options)
            grads.append((out, *torch.autograd.grad(out.square().sum(), (qkv, shared), allow_unused=True)))
        for ours, reference in zip(*grads):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gain", [5.0, 1e-4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_large_and_small_inputs(gain, dtype, device):
    check(Case(100, 100, gain=gain, dtype=dtype), device)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.3])
def test_scale(scale, device):
    check(Case(70, 90, scale=scale), device)


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
def test_empty_batches_and_lengths(B, Tq, Tk, impl, device):
    """The results are empty or zeros, and gradients are zeros."""
    q = torch.randn(B, Tq, 2, 16, device=device, requires_grad=True)
    k = torch.randn(B, Tk, 1, 16, device=device, requires_grad=True)
    out, lse = attention(q, k, k, return_lse=True, impl=impl)
    assert out.shape == (B, Tq, 2, 16) and lse.shape == (B, 2, Tq)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


def test_queries_that_see_no_key_give_zeros(device):
    """Their lse is -inf and their gradients are zero, at any row of a tile."""
    nobody_sees_odd = masks.Mask(even_queries)
    inputs = make_inputs(Case(70, 70, mask=nobody_sees_odd), device)
    ours = run(attention, inputs, impl="triton")
    odd = slice(1, None, 2)
    assert (ours["out"][:, odd] == 0).all() and (ours["lse"][..., odd] == -torch.inf).all()
    assert (ours["dq"][:, odd] == 0).all()
    check(Case(70, 70, mask=nobody_sees_odd), device)


def even_queries(q, k):
    return (q % 2 == 0) & (k <= q)


TILES = sorted({config[:2] for row in configs.TABLE.values() for _, config in row})


@pytest.mark.parametrize("tile", TILES, ids="{0[0]}x{0[1]}".format)
def test_every_tile_of_the_table(tile, device, monkeypatch):
    """Every tile size of every GPU gives correct results."""
    if device == "cuda":
        monkeypatch.setattr(configs, "choose", lambda *_: configs.Config(*tile, 4, 1))
    else:
        monkeypatch.setattr(configs, "INTERPRETER", configs.Config(*tile, 4, 1))
    T = 2 * max(tile) + 5
    check(Case(T, T, H=1, mask=masks.sliding_window(max(tile)), dtype=FP16), device)


def test_the_tile_depends_on_its_arguments_alone():
    for arch in configs.SHARED_MEMORY:
        for dtype in (FP32, FP16, BF16):
            for D in (8, 24, 64, 65, 128, 256):
                for kernel in ("forward", "dkdv", "dq"):
                    first, again = (configs.choose(arch, dtype, D, D, kernel) for _ in range(2))
                    assert first == again
    with pytest.raises(ValueError, match="8 to 256"):
        configs.choose("sm_80", FP32, 512, 512, "forward")


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1024, 4099])
@pytest.mark.parametrize("D", [64, 128])
def test_long_on_a_gpu(T, D, device):
    check(Case(T, T, B=2, H=4, H_kv=2, D=D, dtype=BF16), device)


@pytest.mark.gpu
def test_repeated_calls_give_the_same_bits_on_a_gpu(device):
    """The kernels add nothing atomically."""
    inputs = make_inputs(Case(1000, 1000, B=2, H=8, H_kv=2, D=64, dtype=BF16), device)
    first = run(attention, inputs, impl="triton")
    for _ in range(200):
        again = run(attention, inputs, impl="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_rows_more_than_two_to_the_31_apart(device):
    memory = torch.empty(2, 2**31 + 64 * 64, dtype=FP16, device=device)
    far = memory[:, -64 * 64 :].unflatten(1, (64, 1, 64)).normal_()
    torch.testing.assert_close(attention(far, far, far, impl="triton"), attention(*[far.clone()] * 3, impl="triton"))


def test_positions_far_apart_are_copied():
    """32 bits cannot address a tile that spans more than 2^31 elements."""
    near, far = (torch.empty(1, device="meta").as_strided((2, 3, 1, 8), (8, step, 8, 1)) for step in (2**22, 2**24))
    assert within_reach(near) is near
    assert within_reach(far).stride() == (24, 8, 8, 1)


def test_reference_against_torch():
    """In float64, for calls that torch's attention supports."""
    q, k, v = (torch.randn(2, 9, 4, 8, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    out, lse = attention_reference(q, k, v, return_lse=True)
    torch.testing.assert_close(out, expected)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, dim=-1))


def test_the_rule_refuses_small_errors():
    """It accepts plain PyTorch's results."""
    truth = torch.randn(1000, dtype=torch.float64)
    plain = truth.to(BF16)
    assert_close("out", plain, plain, truth, BF16)
    with pytest.raises(AssertionError, match="out: error"):
        assert_close("out", (truth + 0.05).to(BF16), plain, truth, BF16)
    with pytest.raises(AssertionError, match="out: error nan"):
        assert_close("out", torch.full_like(plain, torch.nan), plain, truth, BF16)
    # A single large error of plain PyTorch does not permit a small error everywhere.
    plain[0] += 1
    with pytest.raises(AssertionError, match="out: RMS error"):
        assert_close("out", (truth + 0.06).to(BF16), plain, truth, BF16)

"""The features of attention beside masks: softcap, ALiBi, bias, sinks, segments, dropout, lse; alone and together."""

from dataclasses import replace

import pytest
import torch

from kernels import attention, attention_backward, attention_dbias, attention_reference, masks
from kernels.attention_arguments import Arguments
from kernels.attention_reference import dropout_keep
from kernels.operators import call_of
from kernels.problem import Problem
from tests.attention_checks import Case, check, make_inputs, padded_tiles, run

FEATURES = ("softcap", "alibi", "bias", "sinks", "segments", "dropout")
BF16 = torch.bfloat16


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_alone(feature, device):
    check(Case(70, 90, features=(feature,)), device)


@pytest.mark.parametrize("mask", [masks.CAUSAL, masks.FULL, masks.sliding_window(30)], ids=["causal", "full", "win"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=["float32", "float16", "bfloat16"])
def test_all_features_together(mask, dtype, device):
    check(Case(65, 80, D=24, Dv=8, mask=mask, dtype=dtype, features=FEATURES), device)


@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (2, 4, 5), (1, 2, 1, 1), (3, 1, 4, 5)], ids=str)
def test_bias_of_any_shape_that_broadcasts(shape, device):
    q, k, v = (torch.randn(3, T, 2, 8, device=device) for T in (4, 5, 5))
    bias = torch.randn(shape, device=device)
    expected = attention_reference(q, k, v, bias=bias)
    for impl in ("triton", "auto"):
        torch.testing.assert_close(attention(q, k, v, bias=bias, impl=impl), expected)


@pytest.mark.parametrize("axes", ["bhqk", "hqk", "qk", "bhq", "bhk", "bk", "q", "h", ""])
def test_gradient_of_bias_of_any_shape_that_broadcasts(axes, device):
    """Each value of the bias gets the sum over all pairs that it is broadcast to."""
    check(Case(70, 90, B=2, features=("bias",), bias_axes=axes), device)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["float32", "bfloat16"])
def test_gradient_of_bias_among_all_features(dtype, device):
    case = Case(70, 90, B=2, H=4, H_kv=2, D=24, Dv=40, dtype=dtype, mask=masks.sliding_window(40), bias_axes="qk")
    check(replace(case, features=FEATURES), device)


def test_no_gradient_is_computed_for_a_constant_bias(device, monkeypatch):
    def refuse(*args):
        raise AssertionError("it was computed")

    monkeypatch.setattr(attention_backward, "bias_gradient", refuse)
    q, k, v = (torch.randn(1, 6, 1, 8, device=device, requires_grad=True) for _ in range(3))
    attention(q, k, v, bias=torch.zeros(6, 6, device=device), impl="triton").sum().backward()


def test_gradient_of_bias_visits_what_the_mask_needs(device):
    """A window needs 9 of 5 x 5 tiles, twice for two heads; for a bias of shape (T, T), one program has one tile."""
    bias = torch.zeros(300, 300, device=device)
    q, k = torch.randn(1, 300, 2, 16, device=device), torch.randn(1, 300, 1, 16, device=device)
    problem = Problem(call_of(Arguments(q, k, k, masks.sliding_window(30), bias=bias)))
    rows = torch.zeros(1, 2, 300, device=device)
    counts = torch.zeros(50, dtype=torch.int32, device=device)
    launch = attention_dbias.dbias_launch(problem, q, rows, rows, bias.clone(), counts)
    launch.run()
    needed = padded_tiles(masks.sliding_window(30).dense(300, 300)[0, 0], launch).sum().item()
    assert counts.sum().item() == 2 * needed


def test_a_bias_of_minus_infinity_hides_a_pair(device):
    """A row with only hidden pairs is zero."""
    q, k, v = (torch.randn(1, 6, 1, 8, device=device) for _ in range(3))
    bias = torch.zeros(6, 6, device=device)
    bias[2] = -torch.inf
    out, lse = attention(q, k, v, bias=bias, impl="triton", return_lse=True)
    assert (out[:, 2] == 0).all() and (lse[..., 2] == -torch.inf).all()
    torch.testing.assert_close(out, attention_reference(q, k, v, bias=bias))


def test_sinks_of_minus_infinity_change_nothing(device):
    q, k, v = (torch.randn(1, 6, 2, 8, device=device) for _ in range(3))
    sinks = torch.full((2,), -torch.inf, device=device)
    torch.testing.assert_close(attention(q, k, v, sinks=sinks, impl="triton"), attention(q, k, v, impl="triton"))


def test_strided_values_of_heads(device):
    """Slopes and sinks may be columns of a larger tensor."""
    q, k, v = (torch.randn(1, 6, 2, 8, device=device) for _ in range(3))
    columns = torch.rand(2, 3, device=device)
    options = {"alibi_slopes": columns[:, 1], "sinks": columns[:, 2]}
    torch.testing.assert_close(attention(q, k, v, **options, impl="triton"), attention_reference(q, k, v, **options))


def test_lse_alone_is_differentiable(device):
    q, k, v = (torch.randn(1, 70, 1, 16, device=device, requires_grad=True) for _ in range(3))
    grads = []
    for impl in ("triton", "reference"):
        _, lse = attention(q, k, v, return_lse=True, impl=impl)
        grads.append(torch.autograd.grad(lse.square().sum(), (q, k, v), allow_unused=True, materialize_grads=True))
    for ours, reference in zip(*grads):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_two_halves_merge_by_lse(device):
    """Attention over two halves of the keys, combined by lse, equals attention over all keys."""
    q, k, v = (torch.randn(1, 70, 2, 16, device=device) for _ in range(3))
    parts = [
        attention(q, k[:, half], v[:, half], mask=masks.FULL, return_lse=True, impl="triton")
        for half in (slice(0, 33), slice(33, 70))
    ]
    lse = torch.stack([lse for _, lse in parts])  # (2, B, H, T)
    weights = torch.softmax(lse, dim=0).transpose(2, 3)[..., None]  # (2, B, T, H, 1)
    merged = sum(w * out for w, (out, _) in zip(weights, parts))
    torch.testing.assert_close(merged, attention_reference(q, k, v, mask=masks.FULL))


def test_a_mask_with_a_value_for_each_row(device):
    """A user-defined prefix mask: all queries see the first n keys, with n given for each row."""
    prefix = masks.Mask(in_prefix, torch.tensor([3, 40, 0], dtype=torch.int32, device=device))
    check(Case(70, 70, B=3, H=1, mask=masks.CAUSAL | prefix), device)
    assert (masks.CAUSAL | prefix).dense(5, 5, device)[1, 0].all()


def in_prefix(q, k, length):
    return k < length


def test_a_user_defined_mask(device):
    """Forward, backward and reference all come from its predicate, integers and bands."""
    band = masks.Band(least=0, most=50, exact=False)
    dilated = masks.Mask(dilated_window, 51, 3, bands=[band])
    check(Case(90, 130, mask=dilated, dtype=BF16), device)
    check(Case(90, 130, mask=dilated & masks.sliding_window(20) | masks.sink_tokens(2)), device)


def dilated_window(q, k, window, step):
    return (q >= k) & (q - k < window) & ((q - k) % step == 0)


def test_packed_documents_stay_apart(device):
    """Packed documents give the same results as single ones."""
    lengths = [30, 1, 39]
    q, k, v = (torch.randn(1, 70, 2, 16, device=device) for _ in range(3))
    ids = masks.segment_ids(torch.tensor([0, 30, 31, 70], device=device), 70)
    assert ids[0].bincount().tolist() == lengths
    assert masks.segment_ids(torch.tensor([0, 2, 3]), 5).tolist() == [[0, 0, 1, 2, 2]]
    for impl in ("triton", "auto"):
        out = attention(q, k, v, segment_ids=ids, impl=impl)
        alone = [attention_reference(*(x[None, ids[0] == n] for x in (q[0], k[0], v[0]))) for n in range(3)]
        torch.testing.assert_close(out, torch.cat(alone, dim=1))


def test_dropout_depends_on_indices_and_seed(device):
    """Tile size and batch do not change which entries are dropped; another seed does."""
    keep = dropout_keep(0.3, 7, (2, 2, 40, 50), device)
    assert torch.equal(keep[:1, :1, :9, :11], dropout_keep(0.3, torch.tensor([7]), (1, 1, 9, 11), device))
    assert not torch.equal(keep, dropout_keep(0.3, 8, (2, 2, 40, 50), device))
    q, k, v = (torch.randn(1, 40, 2, 16, device=device) for _ in range(3))
    first, again, other = (attention(q, k, v, dropout_p=0.3, seed=seed, impl="triton") for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = [attention(q, k, v, dropout_p=0.3, impl="triton") for _ in range(2)]
    assert not torch.equal(*drawn)


def test_dropout_is_uniform():
    """Shares by key, by query and of surviving neighbours are within five standard deviations of the expected ones."""
    p, n = 0.25, 1000
    keep = dropout_keep(p, 3, (2, 2, n, n), "cpu").double()
    for axes in ((0, 1, 2), (0, 1, 3)):
        assert (keep.mean(axes) - (1 - p)).abs().max() < 5 * (p * (1 - p) / (4 * n)) ** 0.5
    for pairs in (keep[..., 1:] * keep[..., :-1], keep[..., 1:, :] * keep[..., :-1, :], keep[0] * keep[1]):
        assert abs(pairs.mean() - (1 - p) ** 2) < 5 / pairs.numel() ** 0.5


def test_dropout_keeps_the_mean(device):
    inputs = make_inputs(Case(64, 64, mask=masks.FULL), device)
    out = torch.stack([
        run(attention_reference, inputs, dropout_p=0.5, seed=seed)["out"] for seed in range(400)
    ])  # fmt: skip
    expected = run(attention_reference, inputs)["out"]
    assert (out.mean(0) - expected).abs().max() < 6 * (out.std(0) / 20).max()

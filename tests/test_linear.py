"""gpt/inference/linear.py: every layout of the weights computes the layer it was made from."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from gpt.inference import linear as module
from gpt.inference.linear import MklLinear, PackedLinear, PlainLinear, TransposedLinear, can_pack, prepare_linear

LAYOUTS = {
    "plain": lambda weight, bias: PlainLinear(weight, bias),
    "transposed": lambda weight, bias: TransposedLinear(weight, bias),
    "packed": lambda weight, bias: PackedLinear(weight, bias, 4),
    "mkl": lambda weight, bias: MklLinear(weight, bias, 4),
}
ACTIVATIONS = {
    None: lambda h: h,
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "swiglu": lambda h: F.silu(h[:, :24]) * h[:, 24:],
}


def make(layout: str, weight: torch.Tensor, bias: torch.Tensor | None) -> PlainLinear:
    if layout == "packed" and not can_pack(weight):
        pytest.skip("this torch has no oneDNN")
    if layout == "mkl" and not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    return LAYOUTS[layout](weight, bias)


@pytest.mark.parametrize("rows", [1, 4, 7], ids="rows{}".format)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_equals_the_layer(layout, with_bias, rows):
    torch.manual_seed(rows)
    weight, x = torch.randn(48, 33), torch.randn(rows, 33)  # (N, K), (M, K)
    bias = torch.randn(48) if with_bias else None
    linear = make(layout, weight, bias)
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for name, activation in ACTIVATIONS.items():
        expected = activation(truth)
        residual = torch.randn(rows, expected.shape[1])
        torch.testing.assert_close(linear(x, name), expected.float(), atol=1e-4, rtol=1e-5)
        summed = linear(x, name, residual.clone())
        torch.testing.assert_close(summed, (expected + residual).float(), atol=1e-4, rtol=1e-5)


def test_the_layout_depends_on_shape_dtype_and_rows():
    if not (torch.backends.mkl.is_available() and can_pack(torch.zeros(1, 1))):
        pytest.skip("this torch has no MKL or no oneDNN")
    small, wide, large = torch.nn.Linear(64, 64), torch.nn.Linear(64, 256), torch.nn.Linear(1024, 768)
    layouts = {
        (layer, rows): type(prepare_linear(layer, torch.float32, rows))
        for layer in (small, wide, large)
        for rows in (1, 2, 8)
    }
    assert layouts[small, 1] is PlainLinear and layouts[wide, 1] is TransposedLinear
    assert layouts[small, 2] is layouts[small, 8] is layouts[wide, 8] is MklLinear
    assert layouts[large, 2] is PlainLinear and layouts[large, 8] is PackedLinear


@pytest.mark.parametrize("activation", [None, "relu2", "gelu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_residuals_of_another_dtype(layout, activation):
    """x is cast to the weights' dtype; the result has the residual's."""
    torch.manual_seed(3)
    weight, bias, x = torch.randn(48, 33), torch.randn(48), torch.randn(4, 33).double()
    linear = make(layout, weight, bias)
    expected = ACTIVATIONS[activation](F.linear(x, weight.double(), bias.double()))
    y = linear(x, activation)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-5)
    for dtype in (torch.float64, torch.float32):
        residual = torch.randn(4, 48).to(dtype)
        summed = residual.double() + expected
        result = linear(x, activation, residual)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), summed, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_packed_products_include_the_activation(activation):
    linear, x = make("packed", torch.randn(48, 33), None), torch.randn(4, 33)
    expected = linear(x, activation)
    with mock.patch.object(module, "activate", side_effect=AssertionError("it was a step of its own")):
        assert torch.equal(linear(x, activation), expected)


@pytest.fixture
def recorded(monkeypatch):
    """Layouts replaced by tuples of their name and arguments."""
    for name in ("PlainLinear", "TransposedLinear", "PackedLinear", "MklLinear"):
        monkeypatch.setattr(module, name, lambda *args, name=name: (name, *args))
    monkeypatch.setattr(module, "can_pack", lambda weight: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("out", "width", "rows", "layout"),
    [
        (64, 64, 1, "PlainLinear"),
        (65, 64, 1, "TransposedLinear"),
        (1000, 999, 1, "TransposedLinear"),
        (600, 1000, 2, "MklLinear"),  # 600,000 weights are few
        (600, 1000, 9, "MklLinear"),
        (600_001, 1, 2, "PlainLinear"),
        (601, 1000, 2, "PlainLinear"),
        (601, 1000, 3, "PlainLinear"),
        (601, 1000, 4, "PackedLinear"),
    ],
)
def test_layouts_by_shape_and_rows(out, width, rows, layout, with_bias, recorded):
    layer = torch.nn.Linear(width, out, bias=with_bias)
    name, weight, bias, *more = prepare_linear(layer, torch.float32, rows)
    assert name == layout and more == ([rows] if layout in ("MklLinear", "PackedLinear") else [])
    assert torch.equal(weight, layer.weight) and not weight.requires_grad
    assert bias is None if not with_bias else torch.equal(bias, layer.bias)
    for rows_of_16_bits in (1, 2, 8):
        name, weight, bias, n = prepare_linear(layer, torch.bfloat16, rows_of_16_bits)
        assert (name, weight.dtype, n) == ("PackedLinear", torch.bfloat16, rows_of_16_bits)
        assert bias is None if not with_bias else torch.equal(bias, layer.bias.bfloat16())


def test_layouts_without_mkl_or_onednn(recorded, monkeypatch):
    layer = torch.nn.Linear(8, 16)
    meta = torch.nn.Linear(8, 16, device="meta")
    name, weight, bias = prepare_linear(meta, torch.float32, 8)
    assert name == "PlainLinear" and weight.shape == (16, 8) and bias.shape == (16,)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    name, weight, bias = prepare_linear(layer, torch.float32, 2)
    assert name == "TransposedLinear" and torch.equal(weight, layer.weight) and torch.equal(bias, layer.bias)
    monkeypatch.setattr(module, "can_pack", lambda weight: False)
    for dtype in (torch.float32, torch.bfloat16):
        name, weight, bias = prepare_linear(layer, dtype, 8)
        assert name == "PlainLinear" and torch.equal(weight, layer.weight.to(dtype))
        assert torch.equal(bias, layer.bias.to(dtype))


@pytest.mark.parametrize("has_onednn", [False, True])
@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_what_can_be_packed(has_onednn, has_bfloat16, monkeypatch):
    weight = torch.zeros(8, 8)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    operators = SimpleNamespace(_reorder_linear_weight=None, _is_mkldnn_bf16_supported=lambda: has_bfloat16)
    with mock.patch.object(torch.ops, "mkldnn", operators):
        assert can_pack(weight) == has_onednn
        assert can_pack(weight.bfloat16()) == (has_onednn and has_bfloat16)
        assert not can_pack(weight.double()) and not can_pack(weight.half())
        assert not can_pack(weight.to("meta")) and not can_pack(weight.bfloat16().to("meta"))
        del operators._reorder_linear_weight
        assert not can_pack(weight) and not can_pack(weight.bfloat16())

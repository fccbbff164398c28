"""gpt/linear.py: every layout of the weights is the layer it was made of."""

import pytest
import torch
import torch.nn.functional as F

from gpt.linear import MklLinear, PackedLinear, PlainLinear, TransposedLinear, can_pack, prepare_linear

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
def test_each_layout_is_the_layer(layout, with_bias, rows):
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

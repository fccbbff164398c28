"""int8 weights: their rounding error, their product, and the loss that they cause."""

from copy import deepcopy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from gpt.config import PRESETS
from gpt.data.tokenizers import ByteTokenizer
from gpt.evaluation import int8
from gpt.evaluation.int8 import quantization_loss
from gpt.inference import quantize
from gpt.inference.decoder import Decoder
from gpt.inference.quantize import Int8Linear, quantize_weight
from tests.test_decode import VOCAB, model_of


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("magnitude", [1e-30, 0.02, 300.0])
def test_rounding_is_within_half_a_step_of_each_channel(magnitude):
    weight = randn(97, 50) * magnitude * torch.linspace(0.1, 10, 97)[:, None]
    weight[3] = 0
    ints, scale = quantize_weight(weight)
    assert ints.dtype == torch.int8 and ints.abs().max() == 127
    assert torch.equal(scale, scale.bfloat16().float())
    error = (weight.double() - ints.double() * scale.double()[:, None]).abs()
    assert (error <= 0.5000001 * scale.double()[:, None]).all()
    # A step is the smallest of which 127 suffice, up to bfloat16 rounding.
    largest = weight.abs().amax(1)
    assert (scale <= largest / 127 * (1 + 2**-8))[largest > 0].all()
    assert (ints[3] == 0).all() and scale[3] == 1


@pytest.mark.parametrize("shape", [(64, 32), (65, 36), (36, 36), (3, 40), (5000, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17], ids="M{}".format)
def test_the_product_equals_that_of_dequantized_weights(shape, dtype, rows):
    """Also for widths that torch's product does not support."""
    layer = torch.nn.Linear(shape[1], shape[0])
    ints, scale = quantize_weight(layer.weight)
    x = randn(rows, shape[1]).to(dtype)
    if rows == 0:
        y = Int8Linear(layer, dtype)(x)
        assert y.shape == (0, shape[0]) and y.dtype == dtype
        return
    product = x.double() @ (ints.double() * scale.double()[:, None]).T
    residual = torch.full((rows, shape[0]), 2.0)
    with torch.inference_mode():
        y = Int8Linear(layer, dtype)(x)
        summed = Int8Linear(layer, dtype)(x, "relu", residual.clone())
    expected = product + layer.bias.detach().double()
    assert y.dtype == dtype
    tolerance = 3 * torch.finfo(dtype).eps * (product.abs().max() + 1)
    assert (y - expected).abs().max() <= tolerance
    assert (summed - (2 + F.relu(expected))).abs().max() <= tolerance


def dequantized(model) -> torch.nn.Module:
    """Copy a model with each matrix rounded to its int8 values; a tied head gets its own matrix."""
    model = deepcopy(model)
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            ints, scale = quantize_weight(layer.weight)
            layer.weight.data = ints.float() * scale[:, None]
    return model


@pytest.mark.parametrize("preset", ["modern", "gpt2"])
def test_the_loss_equals_an_independent_computation(preset, monkeypatch):
    """With 7 levels instead of 127, so that the difference of the losses is large.

    Both losses are means in float32 of 270 tokens: a few rounding steps of each, where 1% of the difference is 2e-4.
    """
    monkeypatch.setattr(quantize, "LEVELS", 7)
    model = model_of(seq_len=90, **PRESETS[preset])
    tokens = torch.randint(VOCAB, (3, 91), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        full = model.loss(tokens[:, :-1], tokens[:, 1:])
        rounded = dequantized(model).loss(tokens[:, :-1], tokens[:, 1:])
    lost = float(rounded - full)
    assert abs(lost) > 0.02
    loss = quantization_loss(model, tokens, dtype=torch.float32)
    assert loss == pytest.approx(lost, abs=32 * 2.0**-24 * float(full))
    # bfloat16 activations add only their own rounding.
    assert quantization_loss(model, tokens) == pytest.approx(lost, abs=2.0**-9 * float(full))


def test_an_int8_decoder_equals_the_dequantized_model():
    model = model_of()
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dequantized(model)(tokens)
    decoder = Decoder(model, 2, 20, quantize="int8", dtype=torch.float32)
    ours = torch.cat([decoder.step(tokens[:, i : i + 1]) for i in range(12)], dim=1)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert Decoder(model, 2, 20, quantize="int8").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 17], ids="M{}".format)
def test_torchs_int8_product_is_used_for_few_rows_of_bfloat16(rows, dtype):
    """For others, weights are unpacked 2,048 channels at a time."""
    linear, x = Int8Linear(torch.nn.Linear(32, 5000), dtype), randn(rows, 32).to(dtype)
    with (
        mock.patch.object(torch, "_weight_int8pack_mm", side_effect=torch._weight_int8pack_mm) as product,
        mock.patch.object(F, "linear", side_effect=F.linear) as unpacked,
        torch.inference_mode(),
    ):
        linear(x)
    is_few = rows <= 16 and dtype == torch.bfloat16
    assert product.call_count == is_few
    assert [call.args[1].shape[0] for call in unpacked.call_args_list] == ([] if is_few else [2048, 2048, 904])


def test_other_devices_unpack_weights():
    linear = Int8Linear(torch.nn.Linear(32, 40, device="meta"), torch.bfloat16)
    with mock.patch.object(torch, "_weight_int8pack_mm", side_effect=AssertionError):
        assert linear(torch.empty(2, 32, dtype=torch.bfloat16, device="meta")).shape == (2, 40)


def test_the_loss_computes_64_tokens_of_a_row_at_a_time():
    """The cache has as many tokens as are read."""
    model = model_of(seq_len=130)
    tokens = torch.randint(VOCAB, (2, 131), generator=torch.Generator().manual_seed(2))
    with (
        mock.patch("gpt.evaluation.int8.Decoder", side_effect=Decoder) as made,
        mock.patch.object(Decoder, "step", autospec=True, side_effect=Decoder.step) as step,
    ):
        quantization_loss(model, tokens, dtype=torch.float32)
    assert [call.args[1:] for call in made.call_args_list] == [(2, 130)] * 2
    assert [call.args[1].shape for call in step.call_args_list] == [(2, 64), (2, 64), (2, 2)] * 2


def test_the_loss_of_a_model_that_writes_nothing_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "generate", lambda *args: iter(()))
    model = model_of()
    line = int8.loss_of_int8(tmp_path, model, ByteTokenizer())
    assert line.startswith("int8 weights: ") and "not measured" in line

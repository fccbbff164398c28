"""Hand-written gradients against finite differences and the plain formulas."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from gpt.model.cpu_autograd import ReLUSquaredFunction, RMSNormFunction, RotateFunction, by_hand
from gpt.model.linear import activate
from gpt.model.norms import RMSNorm
from gpt.model.positions import rotary_table, rotate


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def tables(T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(t.double().unsqueeze(-2) for t in rotary_table(T, D, 100.0))


def test_gradients_equal_finite_differences():
    assert torch.autograd.gradcheck(RMSNormFunction.apply, (random(2, 3, 5), random(5), 1e-3))
    assert torch.autograd.gradcheck(RotateFunction.apply, (random(2, 3, 2, 6), *tables(3, 6)))
    assert torch.autograd.gradcheck(ReLUSquaredFunction.apply, (random(4, 7),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_equal_the_plain_formulas(dtype):
    """Values and gradients, to the rounding of the dtype."""
    eps = torch.finfo(dtype).eps
    x, w = random(3, 7, 24, dtype=dtype), random(24, dtype=dtype)
    ours, plain = RMSNormFunction.apply(x, w, 1e-6), F.rms_norm(x.double(), (24,), w.double(), 1e-6)
    for one, other in [(ours, plain), *zip(gradients(ours, x, w), gradients(plain, x, w), strict=True)]:
        assert (one - other).abs().max() <= 8 * eps * other.abs().max()
    ours, plain = ReLUSquaredFunction.apply(x), F.relu(x.double()).square()
    for one, other in [(ours, plain), *zip(gradients(ours, x), gradients(plain, x), strict=True)]:
        assert (one - other).abs().max() <= 2 * eps * other.abs().max()


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [g.double() for g in torch.autograd.grad(y, inputs, weights)]


def test_the_rotation_keeps_lengths_and_relative_angles():
    x, y = random(1, 9, 1, 8), random(1, 9, 1, 8)
    table = tables(9, 8)
    a, b = rotate(x, *table)[0, :, 0], rotate(y, *table)[0, :, 0]
    torch.testing.assert_close(a.norm(dim=-1), x[0, :, 0].norm(dim=-1))
    shifted = (
        rotate(x[:, :1].expand(1, 9, 1, 8), *table)[0, :, 0] @ rotate(y[:, :1].expand(1, 9, 1, 8), *table)[0, :, 0].T
    )
    for distance in range(8):
        line = torch.diagonal(shifted, distance)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert not torch.allclose(a @ b.T, (x[0, :, 0] @ y[0, :, 0].T))


@pytest.mark.parametrize("eps", [0.5, 1e-9])
def test_eps_is_inside_the_root_of_the_norm(eps):
    """Values and gradients in float64, also for a row of zeros."""
    x, w = random(2, 3, 24), random(24)
    with torch.no_grad():
        x[0, 0] = 0
    ours, plain = RMSNormFunction.apply(x, w, eps), F.rms_norm(x, (24,), w, eps)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, x, w), gradients(plain, x, w), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12 / eps**0.5)


def test_the_rotation_equals_the_plain_formula():
    x, table = random(2, 5, 3, 8), tables(5, 8)
    ours, rotated_x = rotate(x, *table), x.detach()
    with torch.no_grad():
        assert not by_hand(rotated_x)
        torch.testing.assert_close(ours, rotate(rotated_x, *table), rtol=1e-12, atol=1e-12)
    assert type(ours.grad_fn).__name__ == "RotateFunctionBackward"


def test_modules_use_the_hand_written_functions():
    x, norm = random(2, 8), RMSNorm(8, eps=1e-6).double()
    assert type(norm(x).grad_fn).__name__ == "RMSNormFunctionBackward"
    assert type(activate(x, "relu2").grad_fn).__name__ == "ReLUSquaredFunctionBackward"
    with torch.no_grad():
        plain = F.rms_norm(x, (8,), norm.weight, 1e-6)
        torch.testing.assert_close(norm(x), plain, rtol=1e-12, atol=1e-12)


def test_by_hand_is_for_eager_training_on_a_cpu():
    x = torch.zeros(2)
    assert by_hand(x)
    with torch.no_grad():
        assert not by_hand(x)
    assert not by_hand(x.to("meta"))
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert not by_hand(x)

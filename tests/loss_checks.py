"""The rule of attention_checks.py for the fused loss: inputs, what is compared, and the comparison."""

import math
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from kernels import linear_cross_entropy, linear_cross_entropy_reference
from kernels import linear_cross_entropy_chunks as chunks
from tests.attention_checks import assert_close
from tests.rounding import loss_deviation

ALL_TERMS = {"softcap": 3.0, "z_loss": 0.01, "label_smoothing": 0.1}
TERMS = [{}, *({name: value} for name, value in ALL_TERMS.items()), ALL_TERMS]


@dataclass
class Inputs:
    """x (N, C), weight (V, C), targets (N,), and the upstream gradients of each loss and of the mean."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    dlosses: Tensor
    dmean: float = 0.37


def make_inputs(N: int, V: int, C: int, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Make inputs that are views of larger memory, which is NaN, or an invalid target, elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def lay_out(values: Tensor, dtype: torch.dtype, around: float) -> Tensor:
        memory = torch.full([n + 3 for n in values.shape[:-1]] + [2 * values.shape[-1]], around, dtype=dtype)
        view = memory.to(device)[(slice(1, -2),) * (values.ndim - 1) + (slice(None, None, 2),)]
        return view.copy_(values)

    x = lay_out(torch.randn(N, C, generator=generator), dtype, math.nan)
    weight = lay_out(torch.randn(V, C, generator=generator) * 2 * C**-0.5, dtype, math.nan)
    targets = torch.randint(V, (N,), generator=generator)
    targets[2::5] = -100
    return Inputs(x, weight, lay_out(targets, torch.int64, -7), torch.randn(N, generator=generator).to(device))


def run(fn, inputs: Inputs, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """Return single losses and the gradients of their weighted sum and mean, with inputs in `dtype` if given."""
    x, weight = (t.to(dtype or t.dtype).detach().requires_grad_() for t in (inputs.x, inputs.weight))
    losses = fn(x, weight, inputs.targets, reduction="none", **options)
    results = {"loss": losses.detach()}
    results["dx"], results["dweight"] = torch.autograd.grad(losses, (x, weight), inputs.dlosses.to(losses.dtype))
    if (inputs.targets >= 0).any():
        mean = fn(x, weight, inputs.targets, reduction="mean", **options) * inputs.dmean
        results["dx of the mean"], results["dweight of the mean"] = torch.autograd.grad(mean, (x, weight))
    return results


def check(inputs: Inputs, impl: str, **terms) -> None:
    """Compare `impl` with the reference in float64, in chunks of 7 rows and tiles of 256 columns."""
    dtype, V = inputs.x.dtype, inputs.weight.shape[0]
    with small_pieces(7 * V * inputs.x.element_size()):
        ours = run(linear_cross_entropy, inputs, impl=impl, **terms)
    truth = run(linear_cross_entropy_reference, inputs, torch.float64, **terms)
    plain = run(linear_cross_entropy_reference, inputs, **terms)
    deviation = deviations(inputs, **terms)
    for name in truth:
        stored = torch.float32 if name == "loss" else dtype
        assert ours[name].dtype == stored and ours[name].shape == truth[name].shape
        assert_close(name, ours[name], plain[name], truth[name], stored, deviation[name])


def deviations(inputs: Inputs, **terms) -> dict[str, Tensor]:
    """Return the expected rounding error of all results of `run`: see tests/rounding.py."""
    args = inputs.x, inputs.weight, inputs.targets
    found = loss_deviation(*args, inputs.dlosses, torch.float32, **terms)
    even = torch.full_like(inputs.dlosses, inputs.dmean / max(1, (inputs.targets >= 0).sum().item()))
    of_mean = loss_deviation(*args, even, torch.float32, **terms)
    return found | {f"{name} of the mean": of_mean[name] for name in ("dx", "dweight")}


def small_pieces(chunk_bytes: int):
    """Patch in chunks of so many bytes, and NaN in new memory."""
    empty = chunks._empty
    return mock.patch.multiple(
        chunks,
        CHUNK_BYTES=dict.fromkeys(("cpu", "cuda"), chunk_bytes),
        _empty=lambda *shape, **options: empty(*shape, **options).fill_(math.nan),
    )


def name_of(terms: dict) -> str:
    return "+".join(terms) or "plain"

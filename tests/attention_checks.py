"""How right is right: the rule by which the kernels are compared to the reference, in one place."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from kernels import attention, attention_reference, masks
from kernels.problem import Problem
from tests.rounding import attention_deviation

# What the root mean square of an error may be, relative to that of the truth: a few rounding steps.
RMS_LIMIT = {torch.float64: 6e-15, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# How far from 1 the factor between a result and its truth may be. Many 16-bit roundings average out; one of bfloat16,
# where a single number outweighs all others, is 2^-9, and a product of three such numbers 3 * 2^-9.
GAIN_LIMIT = 6e-3


@dataclass(frozen=True)
class Case:
    """One call. `features` names optional arguments to fill in; `layout` says how q, k and v lie in memory."""

    Tq: int
    Tk: int
    B: int = 1
    H: int = 2
    H_kv: int = 1
    D: int = 16
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    mask: masks.Mask = masks.CAUSAL
    features: tuple[str, ...] = ()
    layout: str = "poisoned"
    gain: float = 1.0
    scale: float | None = None
    seed: int = 0
    bias_axes: str = "hk"

    def bias_shape(self) -> tuple[int, ...]:
        """Along the axes b, h, q and k that are named, or 1."""
        return tuple(n if axis in self.bias_axes else 1 for axis, n in zip("bhqk", (self.B, self.H, self.Tq, self.Tk)))

    def __str__(self) -> str:
        shape = f"T{self.Tq}" if self.Tq == self.Tk else f"Tq{self.Tq}-Tk{self.Tk}"
        dims = f"D{self.D}" + (f"-{self.Dv}" if self.Dv else "")
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [shape, f"B{self.B}-H{self.H}-{self.H_kv}", dims, dtype, *self.features]
        if self.layout != "poisoned":
            parts.append(self.layout)
        return "-".join(parts)


@dataclass
class Inputs:
    """The tensors of a case, in its dtype, and what flows back into out and lse."""

    differentiable: dict[str, Tensor]
    arguments: dict
    dout: Tensor
    dlse: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    """Random inputs. q, k and v are views of larger memory that is NaN wherever they are not."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, Tq, Tk, H, H_kv, D, Dv = case.B, case.Tq, case.Tk, case.H, case.H_kv, case.D, case.Dv or case.D
    shapes = {"q": (B, Tq, H, D), "k": (B, Tk, H_kv, D), "v": (B, Tk, H_kv, Dv)}
    tensors = {
        name: lay_out(case.gain * randn(*shape), case.dtype, case.layout, device) for name, shape in shapes.items()
    }
    arguments: dict = {"mask": case.mask, "scale": case.scale}
    if "segments" in case.features:
        # Documents of the same number in queries and keys, aligned at the end, as in one packed row.
        document = torch.sort(torch.randint(0, 3, (B, max(Tq, Tk)), generator=generator)).values.int().to(device)
        arguments["segment_ids"] = document[:, -Tq:], document[:, -Tk:]
    if "alibi" in case.features:
        arguments["alibi_slopes"] = torch.rand(H, generator=generator).to(device)
    if "softcap" in case.features:
        arguments["softcap"] = 2.0
    if "bias" in case.features:
        tensors["bias"] = randn(*case.bias_shape()).to(device)
    if "dropout" in case.features:
        arguments |= {"dropout_p": 0.3, "seed": torch.tensor([2**40 + 12345 + case.seed], device=device)}
    if "sinks" in case.features:
        tensors["sinks"] = randn(H).to(device)
    dout = lay_out(randn(B, Tq, H, Dv), case.dtype, case.layout, device)
    return Inputs(tensors, arguments, dout, randn(B, H, Tq).to(device))


def lay_out(values: Tensor, dtype: torch.dtype, layout: str, device: str) -> Tensor:
    """The same values in memory of another shape: NaN around them, heads before positions, or contiguous."""
    values = values.to(device, dtype)
    B, T, H, D = values.shape
    if layout == "contiguous":
        return values
    if layout == "heads first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        memory = torch.full((B, T, H, 2 * D), math.nan, dtype=dtype, device=device)
        view = memory[..., ::2]
    else:
        memory = torch.full((B + 1, T + 70, H + 1, D + 3), math.nan, dtype=dtype, device=device)
        view = memory[:B, 3 : T + 3, :H, :D]
    view.copy_(values)
    return view


def run(fn, inputs: Inputs, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """out, lse and the gradients of everything differentiable, with all floating inputs in `dtype` if given."""

    def cast(x):
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x

    leaves = {name: cast(x).detach().requires_grad_() for name, x in inputs.differentiable.items()}
    arguments = {name: cast(x) for name, x in inputs.arguments.items()}
    out, lse = fn(**leaves, **arguments, return_lse=True, **options)
    # A query that sees nothing has lse -inf, through which nothing flows.
    flows = torch.isfinite(lse)
    loss = (out * cast(inputs.dout)).sum() + (lse.masked_fill(~flows, 0.0) * inputs.dlse).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def check(case: Case, device: str, slack: float = 1.0, impl: str = "triton") -> None:
    """Hold a path to the reference in float64. Outputs are NaN before the kernels write them.

    slack: how many times the allowed error is allowed, where many cases are tried: the rule compares the largest errors
    of two small samples, and by chance one is more than twice the other. Such cases also allow dq, dk and dv what a
    rounded delta costs exactly: where a query sees two keys it can be more than all that plain PyTorch loses.
    """
    inputs = make_inputs(case, device)
    with poisoned_outputs():
        ours = run(attention, inputs, impl=impl)
    truth, plain = truth_and_plain(inputs)
    excused = ("bias", "sinks") if slack == 1 else tuple(inputs.differentiable)
    losses = rounded_delta_loss(inputs, ours["out"].double() - truth["out"], excused)
    deviations = attention_deviation(inputs, case.dtype)
    for name in truth:
        assert ours[name].shape == truth[name].shape and ours[name].dtype == plain[name].dtype, name
        assert_close(name, ours[name], plain[name], truth[name], case.dtype, deviations[name], losses.get(name), slack)


def truth_and_plain(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `run` gives of the reference in float64, and of plain PyTorch at the inputs' own precision."""
    truth = run(attention_reference, inputs, torch.float64)
    plain = run(attention_reference, inputs, upcast=False)
    # lse leaves the kernels in float32, whatever the inputs: no 16-bit rounding excuses it.
    plain["lse"] = run(attention_reference, inputs)["lse"]
    return truth, plain


def rounded_delta_loss(inputs: Inputs, error: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What the gradients of `names` lose as delta = sum(out * dout) is taken from a 16-bit out, FlashAttention's way.

    dbias and dsinks are sums over many rows, where the truth cancels and this does not. An error of delta is as good as
    a gradient that flows into lse with the other sign. out itself is held to the rule.
    """
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.differentiable.items()}
    arguments = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.arguments.items()
    }
    _, lse = attention_reference(**leaves, **arguments, return_lse=True)
    error = (error * inputs.dout.double()).sum(-1).transpose(1, 2)
    flows = torch.isfinite(lse)
    added = {name: leaves[name] for name in leaves if name in names}
    if not added:
        return {}
    loss = -(lse.masked_fill(~flows, 0.0) * error).sum()
    grads = torch.autograd.grad(loss, list(added.values()), materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(added, grads)}


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(
    name: str,
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    deviation: Tensor | float = 0.0,
    excused: Tensor | None = None,
    slack: float = 1.0,
) -> None:
    """|ours - truth| may be twice what plain PyTorch loses at the same precision, and a rounding step of the output.

    FlashAttention's rule. The root mean square of the error is bounded as well, relative to that of the truth, and so
    is the part of it that is a multiple of the truth: rounding has either sign and leaves none, a wrong factor does.

    deviation: of the rounding in float32 (tests/rounding.py), a floor under each bound that does not depend on how
    lucky plain PyTorch is. excused: a known error, allowed as plain PyTorch's is.
    """
    is_infinite = torch.isinf(truth)
    assert torch.equal(is_infinite, torch.isinf(ours)), f"{name} is infinite elsewhere than the truth"
    ours, plain, truth = (x.double().masked_fill(is_infinite, 0.0) for x in (ours, plain, truth))
    deviation = (deviation + torch.zeros_like(truth)).masked_fill(is_infinite, 0.0)
    if truth.numel() == 0:
        return
    known = torch.zeros_like(truth) if excused is None else excused
    # The two errors are independent: that they cancel here allows no less.
    plain = plain + torch.copysign(known, plain - truth)
    stored = torch.float32 if name in ("lse", "loss") and dtype != torch.float64 else dtype
    rounding = ((truth.to(stored) + 0.3) - 0.3 - truth.to(stored)).abs().max().double()
    error = (ours - truth).abs().max()
    allowed = slack * (2 * (plain - truth).abs().max() + 2 * rounding) + 4 * deviation.max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    rms_error, rms_truth = root_mean_square(ours - truth), root_mean_square(truth)
    floor = 2 * root_mean_square(deviation)
    limit = slack * max(RMS_LIMIT[stored] * rms_truth, 1.5 * root_mean_square(plain - truth)) + floor
    assert rms_error <= limit, f"{name}: RMS error {rms_error:.3e}, limit {limit:.3e}"
    along = ((ours - truth - known) * truth).sum().abs()
    smallest = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    limit = GAIN_LIMIT * truth.square().sum() + smallest * truth.abs().sum() + floor * rms_truth * truth.numel() ** 0.5
    assert along <= limit, f"{name}: off by a factor of {1 + along / truth.square().sum():.4f} or its inverse"


def padded_tiles(dense: Tensor, launch) -> Tensor:
    """Which tiles of a launch hold a True of the mask `dense` (Tq, Tk): (tiles of queries, tiles of keys)."""
    m, n = launch.args["BLOCK_M"], launch.args["BLOCK_N"]
    Tq, Tk = dense.shape
    padded = torch.zeros(-(-Tq // m) * m, -(-Tk // n) * n, dtype=torch.bool)
    padded[:Tq, :Tk] = dense
    return padded.view(padded.shape[0] // m, m, padded.shape[1] // n, n).any(3).any(1)


@contextmanager
def poisoned_outputs():
    """Fill what the kernels are to write with NaN, so that what they leave out is seen."""
    empty = Problem.empty

    def poisoned(self, *shape, dtype=None):
        return empty(self, *shape, dtype=dtype).fill_(math.nan)

    with mock.patch.object(Problem, "empty", poisoned):
        yield

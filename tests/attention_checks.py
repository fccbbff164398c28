"""The rule by which the kernels are compared with the reference."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from kernels import attention, attention_reference, masks
from kernels.problem import Problem
from tests.rounding import attention_deviation

# The largest root mean square of an error, relative to that of the truth: a few rounding steps.
RMS_LIMIT = {torch.float64: 6e-15, torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
# The largest deviation from 1 of the factor between a result and its truth. 16-bit roundings average out, unless a
# single number outweighs all others: then it is 2^-9 in bfloat16, and for a product of three such numbers 3 * 2^-9.
GAIN_LIMIT = 6e-3


@dataclass(frozen=True)
class Case:
    """One call. `features` names optional arguments to fill in, `layout` the memory layout of q, k and v."""

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
        """Return the bias's shape: full along the named axes of b, h, q and k, else 1."""
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
    """The tensors of a case, in its dtype, and the upstream gradients of out and lse."""

    differentiable: dict[str, Tensor]
    arguments: dict
    dout: Tensor
    dlse: Tensor


def make_inputs(case: Case, device: str) -> Inputs:
    """Make random inputs. q, k and v are views of larger memory that is NaN elsewhere."""
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
        # Queries and keys have the same documents, aligned at the end, as in one packed row.
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
    """Copy values to another memory layout: NaN around them, heads before positions, or contiguous."""
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
    """Return out, lse and the gradients of all differentiable inputs, with floating inputs in `dtype` if given."""

    def cast(x):
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x

    leaves = {name: cast(x).detach().requires_grad_() for name, x in inputs.differentiable.items()}
    arguments = {name: cast(x) for name, x in inputs.arguments.items()}
    out, lse = fn(**leaves, **arguments, return_lse=True, **options)
    # A query that sees no key has lse -inf, which has no gradient.
    flows = torch.isfinite(lse)
    loss = (out * cast(inputs.dout)).sum() + (lse.masked_fill(~flows, 0.0) * inputs.dlse).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "lse": lse} | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def check(case: Case, device: str, slack: float = 1.0, impl: str = "triton") -> None:
    """Compare a path with the reference in float64. Outputs are NaN before the kernels write them.

    slack: a factor on the allowed error for runs of many cases, since by chance the largest error of one small sample
    can be more than twice that of the other. Such runs also allow dq, dk and dv the exact loss by a rounded delta,
    which can exceed plain PyTorch's whole loss if a query sees two keys.
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
    """`run` the reference in float64, and plain PyTorch at the inputs' precision."""
    truth = run(attention_reference, inputs, torch.float64)
    plain = run(attention_reference, inputs, upcast=False)
    # The kernels return lse in float32 for all inputs, so 16-bit rounding excuses no error in it.
    plain["lse"] = run(attention_reference, inputs)["lse"]
    return truth, plain


def rounded_delta_loss(inputs: Inputs, error: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return what the gradients of `names` lose because delta = sum(out * dout) uses a 16-bit out.

    dbias and dsinks are sums over many rows in which the truth cancels, but this does not. An error of delta acts like
    a gradient of lse with the other sign. The rule limits the error of out itself.
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
    """Allow |ours - truth| twice what plain PyTorch loses at the same precision, and a rounding step of the output.

    This is FlashAttention's rule. The root mean square of the error is also bounded, relative to that of the truth, and
    so is the part of it that is a multiple of the truth: a wrong factor leaves one, rounding of either sign none.

    deviation: expected rounding in float32 (tests/rounding.py), a floor under each bound in case plain PyTorch is
    lucky. excused: a known error, allowed in addition to plain PyTorch's.
    """
    is_infinite = torch.isinf(truth)
    assert torch.equal(is_infinite, torch.isinf(ours)), f"{name} and the truth are not infinite at the same elements"
    ours, plain, truth = (x.double().masked_fill(is_infinite, 0.0) for x in (ours, plain, truth))
    deviation = (deviation + torch.zeros_like(truth)).masked_fill(is_infinite, 0.0)
    if truth.numel() == 0:
        return
    known = torch.zeros_like(truth) if excused is None else excused
    # The two errors are independent: the bound must not shrink if they cancel.
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
    """Return which tiles of a launch hold a True of the mask `dense` (Tq, Tk): (tiles of queries, tiles of keys)."""
    m, n = launch.args["BLOCK_M"], launch.args["BLOCK_N"]
    Tq, Tk = dense.shape
    padded = torch.zeros(-(-Tq // m) * m, -(-Tk // n) * n, dtype=torch.bool)
    padded[:Tq, :Tk] = dense
    return padded.view(padded.shape[0] // m, m, padded.shape[1] // n, n).any(3).any(1)


@contextmanager
def poisoned_outputs():
    """Fill outputs with NaN before the kernels write them, so that missing writes are found."""
    empty = Problem.empty

    def poisoned(self, *shape, dtype=None):
        return empty(self, *shape, dtype=dtype).fill_(math.nan)

    with mock.patch.object(Problem, "empty", poisoned):
        yield

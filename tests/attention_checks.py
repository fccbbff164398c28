"""How right is right: the rule by which the kernels are compared to the reference, in one place."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from kernels import attention, attention_reference, masks
from kernels.problem import Problem

# What the root mean square of an error may be, relative to that of the truth: a few rounding steps.
RMS_LIMIT = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


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


def check(case: Case, device: str, slack: float = 1.0) -> None:
    """Hold the kernels to the reference in float64. Outputs are NaN before the kernels write them.

    slack: how many times the allowed error is allowed, where many cases are tried: the rule compares the largest errors
    of two small samples, and by chance one is more than twice the other. Such cases also allow dq, dk and dv what a
    rounded delta costs exactly: where a query sees two keys it can be more than all that plain PyTorch loses.
    """
    inputs = make_inputs(case, device)
    with poisoned_outputs():
        ours = run(attention, inputs, impl="triton")
    truth = run(attention_reference, inputs, torch.float64)
    plain = run(attention_reference, inputs, upcast=False)
    # lse leaves the kernels in float32, whatever the inputs: no 16-bit rounding excuses it.
    plain["lse"] = run(attention_reference, inputs)["lse"]
    excused = ("bias", "sinks") if slack == 1 else tuple(inputs.differentiable)
    for name, loss in rounded_delta_loss(inputs, ours["out"].double() - truth["out"], excused).items():
        # The two errors are independent: that they cancel here allows no less.
        plain[name] = plain[name] + torch.copysign(loss, plain[name].double() - truth[name])
    for name in truth:
        assert ours[name].shape == truth[name].shape
        loss, rms_loss = base2_loss(name, inputs, truth), 0.0 if slack == 1 else lone_keys_loss(name, inputs)
        assert_close(name, ours[name], plain[name], truth[name], case.dtype, loss, slack, rms_loss)


def check_against_reference(case: Case, impl: str) -> None:
    """Hold a path of plain PyTorch to the reference in the same dtype: out, lse and every gradient."""
    inputs = make_inputs(case, "cpu")
    ours, expected = (run(attention, inputs, impl=name) for name in (impl, "reference"))
    step = {torch.float64: 1e-6, torch.float32: 1e-4}.get(case.dtype, 5e-2)
    for name in expected:
        assert ours[name].dtype == expected[name].dtype, name
        largest = expected[name].nan_to_num(0, 0, 0).abs().max().item() if expected[name].numel() else 0.0
        atol = step * max(1.0, largest)
        torch.testing.assert_close(ours[name], expected[name], rtol=step, atol=atol, msg=f"{name}: {{}}".format)


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


def base2_loss(name: str, inputs: Inputs, truth: dict[str, Tensor]) -> float:
    """What FlashAttention's way loses in float32 beside plain PyTorch's; nothing next to 16-bit rounding.

    lse is rounded on its way to base 2 and back, and weights are recomputed from it. dp - delta is a difference of two
    sums in different orders, where softmax's own gradient would cancel exactly; a few rounding steps of dp remain.
    """
    step = 2.0**-24
    if name == "out":
        return 0.0
    loss = 3 * step * truth["lse"].nan_to_num(0, 0, 0).abs().max().item()
    if name == "lse":
        return loss
    loss *= truth[name].abs().max().item()
    v, other = inputs.differentiable["v"], {"dq": "k", "dk": "q"}.get(name)
    if other is None and name != "dbias":
        return loss
    dp = inputs.dout.float().norm(dim=-1).max() * v.float().norm(dim=-1).max()
    if name == "dbias":
        # A sum over many rows, each with an error of its own sign.
        rows = inputs.dlse.numel() / max(1, truth[name].numel() // inputs.differentiable["k"].shape[1])
        return loss + 2 * step * dp.item() * max(1.0, rows) ** 0.5
    x = inputs.differentiable[other].float()
    scale = inputs.arguments["scale"] or x.shape[-1] ** -0.5
    return loss + 2 * step * abs(scale) * (dp * x.abs().max()).item()


def lone_keys_loss(name: str, inputs: Inputs) -> float:
    """What queries that see one key alone leave in dq and dk, as a root mean square.

    Their dp - delta is exactly zero, so that the truth has nothing of it; ours has some rounding steps of dp, the same
    sum in two orders. Where few queries see more, that is more than any share of the truth.
    """
    other = {"dq": "k", "dk": "q"}.get(name)
    if other is None or "sinks" in inputs.differentiable:
        return 0.0
    q, k, v = (inputs.differentiable[x].float() for x in "qkv")
    seeing = {x: inputs.arguments[x] for x in ("mask", "segment_ids") if x in inputs.arguments}
    _, lse = attention_reference(torch.zeros_like(q), k, v, **seeing, return_lse=True)  # log of the number of keys
    lone = (lse.exp().round() == 1).sum().item()
    dp = root_mean_square(inputs.dout.float().norm(dim=-1)) * root_mean_square(v.norm(dim=-1))
    dp /= 1 - (inputs.arguments.get("dropout_p") or 0.0)
    x, scale = inputs.differentiable[other].float(), inputs.arguments["scale"] or q.shape[-1] ** -0.5
    rows = math.prod(inputs.differentiable[name[1:]].shape[:3])
    return 2 * 2.0**-24 * abs(scale) * dp * root_mean_square(x) * (lone / max(rows, 1)) ** 0.5


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(
    name: str,
    ours: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    loss=0.0,
    slack=1.0,
    rms_loss=0.0,
) -> None:
    """|ours - truth| may be twice what plain PyTorch loses at the same precision, and a rounding step of the output.

    FlashAttention's rule. The root mean square of the error is bounded as well, relative to that of the truth.
    `loss`, `rms_loss`: what is allowed beside these; they are of float32's order.
    """
    is_infinite = torch.isinf(truth)
    assert torch.equal(is_infinite, torch.isinf(ours)), f"{name} is infinite elsewhere than the truth"
    ours, plain, truth = (x.double().masked_fill(is_infinite, 0.0) for x in (ours, plain, truth))
    if truth.numel() == 0:
        return
    stored = torch.float32 if name == "lse" else dtype
    rounding = ((truth.to(stored) + 0.3) - 0.3 - truth.to(stored)).abs().max().double()
    error = (ours - truth).abs().max()
    allowed = 2 * (plain - truth).abs().max() + 2 * rounding + loss
    assert error <= slack * allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    rms_error, rms_truth = (ours - truth).square().mean().sqrt(), truth.square().mean().sqrt()
    rms_plain = (plain - truth).square().mean().sqrt()
    limit = max(RMS_LIMIT[stored] * rms_truth, 1.5 * rms_plain) + (loss if name == "dbias" else 0.0) + rms_loss
    assert rms_error <= slack * limit, f"{name}: RMS error {rms_error:.3e}, limit {limit:.3e}"


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

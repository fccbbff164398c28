"""The fused loss, one chunk of rows at a time: torch's matrix products around one pass over the chunk's logits.

For each chunk: logits = x @ weight.T into a buffer that all chunks share; losses, and gradients over the logits;
dx = gradients @ weight; dweight += gradients.T @ x. A sum has one upstream gradient, a number, so the forward pass does
all this and the backward pass scales it: three products, as many as without fusion. Single losses (`losses_of`) have
one upstream gradient each, so their backward pass computes the logits again.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import on_device_of, triton
from kernels.operators import accumulated, guarded

if triton is not None:
    from kernels import cross_entropy_triton

# Bytes of logits in a chunk. On a GPU, dx (rows by C, the smallest product) must fill the chip with tiles, and reading
# and writing dweight must cost little beside its product. On a CPU, a chunk must repay reading the weight once more.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
ROW_MULTIPLE = 128


class Options(NamedTuple):
    """The options of kernels.linear_cross_entropy; softcap 0 for none. triton: use the kernels."""

    softcap: float
    z_loss: float
    label_smoothing: float
    ignore_index: int
    triton: bool


def chunk_rows(N: int, V: int, itemsize: int, device_type: str) -> int:
    """Return the rows of a chunk: chunks are nearly equal, in multiples of 128 rows if that many fit."""
    most = max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (V * itemsize))
    multiple = ROW_MULTIPLE if most >= ROW_MULTIPLE else 1
    most -= most % multiple
    even = -(-N // max(1, -(-N // most)))
    return max(1, min(N, -(-even // multiple) * multiple))


def _empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows with their logits, in x's dtype. The next chunk overwrites them."""
    N, V = x.shape[0], weight.shape[0]
    rows = chunk_rows(N, V, x.element_size(), x.device.type)
    # Rows begin at multiples of 64 elements, since products and kernels read 16 bytes at a time.
    buffer = _empty(rows, -(-V // 64) * 64, like=x)
    # oneDNN's bfloat16 product with AMX reads a row up to a multiple of 32: NaN there would reach dx.
    buffer[:, V:] = 0
    for begin in range(0, N, rows):
        at = slice(begin, min(begin + rows, N))
        logits = buffer[: at.stop - begin, :V]
        yield at, torch.mm(x[at], weight.t(), out=logits)


class _Gradients:
    """Accumulates dx (N, C) in x's dtype and dweight (V, C) in float32 (float64 for float64), chunk by chunk."""

    def __init__(self, x: Tensor, weight: Tensor, wants_dx: bool, wants_dweight: bool):
        self.x, self.weight, self.is_first = x, weight, True
        self.dx = _empty(*x.shape, like=x) if wants_dx else None
        self.dweight = _empty(*weight.shape, like=x, dtype=accumulated(x.dtype)) if wants_dweight else None
        if wants_dweight and x.shape[0] == 0:
            self.dweight.zero_()

    def add(self, at: slice, dlogits: Tensor) -> None:
        if self.dx is not None:
            torch.mm(dlogits, self.weight, out=self.dx[at])
        if self.dweight is not None:
            add_product(self.dweight, dlogits.t(), self.x[at], self.is_first)
        self.is_first = False

    def results(self) -> tuple[Tensor, Tensor]:
        """Return dx and dweight, empty if not wanted: an operator must return tensors."""
        return tuple(self.x.new_empty(0) if grad is None else grad for grad in (self.dx, self.dweight))


def add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """Set total = a @ b, or add it; total is float32 even if a and b have 16 bits."""
    beta = 0 if is_first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


# One chunk in plain PyTorch, as cross_entropy_triton.py does it in one kernel.


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """Apply the softcap, in the dtype of sums. Without a softcap the result may share memory with logits."""
    s = logits.to(accumulated(logits.dtype))
    return softcap * torch.tanh(s / softcap) if softcap else s


def _losses(logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, options: Options) -> None:
    s = _capped(logits, options.softcap)
    counts = targets != options.ignore_index
    index = targets.masked_fill(~counts, 0)[:, None]
    torch.logsumexp(s, 1, out=lse)
    s_target = s.gather(1, index)[:, 0]
    torch.sub(lse, s_target, out=losses)
    if options.label_smoothing:
        losses.add_(s_target - s.mean(1), alpha=options.label_smoothing)
    if options.z_loss:
        losses.addcmul_(lse, lse, value=options.z_loss)
    losses.masked_fill_(~counts, 0.0)


def _to_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, options: Options) -> None:
    """Overwrite logits with dlosses * d losses / d logits."""
    smoothing, counts = options.label_smoothing, targets != options.ignore_index
    index = targets.masked_fill(~counts, 0)[:, None]
    gradient = _capped(logits, options.softcap)
    slope = 1 - (gradient / options.softcap).square() if options.softcap else None
    gradient.sub_(lse[:, None]).exp_().mul_((1 + 2 * options.z_loss * lse)[:, None])
    if smoothing:
        gradient.sub_(smoothing / logits.shape[1])
    gradient.scatter_add_(1, index, gradient.new_full((1, 1), smoothing - 1).expand(index.shape))
    if slope is not None:
        gradient.mul_(slope)
    gradient.mul_(dlosses[:, None]).masked_fill_(~counts[:, None], 0.0)
    if gradient is not logits:
        logits.copy_(gradient)


def _run_losses(logits, targets, losses, lse, options: Options, gradient: bool) -> None:
    """Compute losses and lse of a chunk and, if wanted, overwrite its logits with gradients."""
    if options.triton:
        terms = cross_entropy_triton.Terms(*options[:4])
        cross_entropy_triton.loss_launch(logits, targets, losses, lse, terms, gradient).run()
    else:
        _losses(logits, targets, losses, lse, options)
        if gradient:
            _to_gradient(logits, targets, lse, torch.ones_like(lse), options)


def _run_gradient(logits, targets, lse, dlosses, options: Options) -> None:
    if options.triton:
        terms = cross_entropy_triton.Terms(*options[:4])
        cross_entropy_triton.gradient_launch(logits, targets, lse, dlosses, terms).run()
    else:
        _to_gradient(logits, targets, lse, dlosses, options)


# All chunks.


@contextlib.contextmanager
def _prepared(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int):
    """Yield x, weight in x's dtype and targets, all contiguous, with autocast off and x's device current."""
    if x.device.type == "cpu":
        check_targets(targets, weight.shape[0], ignore_index)
    with torch.autocast(x.device.type, enabled=False), on_device_of(x):
        yield x.contiguous(), weight.to(x.dtype).contiguous(), targets.contiguous()


def check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    """Raise IndexError, as torch does on a CPU, for a target outside the weight's rows."""
    wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
    if wrong.numel():
        raise IndexError(f"target {wrong[0].item()} is out of bounds: the weight has {V} rows")


def _forward(x, weight, targets, options: Options, wants_dx: bool, wants_dweight: bool):
    """Return losses (N,), lse (N,), and dx and dweight of the sum of the losses."""
    N = x.shape[0]
    losses, lse = (_empty(N, like=x, dtype=accumulated(x.dtype)) for _ in range(2))
    with _prepared(x, weight, targets, options.ignore_index) as (x, weight, targets):
        gradients = _Gradients(x, weight, wants_dx, wants_dweight)
        for at, logits in _chunks(x, weight):
            _run_losses(logits, targets[at], losses[at], lse[at], options, wants_dx or wants_dweight)
            if wants_dx or wants_dweight:
                gradients.add(at, logits)
    return losses, lse, *gradients.results()


# The operators, each differentiable once. They take x (N, C), weight (V, C), targets (N,) and the fields of Options.
_CALL = (
    "Tensor x, Tensor weight, Tensor targets, float softcap, float z_loss, float label_smoothing, SymInt ignore_index, "
    "bool triton"
)
_TOTAL = f"({_CALL}, bool wants_dx, bool wants_dweight) -> (Tensor, Tensor, Tensor)"
_LOSSES = f"({_CALL}) -> (Tensor, Tensor)"
_LOSSES_BACKWARD = f"(Tensor dlosses, Tensor lse, {_CALL}, bool wants_dx, bool wants_dweight) -> (Tensor, Tensor)"


@torch.library.custom_op("linear_cross_entropy::total", mutates_args=(), schema=_TOTAL)
def total_of(x, weight, targets, *options):
    """Return the sum of the losses, and dx and dweight if wanted."""
    *options, wants_dx, wants_dweight = options
    losses, _, dx, dweight = _forward(x, weight, targets, Options(*options), wants_dx, wants_dweight)
    return losses.sum(), dx, dweight


@total_of.register_fake
def _(x, weight, targets, *options):
    wants_dx, wants_dweight = options[-2:]
    total = x.new_empty((), dtype=accumulated(x.dtype))
    return total, *_fake_gradients(x, weight, wants_dx, wants_dweight)


def _fake_gradients(x, weight, wants_dx, wants_dweight):
    dx = x.new_empty(x.shape) if wants_dx else x.new_empty(0)
    dweight = x.new_empty(weight.shape, dtype=accumulated(x.dtype)) if wants_dweight else x.new_empty(0)
    return dx, dweight


@torch.library.custom_op("linear_cross_entropy::scaled", mutates_args=())
def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad (n, C) times the number `scale` in a dtype; the product is computed in scale's, float32 or more."""
    # A tensor without axes would take grad's dtype, which would round a scale of 1 / N to 16 bits.
    return torch.mul(grad, scale.reshape(1, 1), out=torch.empty_like(grad, dtype=dtype))


@_scaled.register_fake
def _(grad, scale, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _save_total(ctx, inputs, output) -> None:
    ctx.wants, ctx.dtype = inputs[-2:], inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    # Pass None, not zeros, for the gradients of dx and dweight, which are not differentiated.
    ctx.set_materialize_grads(False)


def _total_gradients(ctx, dtotal, *_) -> tuple:
    dx, dweight = ctx.saved_tensors
    wants_dx, wants_dweight = (wanted and dtotal is not None for wanted in ctx.wants)
    dx = _guarded_scaled(dx, dtotal, dx.dtype) if wants_dx else None
    dweight = _guarded_scaled(dweight, dtotal, ctx.dtype) if wants_dweight else None
    return dx, dweight, *[None] * 8


@torch.library.custom_op("linear_cross_entropy::losses", mutates_args=(), schema=_LOSSES)
def losses_of(x, weight, targets, *options):
    """Return losses (N,) and lse (N,)."""
    return _forward(x, weight, targets, Options(*options), False, False)[:2]


@losses_of.register_fake
def _(x, *args):
    return tuple(x.new_empty(x.shape[0], dtype=accumulated(x.dtype)) for _ in range(2))


@torch.library.custom_op("linear_cross_entropy::losses_backward", mutates_args=(), schema=_LOSSES_BACKWARD)
def _losses_backward(dlosses, lse, x, weight, targets, *options):
    *options, wants_dx, wants_dweight = options
    options = Options(*options)
    dlosses = dlosses.contiguous()
    with _prepared(x, weight, targets, options.ignore_index) as (x, weight, targets):
        gradients = _Gradients(x, weight, wants_dx, wants_dweight)
        for at, logits in _chunks(x, weight):
            _run_gradient(logits, targets[at], lse[at], dlosses[at], options)
            gradients.add(at, logits)
    return gradients.results()


@_losses_backward.register_fake
def _(dlosses, lse, x, weight, targets, *options):
    return _fake_gradients(x, weight, *options[-2:])


def _save_losses(ctx, inputs, output) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(output[1], x, weight, targets)


def _losses_gradients(ctx, dlosses, dlse) -> tuple:
    lse, x, weight, targets = ctx.saved_tensors
    wants = ctx.needs_input_grad[:2]
    dx, dweight = _guarded_losses_backward(dlosses, lse, x, weight, targets, *ctx.options, *wants)
    return dx if wants[0] else None, dweight.to(weight.dtype) if wants[1] else None, *[None] * 6


def _no_second_gradient(ctx, *grads):
    raise NotImplementedError('linear_cross_entropy has a second derivative only with impl="reference"')


total_of.register_autograd(_total_gradients, setup_context=_save_total)
losses_of.register_autograd(_losses_gradients, setup_context=_save_losses)
_scaled.register_autograd(_no_second_gradient)
_losses_backward.register_autograd(_no_second_gradient)

NO_TRANSFORMS = (
    "the kernels and the chunked path of linear_cross_entropy have no forward-mode derivatives and no torch.func "
    'transforms: impl="reference" has both'
)
guarded_total, guarded_losses = guarded(total_of, NO_TRANSFORMS), guarded(losses_of, NO_TRANSFORMS)
_guarded_scaled, _guarded_losses_backward = guarded(_scaled, NO_TRANSFORMS), guarded(_losses_backward, NO_TRANSFORMS)

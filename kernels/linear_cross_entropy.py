"""`linear_cross_entropy`: the output head and its loss in one call, without holding all logits.

triton      chunks of rows; one kernel turns a chunk of logits into its gradients (cross_entropy_triton.py), on a GPU
chunked     the same in plain PyTorch (linear_cross_entropy_chunks.py)
reference   F.linear and F.cross_entropy, which hold all logits
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import (
    LARGEST,
    SMALLEST,
    as_floats,
    autocasts,
    check_choice,
    check_integer,
    check_number,
    check_real,
    check_tensors,
)
from kernels.dispatch import announce, require_able, why_not_triton
from kernels.linear_cross_entropy_chunks import chunk_rows, guarded_losses, guarded_total
from kernels.operators import is_transformed

IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")
# Without a GPU, the most logits to hold: 64 MiB in float32.
MOST_LOGITS = 1 << 24


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Compute the cross entropy, in nats, of targets under the logits x @ weight.T.

    x (..., C) and weight (V, C) of one dtype (autocast casts both), targets (...) int64; any strides. Returns one
    number for "mean" (over the targets that count) and "sum", or one loss for each target for "none", in float32
    (float64 for float64).

    With l = x @ weight.T in x's dtype, s = softcap * tanh(l / softcap), lse = log(sum(exp(s))) and e = label_smoothing:

        loss = lse - (1 - e) * s[target] - e * mean(s) + z_loss * lse^2

    softcap          positive, a bound on |s| (https://arxiv.org/abs/2408.00118), or None
    z_loss           weight of lse^2, which keeps lse near 0 (https://arxiv.org/abs/2204.02311 uses 1e-4)
    label_smoothing  share of the target spread over all V (https://arxiv.org/abs/1512.00567)
    ignore_index     a target that does not count: its loss and gradient are 0
    impl             "triton", "chunked", "reference", or "auto": Triton on a GPU from sm_80 up; elsewhere the reference
                     for few logits, chunked for many

    The mean over no target at all is 0, with gradients of 0, where F.cross_entropy's is NaN: a micro-batch or a process
    without targets adds nothing.

    Memory: one chunk of logits in x's dtype, at most 1 GiB on a GPU and 64 MiB on a CPU. "mean" and "sum" compute
    their gradients in the forward pass, chunk by chunk, and scale them in the backward pass: dweight, in float32, is
    kept between the two. "none" computes the logits a second time instead. docs/loss.md compares this with other ways.

    Differentiable once, backwards; the reference also forwards, twice and under torch.func.

    Raises ValueError or TypeError for invalid arguments; IndexError, on a CPU, for a target outside the vocabulary (a
    GPU cannot raise: the loss and gradient are NaN); NotImplementedError for impl="triton" where it cannot run, and for
    a derivative that impl="triton" and "chunked" do not have.
    """
    _check(x, weight, targets, softcap, z_loss, label_smoothing, ignore_index, reduction)
    check_choice("impl", impl, IMPLEMENTATIONS)
    softcap, z_loss, label_smoothing = as_floats(softcap, z_loss, label_smoothing)
    device_type = x.device.type
    if autocasts(device_type) and x.dtype != torch.float64:
        # The operator casts the weight, so that dweight keeps the precision in which it was summed.
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype != weight.dtype:
        raise TypeError(f"x and weight must have one dtype, not {x.dtype} and {weight.dtype}")
    if impl == "auto":
        impl = _choose(x, weight, targets)
    elif impl == "triton":
        require_able(impl, why_not_triton(x))
    if impl == "reference":
        weight = weight.to(x.dtype)
        return _reference(x, weight, targets, softcap, z_loss, label_smoothing, ignore_index, reduction)

    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)  # (N, C), (N,)
    options = softcap or 0.0, z_loss, label_smoothing, ignore_index, impl == "triton"
    if reduction == "none":
        return guarded_losses(rows, weight, flat, *options)[0].view(targets.shape)
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    total = guarded_total(rows, weight, flat, *options, *wants)[0]
    return total if reduction == "sum" else _mean(total, flat != ignore_index)


def _mean(total: Tensor, counts: Tensor) -> Tensor:
    """Divide the total by the number of targets that count; 0 / 1 if none does."""
    return total / counts.sum().clamp(min=1)


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Compute the same in plain PyTorch: the specification. Holds all logits, in float32 (float64 for float64)."""
    _check(x, weight, targets, softcap, z_loss, label_smoothing, ignore_index, reduction)
    softcap, z_loss, label_smoothing = as_floats(softcap, z_loss, label_smoothing)
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"x and weight must have one dtype, not {x.dtype} and {weight.dtype}")
    return _reference(x, weight, targets, softcap, z_loss, label_smoothing, ignore_index, reduction)


def _reference(x, weight, targets, softcap, z_loss, label_smoothing, ignore_index, reduction) -> Tensor:
    logits = F.linear(x, weight).view(-1, weight.shape[0])  # (N, V)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = targets.flatten()  # (N,)
    counts = flat != ignore_index
    in_one = reduction != "none" and z_loss == 0
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses = F.cross_entropy(logits, flat, **options, reduction="sum" if in_one else "none")
    if z_loss != 0:
        losses = losses + (z_loss * logits.logsumexp(-1).square()).masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses if in_one else losses.sum()
    return total if reduction == "sum" else _mean(total, counts)


def _check(x, weight, targets, softcap, z_loss, label_smoothing, ignore_index, reduction) -> None:
    check_tensors(x=x, weight=weight, targets=targets)
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(f"x (..., C) and weight (V, C) do not fit: {tuple(x.shape)} and {tuple(weight.shape)}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets must have the shape {tuple(x.shape[:-1])}, as x without its last axis, not {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, not {targets.dtype}")
    check_real(x=x, weight=weight)
    if not (x.device == weight.device == targets.device):
        found = f"{x.device}, {weight.device} and {targets.device}"
        raise ValueError(f"x, weight and targets must be on one device, not {found}")
    if softcap is not None:
        check_number("softcap", softcap, SMALLEST, LARGEST, "a positive number in float32's range, or None")
    check_number("z_loss", z_loss, 0, LARGEST, "a number in float32's range, at least 0")
    check_number("label_smoothing", label_smoothing, 0, 1, "a number between 0 and 1")
    check_integer("ignore_index", ignore_index)
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def _choose(x: Tensor, weight: Tensor, targets: Tensor) -> str:
    """Choose the path of "auto"."""
    why_not = why_not_triton(x) if x.is_cuda else "no GPU"
    if is_transformed(x, weight, targets):
        choice, why_not = "reference", "torch.func or forward-mode differentiation is at work"
    elif why_not is None:
        choice = "triton"
    else:
        N = x.numel() // x.shape[-1]
        choice = "reference" if N * weight.shape[0] <= MOST_LOGITS else "chunked"
    announce("linear_cross_entropy", choice, why_not)
    return choice


def workspace_bytes(N: int, V: int, C: int, dtype: torch.dtype, device_type: str) -> int:
    """Return the bytes that "auto" needs only while it computes the loss of x (N, C) and a float32 weight (V, C).

    These are a chunk of logits, the weight in 16 bits and, without the kernels, float32 copies of the chunk or a
    product of the weight's size; none if there are few logits, which are all kept for the backward pass.
    """
    on_gpu, is_half = device_type == "cuda", dtype.itemsize < 4
    if not on_gpu and N * V <= MOST_LOGITS:
        return 0
    rows, padded = chunk_rows(N, V, dtype.itemsize, device_type), -(-V // 64) * 64
    weight = V * C * dtype.itemsize * is_half
    beside = 0 if on_gpu else max(rows * V * 4 * (1 + is_half), weight)
    return rows * padded * dtype.itemsize + weight + beside

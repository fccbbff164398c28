"""The Triton path as PyTorch operators: eager, autograd, torch.compile, activation checkpointing."""

import contextlib

import torch
import triton
from torch import Tensor

from kernels.attention_backward import backward
from kernels.attention_forward import forward
from kernels.masks import Mask
from kernels.problem import Problem

# Whether the kernels run in numpy. The choice fell when they were defined.
INTERPRETED = triton.knobs.runtime.interpret


def why_not_triton(q: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why our kernels cannot do this call; None if they can."""
    if not runs_on(q.device):
        return f"{q.device} is no GPU from sm_80 up"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    for D in (q.shape[3], v.shape[3]):
        if not 8 <= D <= 256:
            return f"head_dim {D} is not supported: 8 to 256 are"
    if bias is not None and bias.requires_grad:
        return "the gradient of bias is not there yet"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: a GPU from sm_80 (or CDNA 3) up, or the interpreter for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8
    return device.type == "cpu" and INTERPRETED


def attention_triton(q, k, v, *, mask: Mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed):
    """out (B, Tq, H, Dv) and lse (B, H, Tq): see `kernels.attention`."""
    segments_q = segments_k = None
    if segment_ids is not None:
        segments_q, segments_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    elif isinstance(seed, int):
        seed = torch.full((1,), seed, dtype=torch.int64, device=q.device)
    return _forward(
        q,
        k,
        v,
        mask.key,
        len(mask.bands),
        list(mask.operands),
        [row.contiguous() for row in mask.tensors],
        _packed(segments_q),
        _packed(segments_k),
        q.shape[3] ** -0.5 if scale is None else scale,
        softcap or 0.0,
        _packed(alibi_slopes),
        bias,
        _packed(sinks),
        dropout_p,
        seed,
    )


def _packed(small: Tensor | None) -> Tensor | None:
    """One or two numbers for a head or a position: not worth strides of their own in the kernels."""
    return None if small is None else small.contiguous()


def _on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("triton_attention::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    n_bands: int,
    mask_ints: list[int],
    mask_rows: list[Tensor],
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A custom operator takes no objects: a mask comes as its key, its numbers and its tensors."""
    problem = Problem(
        q, k, v, mask, n_bands, mask_ints, mask_rows, segments_q, segments_k, scale, softcap, alibi_slopes, bias,
        sinks, dropout_p, seed,
    )  # fmt: skip
    with _on_device_of(q):
        return forward(problem)


@_forward.register_fake
def _(q, k, v, *args):
    B, Tq, H, _ = q.shape
    return q.new_empty(B, Tq, H, v.shape[3]), q.new_empty(B, H, Tq, dtype=torch.float32)


@torch.library.custom_op("triton_attention::backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    n_bands: int,
    mask_ints: list[int],
    mask_rows: list[Tensor],
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks, which is empty where there are none."""
    problem = Problem(
        q, k, v, mask, n_bands, mask_ints, mask_rows, segments_q, segments_k, scale, softcap, alibi_slopes, bias,
        sinks, dropout_p, seed,
    )  # fmt: skip
    with _on_device_of(q):
        dq, dk, dv, dsinks = backward(problem, out, lse, dout, dlse)
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if dsinks is None else dsinks


@_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, *args):
    sinks = args[-3]
    dsinks = q.new_empty(0 if sinks is None else sinks.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _setup_context(ctx, inputs, output) -> None:
    (q, k, v, mask, n_bands, mask_ints, mask_rows, segments_q, segments_k, scale, softcap, alibi_slopes, bias, sinks,
     dropout_p, seed) = inputs  # fmt: skip
    ctx.save_for_backward(q, k, v, segments_q, segments_k, alibi_slopes, bias, sinks, seed, *output, *mask_rows)
    ctx.constants = mask, n_bands, mask_ints, scale, softcap, dropout_p
    # An output that nobody differentiates brings None, not a tensor of zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    q, k, v, segments_q, segments_k, alibi_slopes, bias, sinks, seed, out, lse, *mask_rows = ctx.saved_tensors
    mask, n_bands, mask_ints, scale, softcap, dropout_p = ctx.constants
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsinks = _backward(
        dout, dlse, out, lse, q, k, v, mask, n_bands, mask_ints, mask_rows, segments_q, segments_k, scale, softcap,
        alibi_slopes, bias, sinks, dropout_p, seed,
    )  # fmt: skip
    dsinks = None if sinks is None else dsinks.to(sinks.dtype)
    constants = [None] * 3 + [[None] * len(mask_rows)] + [None] * 6
    return dq, dk, dv, *constants, dsinks, None, None


def _no_second_gradient(ctx, *grads):
    raise NotImplementedError('attention has no second derivative in the kernels: impl="reference" has one')


_forward.register_autograd(_gradients, setup_context=_setup_context)
_backward.register_autograd(_no_second_gradient)

"""`attention` checks its arguments and takes one of four paths.

triton      our own kernels, forward and backward, on a GPU (attention_forward.py, attention_backward.py)
sdpa        torch's scaled_dot_product_attention, if it supports the call (attention_sdpa.py)
chunked     plain PyTorch in little memory, for any call (attention_chunked.py)
reference   plain PyTorch, for any call: the specification (attention_reference.py)
"""

import torch
from torch import Tensor

from kernels.arguments import autocasts, check_choice
from kernels.attention_arguments import Arguments, check_dtypes, checked
from kernels.attention_chunked import attend_chunked
from kernels.attention_reference import attend_in_full
from kernels.attention_sdpa import attention_sdpa, why_not_sdpa
from kernels.dispatch import announce, on_device_of, require_able, triton, why_not_triton
from kernels.mask import Mask
from kernels.masks import CAUSAL, FULL
from kernels.operators import Call, call_of, define, has_tangent, is_transformed

if triton is not None:
    from kernels.attention_backward import backward
    from kernels.attention_forward import forward
    from kernels.problem import Problem

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "chunked", "reference")
# The most scores to hold at once: a matrix of 16 MiB in float32.
MOST_SCORES = 1 << 22


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = CAUSAL,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
):
    """Compute scaled, masked softmax attention (https://arxiv.org/abs/1706.03762).

    q (B, Tq, H, D); k (B, Tk, H_kv, D); v (B, Tk, H_kv, Dv), H a multiple of H_kv: head h attends to the keys of head
    h // (H / H_kv). All of one dtype and device, any strides. Returns (B, Tq, H, Dv) in q's dtype and, with
    `return_lse`, also lse (B, H, Tq) in float32.

    Query i is at position i + Tk - Tq: the last query at the last key. For each pair of positions
    s = scale * q.k, then softcap * tanh(s / softcap), then - alibi_slopes[h] * |q - k|, then + bias. Pairs that the
    mask or the segments hide are dropped; then softmax and dropout. A query that sees no key gives zeros.

    mask          from `kernels.masks`, such as masks.CAUSAL & masks.sliding_window(256)
    segment_ids   int32 (B, T), or a pair (B, Tq), (B, Tk): a query sees only keys of its own segment
    scale         1 / sqrt(D) if None; at most 1e30 in size
    softcap       1e-30 to 1e30, a bound on |s| (https://arxiv.org/abs/2408.00118)
    alibi_slopes  (H,), without gradients (https://arxiv.org/abs/2108.12409)
    bias          floats of any magnitude; broadcasts to (B, H, Tq, Tk); -inf hides a pair
    sinks         (H,), a logit for each head that is added to the denominator (https://arxiv.org/abs/2309.17453)
    dropout_p     the share of weights dropped, 0 <= p < 1; the choice depends on (seed, b, h, i, j) alone
    seed          an int or a one-element int64 tensor; drawn from the device's generator if None
    return_lse    also return log(sum(exp(s))), natural, including the sink, before dropout; differentiable
    impl          "triton", "sdpa", "chunked", "reference", or "auto": Triton on a GPU from sm_80 up, else the fastest

    Raises ValueError or TypeError for invalid arguments, NotImplementedError for an `impl` that cannot do the call or
    cannot run here.
    """
    check_dtypes(q, k, v)
    if autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    call = Arguments(q, k, v, mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed, return_lse)
    call = checked(call)
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes have no gradient: detach them, or learn a bias")
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "auto":
        impl = _choose(call)
    elif impl == "triton":
        require_able(impl, why_not_triton(q, q.shape[3], v.shape[3]))
    elif impl == "sdpa":
        require_able(impl, why_not_sdpa(call))
    if impl == "sdpa":
        return attention_sdpa(call)
    if impl == "reference":
        out, lse = attend_in_full(call)
    else:
        out, lse = (attend_chunked if impl == "chunked" else _attend_in_triton)(*call_of(call))
    return (out, lse) if return_lse else out


def _choose(call: Arguments) -> str:
    """Choose the path of "auto": our kernels on a GPU, else torch's own attention, else plain PyTorch.

    Neither torch's attention with a mask nor the reference gets a matrix of more than MOST_SCORES.
    """
    q, k, v = call[:3]
    differentiated = q, k, v, call.alibi_slopes, call.bias, call.sinks
    if not q.is_cuda:
        why_not = "no GPU"
    elif is_transformed(*differentiated):
        why_not = "torch.func is at work"
    else:
        why_not = why_not_triton(q, q.shape[3], v.shape[3])
        if why_not is None:
            announce("attention", "triton", None)
            return "triton"
    Tq, Tk = q.shape[1], k.shape[1]
    has_matrix = not (call.has_mask_only and (call.mask is FULL or (call.mask is CAUSAL and Tq == Tk)))
    if has_matrix and Tq * Tk > MOST_SCORES:
        why_not_torch = "torch's scaled_dot_product_attention would need a matrix of queries by keys"
    elif has_tangent(*differentiated):
        why_not_torch = "torch's scaled_dot_product_attention has no forward-mode derivatives"
    else:
        why_not_torch = why_not_sdpa(call)
    if why_not_torch is None:
        choice = "sdpa"
    else:
        choice = "reference" if q.shape[0] * q.shape[2] * Tq * Tk <= MOST_SCORES else "chunked"
    announce("attention", choice, why_not_torch or why_not)
    return choice


def _run_forward(call: Call):
    with on_device_of(call.q):
        return forward(Problem(call))


def _run_backward(call: Call, out: Tensor, lse: Tensor, shift: Tensor | None, *gradients):
    with on_device_of(call.q):
        return backward(Problem(call, shift=shift), out, lse, *gradients)


_attend_in_triton = define("triton_attention", _run_forward, _run_backward)

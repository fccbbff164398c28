"""`attention`: the one public function. It checks its arguments and sends the call down one of four paths:

triton      our own kernels, forward and backward, on a GPU (attention_forward.py, attention_backward.py)
sdpa        torch's scaled_dot_product_attention, where its arguments allow (attention_sdpa.py)
chunked     plain PyTorch in little memory, which does everything too, a piece at a time (attention_chunked.py)
reference   plain PyTorch, which does everything (attention_reference.py)
"""

import logging

import torch
from torch import Tensor

from kernels.arguments import as_floats, autocasts, check_choice
from kernels.attention_arguments import check_attention, check_dtypes
from kernels.attention_chunked import attention_chunked
from kernels.attention_reference import attention_reference
from kernels.attention_sdpa import attention_sdpa, why_not_sdpa
from kernels.mask import Mask
from kernels.masks import CAUSAL, FULL
from kernels.operators import has_tangent, is_transformed

try:
    from kernels import attention_triton

    triton_missing = None
except ImportError as error:  # macOS and Windows have no triton
    triton_missing = error

log = logging.getLogger("kernels")

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "chunked", "reference")
# More scores than this are not held at once: a matrix of 16 MiB in float32.
MOST_SCORES = 1 << 22
_announced: set[tuple[str, str]] = set()


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
    """Scaled, masked softmax attention (https://arxiv.org/abs/1706.03762).

    q (B, Tq, H, D); k (B, Tk, H_kv, D); v (B, Tk, H_kv, Dv), H a multiple of H_kv: head h attends to the keys of head
    h // (H / H_kv). All of one dtype and device, any strides. Returns (B, Tq, H, Dv) in q's dtype and, with
    `return_lse`, also lse (B, H, Tq) in float32.

    Query i is at position i + Tk - Tq: the last query at the last key. For each pair of positions
    s = scale * q.k, then softcap * tanh(s / softcap), then - alibi_slopes[h] * |q - k|, then + bias; what the mask or
    another segment hides is left out; then softmax, and dropout. A query that sees no key gives zeros.

    mask          from `kernels.masks`, such as masks.CAUSAL & masks.sliding_window(256)
    segment_ids   int32 (B, T), or a pair (B, Tq), (B, Tk): a query sees keys of its own segment only
    scale         1 / sqrt(D) if None; at most 1e30 in size
    softcap       1e-30 to 1e30, a bound on |s| (https://arxiv.org/abs/2408.00118)
    alibi_slopes  (H,), constants (https://arxiv.org/abs/2108.12409)
    bias          floats of any magnitude; broadcasts to (B, H, Tq, Tk); -inf hides a pair
    sinks         (H,), one logit for each head that joins the denominator (https://arxiv.org/abs/2309.17453)
    dropout_p     the share of weights dropped, 0 <= p < 1; which ones depends on (seed, b, h, i, j) alone
    seed          an int or a one-element int64 tensor; drawn from the device's generator if None
    return_lse    also return log(sum(exp(s))), natural, sink included, before dropout; it carries gradients
    impl          "triton", "sdpa", "chunked", "reference", or "auto": Triton on a GPU from sm_80 up, else the fastest

    Raises ValueError or TypeError for arguments that do not fit, NotImplementedError for an `impl` that cannot do the
    call, RuntimeError for one that cannot run here.
    """
    check_dtypes(q, k, v)
    if autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_attention(
        q, k, v, mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed, return_lse=return_lse
    )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes are constants without a gradient: detach them, or learn a bias")
    check_choice("impl", impl, IMPLEMENTATIONS)
    scale, softcap, dropout_p = as_floats(scale, softcap, dropout_p)

    if impl == "auto":
        impl = _choose(q, k, v, mask, segment_ids, softcap, alibi_slopes, bias, sinks, dropout_p, return_lse)
    elif impl in ("triton", "sdpa"):
        _require(impl, q, k, v, mask, segment_ids, softcap, bias, sinks, dropout_p, return_lse)

    if impl == "sdpa":
        return attention_sdpa(q, k, v, mask, segment_ids, scale, alibi_slopes, bias)
    features = {
        "mask": mask,
        "segment_ids": segment_ids,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "sinks": sinks,
        "dropout_p": dropout_p,
        "seed": seed,
    }
    if impl in ("triton", "chunked"):
        run = attention_chunked if impl == "chunked" else attention_triton.attention_triton
        out, lse = run(q, k, v, **features)
        return (out, lse) if return_lse else out
    return attention_reference(q, k, v, **features, return_lse=return_lse)


def _choose(q, k, v, mask, segment_ids, softcap, alibi_slopes, bias, sinks, dropout_p, return_lse) -> str:
    """What "auto" means for this call: our kernels on a GPU, else torch's own attention, else plain PyTorch.

    Neither torch's attention with a mask nor the reference is given a matrix of more than MOST_SCORES.
    """
    followed = q, k, v, alibi_slopes, bias, sinks
    if q.is_cuda:
        why_not = "torch.func is at work" if is_transformed(*followed) else _why_not_triton(q, v)
        if why_not is None:
            _announce("triton", "")
            return "triton"
    else:
        why_not = "no GPU"
    Tq, Tk = q.shape[1], k.shape[1]
    is_plain = segment_ids is None and alibi_slopes is None and bias is None
    has_matrix = not (is_plain and (mask is FULL or (mask is CAUSAL and Tq == Tk)))
    if has_matrix and Tq * Tk > MOST_SCORES:
        why_not_torch = "torch's scaled_dot_product_attention would need a matrix of queries by keys"
    elif has_tangent(*followed):
        why_not_torch = "torch's scaled_dot_product_attention has no forward-mode derivatives"
    else:
        why_not_torch = why_not_sdpa(q, k, mask, segment_ids, softcap, bias, sinks, dropout_p, return_lse)
    if why_not_torch is None:
        choice = "sdpa"
    else:
        choice = "reference" if q.shape[0] * q.shape[2] * Tq * Tk <= MOST_SCORES else "chunked"
    _announce(choice, why_not_torch or why_not)
    return choice


def _require(impl, q, k, v, mask, segment_ids, softcap, bias, sinks, dropout_p, return_lse) -> None:
    """Raise where an explicit choice cannot do the call."""
    if impl == "triton":
        if triton_missing is not None:
            raise RuntimeError(f'impl="triton" needs triton, which does not import here: {triton_missing}')
        if not attention_triton.runs_on(q.device):
            raise RuntimeError(
                f'impl="triton" needs a GPU from sm_80 up, not {q.device}; on a CPU its kernels run in an interpreter '
                "if TRITON_INTERPRET=1 is set before triton is imported"
            )
        why_not = _why_not_triton(q, v)
    else:
        why_not = why_not_sdpa(q, k, mask, segment_ids, softcap, bias, sinks, dropout_p, return_lse)
    if why_not is not None:
        raise NotImplementedError(f'impl="{impl}" cannot do this call: {why_not}')


def _why_not_triton(q: Tensor, v: Tensor) -> str | None:
    if triton_missing is not None:
        return f"triton does not import here: {triton_missing}"
    return attention_triton.why_not_triton(q, v)


def _announce(choice: str, reason: str) -> None:
    """Log what "auto" chose, once for each choice and reason."""
    if (choice, reason) in _announced or torch.compiler.is_compiling():
        return
    _announced.add((choice, reason))
    log.info("attention runs on %s%s", choice, f": {reason}" if reason else "")

"""`attention_decode`: a few new queries of each sequence against a long cache, contiguous or in pages.

It checks its arguments and takes one of three paths:

triton      two kernels of our own, on a GPU (attention_decode_triton.py)
torch       append, gather pages, then call `attention` for each run of sequences of one length
reference   the same with attention_reference, the specification
"""

import torch
from torch import Tensor

from kernels.arguments import as_floats, check_choice
from kernels.attention import attention
from kernels.attention_arguments import DecodeArguments, check_decode, check_lengths
from kernels.attention_decode_reference import attention_decode_reference, by_length
from kernels.dispatch import on_device_of, require_able, triton, why_not_triton
from kernels.mask import Mask
from kernels.masks import CAUSAL
from kernels.operators import DecodeCall, decode_call_of, guarded, is_transformed

if triton is not None:
    from kernels.attention_decode_triton import DecodeProblem, decode

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
NO_DERIVATIVES = (
    "attention_decode is for inference and has no derivatives: call it under torch.no_grad() with plain tensors, "
    "or use attention"
)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    mask: Mask = CAUSAL,
    block_table: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
):
    """Attend from one or a few new queries to a cache of keys and values, by Flash-Decoding
    (https://pytorch.org/blog/flash-decoding/). For inference: no derivatives.

    q (B, Tq, H, D), Tq from 1 to about 16 (`attention` is faster for more). H a multiple of H_kv: head h
    attends to the keys of head h // (H / H_kv). All of one dtype and device, any strides. Returns (B, Tq, H, Dv) in
    q's dtype and, with `return_lse`, also lse (B, H, Tq), natural, sinks included, in float32.

    A contiguous cache is k_cache (B, capacity, H_kv, D) and v_cache (B, capacity, H_kv, Dv). A paged one is k_cache
    (n_pages, page_size, H_kv, D), v_cache alike, page_size a multiple of 16, and block_table (B, max_pages) int32:
    token j of sequence b is token j % page_size of page block_table[b, j // page_size] (PagedAttention,
    https://arxiv.org/abs/2309.06180). Neither the cache nor the table is read behind a sequence's last token.

    cache_lens (B,) int32: tokens of each sequence in the cache before this call. k_new (B, Tq, H_kv, D) and v_new
    (B, Tq, H_kv, Dv), if given, are first appended in place, and a sequence's length is cache_lens + Tq; otherwise it
    is cache_lens. Query i is at position length - Tq + i: the last query at the last key. cache_lens is not changed.

    rotary        (cos, sin), each (positions, D), in the half-split pairing with the signs folded into sin: rotates q
                  and k_new by their positions, in float32; keys in the cache are rotated already
    mask          from `kernels.masks`; keys outside its bands are not read, so a sliding window costs only its window
    scale, softcap, alibi_slopes (H,), sinks (H,)    as in `kernels.attention`
    impl          "triton", "torch", "reference", or "auto": Triton on a GPU from sm_80 up, else torch

    A sequence gets the same bits whatever the other sequences, the capacity and the location of its pages. Lengths and
    page numbers are checked only on a CPU, since a GPU would have to be waited for. There each sequence must fit its
    cache (excess tokens are not written, and make the result meaningless), and a page that is written must belong to
    one sequence.

    Raises ValueError or TypeError for invalid arguments, NotImplementedError for an `impl` that cannot do the
    call or cannot run here, and for tensors that require a derivative.
    """
    call = DecodeArguments(
        q, k_cache, v_cache, cache_lens, k_new, v_new, rotary, mask, block_table, scale, softcap, alibi_slopes, sinks,
        return_lse,
    )  # fmt: skip
    check_decode(call)
    check_choice("impl", impl, IMPLEMENTATIONS)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        check_lengths(k_cache, cache_lens, 0 if k_new is None else q.shape[1], block_table, rotary)
    head_dims = q.shape[3], v_cache.shape[3]
    if impl == "triton":
        require_able(impl, why_not_triton(q, *head_dims))
    elif impl == "auto":
        impl = "triton" if q.is_cuda and why_not_triton(q, *head_dims) is None else "torch"
    tensors = (q, k_cache, v_cache, k_new, v_new, *(rotary or ()), alibi_slopes, sinks)
    differentiated = [x for x in tensors if x is not None]
    if is_transformed(*differentiated) or (torch.is_grad_enabled() and any(x.requires_grad for x in differentiated)):
        raise NotImplementedError(NO_DERIVATIVES)
    scale, softcap = as_floats(q.shape[3] ** -0.5 if scale is None else scale, softcap)
    call = call._replace(scale=scale, softcap=softcap)
    if impl == "triton" or torch.compiler.is_compiling():
        out, lse = _guarded_decode(*decode_call_of(call), return_lse, impl)
        return (out, lse) if return_lse else out
    return _in_torch(impl, call)


def _in_torch(impl: str, call: DecodeArguments):
    return attention_decode_reference(call) if impl == "reference" else by_length(attention, call)


@torch.library.custom_op(
    "triton_attention::decode",
    mutates_args=("k_cache", "v_cache"),
    schema="(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, Tensor? k_new, Tensor? v_new, "
    "Tensor? cos, Tensor? sin, Tensor? block_table, str key, bool indexed, SymInt[] bands, SymInt[] ints, "
    "Tensor[] rows, float scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, bool wants_lse, str impl)"
    " -> (Tensor, Tensor)",
)
def _decode(*args):
    *args, wants_lse, impl = args
    call = DecodeCall(*args)
    if impl == "triton":
        with on_device_of(call.q):
            return decode(DecodeProblem(call))
    found = _in_torch(impl, call.arguments(wants_lse))
    # An operator must return both, contiguous; lse is a placeholder if not requested.
    out, lse = found if wants_lse else (found, _fake(*args)[1])
    return out.contiguous(), lse


@_decode.register_fake
def _fake(q, k_cache, v_cache, *args):
    B, Tq, H, _ = q.shape
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(B, Tq, H, v_cache.shape[3]), q.new_empty(B, H, Tq, dtype=real)


_guarded_decode = guarded(_decode, NO_DERIVATIVES)

"""Attention by torch's F.scaled_dot_product_attention, if it supports the call: the fast path on a CPU.

torch aligns `is_causal` to the first key, has no softcap, sinks or lse, and draws dropout from another generator.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from kernels.attention_arguments import Arguments
from kernels.attention_reference import alibi_term, visible_pairs
from kernels.bias import COARSE, SMALL, largest, row_shift
from kernels.masks import CAUSAL, FULL, Mask

# Up to this length, torch's fused CPU kernel is slower than plain products in 16-bit training: 24 ms against 6 at
# T = 128, 36 against 25 at T = 256 (B 16, H 4, D 64, forward and backward on one core with bfloat16 units).
SHORT = 256
# If ATEN_CPU_CAPABILITY disables AVX-512 on a processor that has it, torch's fused kernel fails from 64 queries on, as
# it packs 16-bit keys: "pack_vnni2 is only supported when avx512 is supported".
CANNOT_PACK = torch.cpu._is_avx512_supported() and "AVX512" not in torch.backends.cpu.get_cpu_capability()
PACKED = 64
# Dense copies that a mask caches, one for each pair of lengths.
MAX_DENSE = 16


def why_not_sdpa(call: Arguments) -> str | None:
    """Return why torch's function cannot do this call; None if it can."""
    q, k, _, mask, segment_ids, *_ = call
    if call.softcap is not None or call.sinks is not None or call.dropout_p or call.return_lse:
        return "torch's scaled_dot_product_attention has no softcap, no sinks, no lse and another dropout"
    Tq, Tk = q.shape[1], k.shape[1]
    if Tk == 0 or q.numel() == 0:
        return "torch's scaled_dot_product_attention takes no empty tensors"
    if CANNOT_PACK and q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and Tq >= PACKED:
        return "torch's scaled_dot_product_attention needs AVX-512 here, which ATEN_CPU_CAPABILITY disables"
    is_safe = Tq <= Tk and mask.shows_itself and not isinstance(segment_ids, tuple)
    if not is_safe and may_be_blind(mask, segment_ids, Tq, Tk, q.device):
        return "a query may see no key, which torch's scaled_dot_product_attention does not define"
    if call.bias is not None and COARSE <= largest(call.bias) < torch.inf:
        return f"torch's scaled_dot_product_attention loses a bias of {COARSE:.0f} or more"
    return None


def may_be_blind(mask: Mask, segment_ids, Tq: int, Tk: int, device) -> bool:
    """Say whether a query might see no key, for a call in which not every query sees its own position."""
    if mask is FULL and segment_ids is None:
        return False
    if segment_ids is not None or mask.tensors or torch.compiler.is_compiling():
        return True
    return _dense(mask, Tq, Tk, device)[1]


def attention_sdpa(call: Arguments) -> Tensor:
    """Compute out (B, Tq, H, Dv) of a call that `why_not_sdpa` allows."""
    q, k, v, mask, _, scale, *_ = call
    B, Tq, H, D = q.shape
    Tk, H_kv = k.shape[1], k.shape[2]
    if scale is not None and scale <= 0:
        # torch would also multiply the -inf of hidden pairs by it.
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    is_square_causal = call.has_mask_only and mask is CAUSAL and Tq == Tk
    if is_square_causal and q.dtype == torch.bfloat16 and Tq <= SHORT and q.requires_grad and q.device.type == "cpu":
        return _short_causal(q, k, v, scale)
    if call.has_mask_only and (mask is FULL or (mask is CAUSAL and Tq == 1)):
        if Tq == 1 and H_kv != H:
            # One query: treat the heads of a group as queries of one head, so that each key is read once.
            out = F.scaled_dot_product_attention(
                q.reshape(B, H_kv, H // H_kv, D), k.transpose(1, 2), v.transpose(1, 2), scale=scale
            )  # (B, H_kv, H / H_kv, Dv)
            return out.reshape(B, 1, H, v.shape[3])
        attn_mask, is_causal = None, False
    elif is_square_causal:
        attn_mask, is_causal = None, True
    else:
        attn_mask, is_causal = _attn_mask(call), False
    # A branch, since under torch.compile `enable_gqa=H_kv != H` would be a symbol, which torch refuses.
    options = {"enable_gqa": True} if H != H_kv else {}
    options |= {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)  # (B, H, Tq, Dv)
    return out.transpose(1, 2)


def _short_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Compute causal attention of T queries to T keys as plain products in the inputs' dtype."""
    B, T, H, D = q.shape
    if k.shape[2] != H:
        k, v = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2).reshape(B * H, T, t.shape[3]) for t in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        hidden = _hidden(T, q.dtype).expand(B * H, T, T)
        s = torch.baddbmm(hidden, q, k.mT, alpha=D**-0.5 if scale is None else scale)
        out = torch.bmm(s.softmax(dim=-1), v)  # (B H, T, Dv)
    return out.view(B, H, T, -1).transpose(1, 2)


@functools.lru_cache(maxsize=8)
def _hidden(T: int, dtype: torch.dtype) -> Tensor:
    """Return a causal mask (T, T) to add: 0 for a visible key, -inf for a hidden one."""
    return torch.full((T, T), float("-inf"), dtype=dtype).triu(1)


def _attn_mask(call: Arguments) -> Tensor:
    """Make what torch adds to the scores, or a bool tensor of what is visible; broadcasts to (B, H, Tq, Tk)."""
    q, k, _, mask, segment_ids, _, _, alibi_slopes, bias, *_ = call
    Tq, Tk = q.shape[1], k.shape[1]
    if segment_ids is not None or mask.tensors or torch.compiler.is_compiling():
        visible = visible_pairs(mask, segment_ids, Tq, Tk, q.device)
    else:
        visible = _dense(mask, Tq, Tk, q.device)[0]
    if alibi_slopes is None and bias is None:
        return visible
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    added = torch.zeros((), dtype=real, device=q.device)
    if alibi_slopes is not None:
        added = added + alibi_term(alibi_slopes.to(real), Tq, Tk)
    if bias is not None:
        bias = bias.to(real)
        if not largest(bias) <= SMALL:
            # Relative to each row's largest bias, the sum keeps the score's precision.
            bias = bias - row_shift(bias, visible)
        added = added + bias
    return added.masked_fill(~visible, float("-inf")).to(q.dtype)


def _dense(mask: Mask, Tq: int, Tk: int, device) -> tuple[Tensor, bool]:
    """Return the mask as a bool tensor, and whether a query sees no key; both are cached in the mask."""
    kept = mask.dense_cache.get((Tq, Tk, device))
    if kept is None:
        with unset_fake_temporarily():  # --dry-run uses fake tensors, which must not get into the cache
            visible = mask.dense(Tq, Tk, device)
            kept = visible, not bool(visible.any(dim=-1).all())
        # The lengths of one query against a growing cache of keys do not repeat.
        if Tq > 1:
            while len(mask.dense_cache) >= MAX_DENSE:
                mask.dense_cache.pop(next(iter(mask.dense_cache)))
            mask.dense_cache[Tq, Tk, device] = kept
    return kept

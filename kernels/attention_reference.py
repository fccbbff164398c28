"""Attention in plain PyTorch: the specification that every kernel is tested against.

It computes the function of `kernels.attention` exactly, with a (B, H, Tq, Tk) matrix.
"""

import math

import torch
from torch import Tensor

from kernels.arguments import check_switch
from kernels.attention_arguments import Arguments, checked
from kernels.bias import add_bias, row_shift
from kernels.masks import CAUSAL, Mask

_WORD = 0xFFFFFFFF


def attention_reference(
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
    upcast: bool = True,
):
    """Compute scaled, masked softmax attention (https://arxiv.org/abs/1706.03762), differentiable by autograd.

    See `kernels.attention` for arguments and results. 16-bit inputs are computed in float32, float64 ones in float64.
    `upcast=False` keeps the matrix products in the inputs' dtype, as plain PyTorch would: the kernels' errors are
    compared with those of this.
    """
    call = Arguments(q, k, v, mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed, return_lse)
    check_switch("upcast", upcast)
    out, lse = attend_in_full(checked(call), upcast)
    return (out, lse) if return_lse else out


def attend_in_full(call: Arguments, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """Return out and lse of a checked call: see `attention_reference`."""
    q, k, v, mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed, _ = call
    B, Tq, H, D = q.shape
    Tk, H_kv = k.shape[1], k.shape[2]
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    matmul = real if upcast else q.dtype
    scale = 1 / math.sqrt(D) if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        qh = q.to(matmul).transpose(1, 2)  # (B, H, Tq, D)
        kh = k.to(matmul).repeat_interleave(H // H_kv, dim=2).transpose(1, 2)  # (B, H, Tk, D)
        vh = v.to(matmul).repeat_interleave(H // H_kv, dim=2).transpose(1, 2)  # (B, H, Tk, Dv)

        s = (qh @ kh.transpose(2, 3)).to(real) * scale  # (B, H, Tq, Tk)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if alibi_slopes is not None:
            s = s + alibi_term(alibi_slopes.to(real), Tq, Tk)
        visible = visible_pairs(mask, segment_ids, Tq, Tk, q.device)
        sinks = None if sinks is None else sinks.to(real).view(1, H, 1, 1)
        if bias is None:
            p, lse = _softmax(s.masked_fill(~visible, -math.inf), sinks)
        else:
            shift = row_shift(bias.to(real), visible, sinks)  # (1 or B, 1 or H, 1 or Tq, 1)
            s = add_bias(s, bias.to(real), shift).masked_fill(~visible, -math.inf)
            p, lse = _softmax(s, None if sinks is None else sinks - shift)
            lse = lse + shift[..., 0]
        if dropout_p > 0:
            keep = dropout_keep(dropout_p, seed, (B, H, Tq, Tk), q.device)
            p = p * keep / (1 - dropout_p)
        return (p.to(matmul) @ vh).transpose(1, 2).to(q.dtype), lse  # (B, Tq, H, Dv)


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax over the last axis of s (B, H, Tq, Tk) and its log-sum-exp (B, H, Tq).

    `sinks` broadcasts to (B, H, Tq, 1): one more logit, in the denominator only. A row of -inf gives zeros and -inf,
    with gradients of zero, where torch.softmax would give NaN.
    """
    B, H, Tq, Tk = s.shape
    if sinks is not None:
        s = torch.cat([s, sinks.expand(B, H, Tq, 1)], dim=-1)
    if s.shape[-1] == 0:
        return s, s.new_full((B, H, Tq), -math.inf)
    # The pivot cancels, so it needs no gradient; it must be finite to avoid -inf - -inf.
    pivot = s.detach().amax(dim=-1, keepdim=True)
    pivot = pivot.masked_fill(pivot == -math.inf, 0.0)
    e = torch.exp(s - pivot)
    total = e.sum(dim=-1, keepdim=True)
    is_empty = total == 0
    total = total.masked_fill(is_empty, 1.0)
    lse = (pivot + torch.log(total)).masked_fill(is_empty, -math.inf)
    return (e / total)[..., :Tk], lse[..., 0]


def query_positions(Tq: int, Tk: int, device) -> Tensor:
    """Return the positions of Tq queries, the last one at the last of Tk keys: (Tq, 1), int32."""
    return torch.arange(Tk - Tq, Tk, device=device, dtype=torch.int32)[:, None]


def alibi_term(slopes: Tensor, Tq: int, Tk: int) -> Tensor:
    """Return -slope * |q - k| for slopes (H,): (H, Tq, Tk) (https://arxiv.org/abs/2108.12409)."""
    k = torch.arange(Tk, device=slopes.device, dtype=torch.int32)
    distance = (query_positions(Tq, Tk, slopes.device) - k).abs()
    return -slopes[:, None, None] * distance


def visible_pairs(mask: Mask, segment_ids, Tq: int, Tk: int, device) -> Tensor:
    """Return which keys each query sees, by mask and segments: bool, broadcasts to (B, H, Tq, Tk)."""
    visible = mask.dense(Tq, Tk, device)
    if segment_ids is not None:
        ids_q, ids_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        visible = visible & (ids_q[:, None, :, None] == ids_k[:, None, None, :])
    return visible


def dropout_keep(p: float, seed: int | Tensor | None, shape: tuple[int, int, int, int], device) -> Tensor:
    """Return which entries of the (B, H, Tq, Tk) matrix survive dropout, as a function of (seed, b, h, i, j) alone.

    `seed`: an int, a one-element int64 tensor, or None to draw one from the device's generator.
    """
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=device)
    seed = torch.as_tensor(seed, device=device, dtype=torch.int64)
    indices = (torch.arange(n, device=device).view(-1, *[1] * (3 - axis)) for axis, n in enumerate(shape))
    return dropout_survivors(p, seed, *indices)


def dropout_survivors(p: float, seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return which entries survive dropout, for indices (int64) that broadcast to their shape.

    Counter-based (the idea of https://doi.org/10.1145/2063384.2063405): two words that hash (seed, b, h, i) are the
    key of row i, and entry j hashes j with that key. An entry is dropped if its 32 bits are below p * 2^32.
    """
    seed = seed.view(())
    low = _mix(_mix(_mix(_mix(seed & _WORD) ^ b) ^ h) ^ i)
    high = _mix(_mix(_mix(_mix(((seed >> 32) & _WORD) ^ low) ^ i) ^ h) ^ b)
    bits = _mix(_mix(j ^ low) ^ high)
    return bits >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """Return the bound below which the 32 random bits of an entry drop it."""
    return min(round(p * 2**32), _WORD)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit words in int64 by a bijection: lowbias32 of https://github.com/skeeto/hash-prospector."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0xD35A2D97) & _WORD
    return x ^ (x >> 15)

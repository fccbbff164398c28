"""Attention in plain PyTorch and little memory, forward and backward, for calls on a CPU that torch does not support.

It computes the function of attention_reference.py for a few queries of one row of the batch at a time, with only the
keys that they need, in float32 (float64 for float64 inputs). The backward pass computes the weights again from lse.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention_reference import dropout_survivors
from kernels.bias import SMALL, add_bias, largest, row_shift
from kernels.mask import evaluate
from kernels.operators import Call, accumulated, define
from kernels.tile_lists import tile_map

SCORES = 1 << 20  # held at once, over all heads
TILE = 64  # queries and keys of the tiles by which needed keys are found
MOST_ROWS = 256


class Chunk(NamedTuple):
    """Queries begin to end - 1 of row b of the batch, and the keys that they see: a range, or indices."""

    b: int
    begin: int
    end: int
    keys: slice | Tensor

    def indices(self, device) -> Tensor:
        """Return the indices of the keys, int32."""
        if isinstance(self.keys, Tensor):
            return self.keys.int()
        return torch.arange(self.keys.start, self.keys.stop, device=device, dtype=torch.int32)


def _chunks(call: Call) -> Iterator[Chunk]:
    B, Tq, H, _ = call.q.shape
    Tk = call.k.shape[1]
    needed = tile_map(call.pattern(), Tq, Tk, TILE, TILE, call.q.device).needed.cpu()
    widest = int(needed.sum(2).max()) * TILE if needed.numel() else 0
    rows = max(16, min(MOST_ROWS, SCORES // max(1, H * widest)))
    rows = rows // TILE * TILE or rows // 16 * 16
    for b in range(B):
        of_row = needed[b if needed.shape[0] > 1 else 0]
        for begin in range(0, Tq, rows):
            end = min(begin + rows, Tq)
            tiles = of_row[begin // TILE : (end - 1) // TILE + 1].any(0).nonzero()[:, 0].tolist()
            yield Chunk(b, begin, end, _keys(tiles, Tk, call.q.device))


def _keys(tiles: list[int], Tk: int, device) -> slice | Tensor:
    if not tiles or tiles[-1] - tiles[0] + 1 == len(tiles):
        return slice(tiles[0] * TILE, min((tiles[-1] + 1) * TILE, Tk)) if tiles else slice(0, 0)
    starts = torch.tensor(tiles, device=device)[:, None] * TILE
    keys = (starts + torch.arange(TILE, device=device)).flatten()
    return keys[keys < Tk]


def _by_group(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Reshape (rows, H, D) to (heads, H / heads * rows, D): the queries of a group become those of a key head."""
    rows, H, D = x.shape
    return x.to(dtype).view(rows, heads, H // heads, D).permute(1, 2, 0, 3).reshape(heads, H // heads * rows, D)


def _grouped(s: Tensor, heads: int) -> Tensor:
    """View (H, rows, keys) as (heads, H / heads * rows, keys)."""
    H, rows, keys = s.shape
    return s.view(heads, H // heads * rows, keys)


def _from_group(x: Tensor, rows: int) -> Tensor:
    """Undo `_by_group`: (heads, H / heads * rows, D) to (rows, H, D)."""
    heads, n, D = x.shape
    return x.view(heads * n // rows, rows, D).transpose(0, 1)


def _logits(
    call: Call, chunk: Chunk, qg: Tensor, kg: Tensor, shift: Tensor | float | None
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """Return logits (H, rows, keys), -inf for hidden pairs, the derivative of softcap, and each row's shift.

    qg, kg (H_kv, ..., D). shift: subtracted from the bias, (H, rows, 1) or 0.0; None to compute it (kernels/bias.py).
    """
    (_, Tq, H, _), Tk = call.q.shape, call.k.shape[1]
    rows, device = chunk.end - chunk.begin, call.q.device
    s = (qg @ kg.mT).view(H, rows, kg.shape[1]).mul_(call.scale)
    slope = 1.0
    if call.softcap:
        t = s.div_(call.softcap).tanh_()
        s, slope = t * call.softcap, 1 - t * t
    k = chunk.indices(device)[None, :]
    q = torch.arange(chunk.begin + Tk - Tq, chunk.end + Tk - Tq, device=device, dtype=torch.int32)[:, None]
    if call.alibi_slopes is not None:
        s -= call.alibi_slopes.to(s.dtype)[:, None, None] * (q - k).abs()
    one_row = [tensor[chunk.b : chunk.b + 1] for tensor in call.rows]
    seen = evaluate(call.key, q, k, call.ints, one_row).expand(1, 1, rows, k.shape[1])[0, 0]
    if call.segments_q is not None:
        own = call.segments_q[chunk.b, chunk.begin : chunk.end]
        seen = seen & (own[:, None] == call.segments_k[chunk.b, chunk.keys])
    if call.bias is not None:
        bias = _bias_of(call, chunk).to(s.dtype)
        if shift is None:
            sinks = None if call.sinks is None else call.sinks.to(s.dtype).view(H, 1, 1)
            shift = row_shift(bias, seen, sinks).expand(H, rows, 1)
        s = add_bias(s, bias, shift) if isinstance(shift, Tensor) else s.add_(bias)
    return s.masked_fill_(~seen, -math.inf), slope, shift


def _bias_of(call: Call, chunk: Chunk) -> Tensor:
    """Return a chunk's part of the bias, (H or 1, rows, keys)."""
    (_, Tq, _, _), Tk = call.q.shape, call.k.shape[1]
    bias = call.bias.view((1,) * (4 - call.bias.ndim) + tuple(call.bias.shape))
    bias = bias[chunk.b if bias.shape[0] > 1 else 0]
    return bias.expand(-1, Tq, Tk)[:, chunk.begin : chunk.end][..., chunk.keys]


def _survivors(call: Call, chunk: Chunk) -> Tensor:
    """Return which entries (H, rows, keys) survive dropout."""
    device = call.q.device
    h = torch.arange(call.q.shape[2], device=device).view(-1, 1, 1)
    i = torch.arange(chunk.begin, chunk.end, device=device).view(1, -1, 1)
    j = chunk.indices(device).long().view(1, 1, -1)
    return dropout_survivors(call.dropout_p, call.seed, torch.tensor(chunk.b, device=device), h, i, j)


def chunked_forward(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    (B, Tq, H, _), (_, _, H_kv, Dv) = call.q.shape, call.v.shape
    real = accumulated(call.q.dtype)
    out, lse = call.q.new_empty(B, Tq, H, Dv), call.q.new_empty(B, H, Tq, dtype=real)
    shifts = None if call.bias is None else torch.empty_like(lse)
    given = 0.0 if call.bias is None or largest(call.bias) <= SMALL else None
    for chunk in _chunks(call):
        b, begin, end, keys = chunk
        kg, vg = call.k[b, keys].to(real).transpose(0, 1), call.v[b, keys].to(real).transpose(0, 1)
        s, _, shift = _logits(call, chunk, _by_group(call.q[b, begin:end], H_kv, real), kg, given)
        sinks = None if call.sinks is None else call.sinks.to(real).view(H, 1, 1) - shift
        pivot = s.amax(2, keepdim=True) if s.shape[2] else s.new_full((H, end - begin, 1), -math.inf)
        if sinks is not None:
            pivot = torch.maximum(pivot, sinks)
        pivot = pivot.masked_fill(pivot == -math.inf, 0.0)
        p = s.sub_(pivot).exp_()
        total = p.sum(2, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks - pivot)
        # A query that sees no key gets lse = log(0) = -inf, and its zeros are divided by 1.
        lse[b, :, begin:end] = (pivot + torch.log(total))[..., 0]
        if shifts is not None:
            shifts[b, :, begin:end, None] = shift
        p = p.div_(total.masked_fill(total == 0, 1.0))
        if call.seed is not None:
            p = p.mul_(_survivors(call, chunk)).div_(1 - call.dropout_p)
        out[b, begin:end] = _from_group(_grouped(p, H_kv) @ vg, end - begin)
    return out, lse, shifts


def chunked_backward(
    call: Call, out: Tensor, lse: Tensor, shift: Tensor | None, dout: Tensor, dlse: Tensor | None, wants_dbias: bool
):
    """Return dq, dk, dv, and dsinks and dbias or None."""
    H, H_kv = call.q.shape[2], call.k.shape[2]
    real = accumulated(call.q.dtype)
    dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=real, device=x.device) for x in (call.k, call.v))
    dsinks = None if call.sinks is None else torch.zeros(H, dtype=real, device=dq.device)
    dbias = torch.zeros(call.bias.shape, dtype=real, device=dq.device) if wants_dbias else None
    is_plain = shift is None or (shift.device.type == "cpu" and not shift.any())  # do not wait for a GPU
    for chunk in _chunks(call):
        b, begin, end, keys = chunk
        rows = end - begin
        kg, vg = call.k[b, keys].to(real).transpose(0, 1), call.v[b, keys].to(real).transpose(0, 1)
        qg, dog = (_by_group(x[b, begin:end], H_kv, real) for x in (call.q, dout))
        delta = (out[b, begin:end].to(real) * dout[b, begin:end].to(real)).sum(2).T[..., None]  # (H, rows, 1)
        if dlse is not None:
            delta = delta - dlse[b, :, begin:end, None]
        lse_rows = lse[b, :, begin:end, None]
        lse_rows = lse_rows.masked_fill(lse_rows == -math.inf, math.inf)
        taken = 0.0 if is_plain else shift[b, :, begin:end, None]
        s, slope, _ = _logits(call, chunk, qg, kg, taken)
        p = s.sub_(lse_rows).exp_()  # (H, rows, keys)
        dp = (dog @ vg.mT).view(p.shape)
        if call.seed is not None:
            scale = _survivors(call, chunk).to(real).div_(1 - call.dropout_p)
            dp = dp.mul_(scale)
            weights = p * scale
        else:
            weights = p
        _add(dv[b], keys, _grouped(weights, H_kv).mT @ dog)
        ds = dp.sub_(delta).mul_(p)
        if dsinks is not None:
            dsinks -= (torch.exp(call.sinks.to(real)[:, None, None] - taken - lse_rows) * delta).sum((1, 2))
        if dbias is not None:
            _add_to_bias(dbias, chunk, ds)
        ds = _grouped(ds.mul_(slope), H_kv)
        dq[b, begin:end] = _from_group(ds @ kg, rows).mul_(call.scale)
        _add(dk[b], keys, (ds.mT @ qg).mul_(call.scale))
    return dq, dk.to(call.k.dtype), dv.to(call.v.dtype), dsinks, dbias


def _add(total: Tensor, keys: slice | Tensor, part: Tensor) -> None:
    """Add part (H_kv, keys, D) to total (Tk, H_kv, D)."""
    if isinstance(keys, Tensor):
        total.index_add_(0, keys, part.transpose(0, 1))
    else:
        total[keys] += part.transpose(0, 1)


def _add_to_bias(dbias: Tensor, chunk: Chunk, ds: Tensor) -> None:
    """Add ds (H, rows, keys) to dbias, summed over the axes along which the bias is broadcast."""
    dbias = dbias.view((1,) * (4 - dbias.ndim) + tuple(dbias.shape))
    dbias = dbias[chunk.b if dbias.shape[0] > 1 else 0]
    along = [axis for axis, n in enumerate(dbias.shape) if n == 1]
    if along:
        ds = ds.sum(along, keepdim=True)
    if dbias.shape[1] > 1:
        dbias = dbias[:, chunk.begin : chunk.end]
    if dbias.shape[2] == 1:
        dbias += ds
    elif isinstance(chunk.keys, Tensor):
        dbias.index_add_(2, chunk.keys, ds)
    else:
        dbias[..., chunk.keys] += ds


attend_chunked = define("chunked_attention", chunked_forward, chunked_backward)

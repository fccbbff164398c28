"""Rows of logits to losses and, in place, to their gradients: one program for a row, which it reads in tiles.

The matrix products around it are torch's: see linear_cross_entropy_chunks.py. Nothing is added atomically, and the tile
depends on the vocabulary alone, so the same inputs give the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_triton import runs_on
from kernels.problem import Launch
from kernels.tiles import tanh

# A row is read in tiles of at most this many columns: sixteen for each thread of eight warps.
MOST_COLUMNS = 4096
COLUMNS_PER_WARP = 512


class Terms(NamedTuple):
    """The terms of a loss. What is None is compiled away."""

    softcap: float | None
    z_loss: float
    smoothing: float | None
    ignore_index: int


@triton.jit
def _capped(x, softcap):
    """A logit after the softcap, and the softcap's slope there."""
    slope = 1.0
    if softcap is not None:
        t = tanh(x / softcap)
        x = t * softcap
        slope = 1.0 - t * t
    return x, slope


@triton.jit
def _load(row, first, V, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    columns = first + tl.arange(0, BLOCK_V)
    if MASKED:
        x = tl.load(row + columns, mask=columns < V, other=0.0)
    else:
        x = tl.load(row + columns)
    return columns, x.to(tl.float32)


@triton.jit
def _add_tile(m_i, l_i, total, row, first, V, terms, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    """The running maximum, and by column of the tile the sums of exp(s - m_i) and, for label smoothing, of s."""
    columns, x = _load(row, first, V, MASKED, BLOCK_V)
    s, _ = _capped(x, terms.softcap)
    if terms.smoothing is not None:
        total += tl.where(columns < V, s, 0.0)
    if MASKED:
        s = tl.where(columns < V, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 0))
    l_i = l_i * tl.exp(m_i - m_new) + tl.exp(s - m_new)
    return m_new, l_i, total


@triton.jit
def _sums(row, V, terms, BLOCK_V: tl.constexpr):
    """lse of a row and, for label smoothing, the sum of its logits."""
    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        m_i, l_i, total = _add_tile(m_i, l_i, total, row, first, V, terms, False, BLOCK_V)
    if full < V:
        m_i, l_i, total = _add_tile(m_i, l_i, total, row, full, V, terms, True, BLOCK_V)
    return m_i + tl.log(tl.sum(l_i, 0)), tl.sum(total, 0)


@triton.jit
def _write_tile(row, first, target, lse, dloss, V, terms, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    """dloss * d loss / d logit in the place of each logit of a tile."""
    columns, x = _load(row, first, V, MASKED, BLOCK_V)
    s, slope = _capped(x, terms.softcap)
    gradient = tl.exp(s - lse) * (1.0 + 2.0 * terms.z_loss * lse)
    if terms.smoothing is not None:
        gradient -= terms.smoothing / V + tl.where(columns == target, 1.0 - terms.smoothing, 0.0)
    else:
        gradient -= tl.where(columns == target, 1.0, 0.0)
    # A row that does not count gets zeros, whatever its logits are.
    gradient = tl.where(target == terms.ignore_index, 0.0, gradient * slope * dloss)
    if MASKED:
        tl.store(row + columns, gradient, mask=columns < V)
    else:
        tl.store(row + columns, gradient)


@triton.jit
def _write_gradient(row, target, lse, dloss, V, terms, BLOCK_V: tl.constexpr):
    # A target outside the vocabulary is an error that a GPU cannot raise: it shows as NaN.
    dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        _write_tile(row, first, target, lse, dloss, V, terms, False, BLOCK_V)
    if full < V:
        _write_tile(row, full, target, lse, dloss, V, terms, True, BLOCK_V)


@triton.jit
def loss_kernel(logits, stride, targets, losses, lse, V, terms, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """losses and lse of rows of logits (rows `stride` apart); GRADIENT: also their gradients in the logits' place."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(targets + n)
    is_known = (target >= 0) & (target < V)
    # Read before anything is written over it.
    s_target, _ = _capped(tl.load(row + tl.where(is_known, target, 0)).to(tl.float32), terms.softcap)
    row_lse, total = _sums(row, V, terms, BLOCK_V)
    loss = row_lse - s_target
    if terms.smoothing is not None:
        loss = row_lse - (1.0 - terms.smoothing) * s_target - terms.smoothing * (total / V)
    loss += terms.z_loss * row_lse * row_lse
    loss = tl.where(is_known, loss, float("nan"))
    tl.store(losses + n, tl.where(target == terms.ignore_index, 0.0, loss))
    tl.store(lse + n, row_lse)
    if GRADIENT:
        _write_gradient(row, target, row_lse, 1.0, V, terms, BLOCK_V)


@triton.jit
def gradient_kernel(logits, stride, targets, lse, dlosses, V, terms, BLOCK_V: tl.constexpr):
    """dlosses * d losses / d logits in the logits' place, from lse."""
    n = tl.program_id(0).to(tl.int64)
    target, row_lse, dloss = tl.load(targets + n), tl.load(lse + n), tl.load(dlosses + n)
    _write_gradient(logits + n * stride, target, row_lse, dloss, V, terms, BLOCK_V)


def loss_launch(logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, terms: Terms, gradient: bool) -> Launch:
    """logits (n, V), rows contiguous; targets (n,) int64; losses and lse (n,) float32."""
    return _launch(loss_kernel, logits, targets, terms, losses=losses, lse=lse, GRADIENT=gradient)


def gradient_launch(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, terms: Terms) -> Launch:
    """Shapes as for loss_launch."""
    return _launch(gradient_kernel, logits, targets, terms, lse=lse, dlosses=dlosses)


def _launch(kernel, logits: Tensor, targets: Tensor, terms: Terms, **args) -> Launch:
    n, V = logits.shape
    block_v = min(MOST_COLUMNS, max(16, triton.next_power_of_2(V)))
    terms = terms._replace(softcap=terms.softcap or None, smoothing=terms.smoothing or None)
    args |= {"logits": logits, "stride": logits.stride(0), "targets": targets, "V": V, "terms": terms}
    return Launch(kernel, (n,), args | {"BLOCK_V": block_v}, {"num_warps": max(1, block_v // COLUMNS_PER_WARP)})


def why_not_triton(x: Tensor) -> str | None:
    """Why the kernels cannot take x; None if they can."""
    if not runs_on(x.device):
        return f"{x.device} is no GPU from sm_80 up"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    return None

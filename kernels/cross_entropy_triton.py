"""Kernels from rows of logits to losses and, in place, gradients: one program for a row, or for several short ones.

linear_cross_entropy_chunks.py has the matrix products around them. Nothing is added atomically and the tile depends on
the shape alone, so the same inputs give the same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.problem import Launch
from kernels.tiles import tanh

# Logits of a tile, of one row or several short ones: sixteen for each thread of eight warps.
TILE = MOST_COLUMNS = 4096


class Terms(NamedTuple):
    """The terms of a loss. A None is compiled away."""

    softcap: float | None
    z_loss: float
    smoothing: float | None
    ignore_index: int


@triton.jit
def _capped(x, softcap):
    """Apply the softcap to a logit; also return the softcap's slope."""
    slope = 1.0
    if softcap is not None:
        t = tanh(x / softcap)
        x = t * softcap
        slope = 1.0 - t * t
    return x, slope


@triton.jit
def _load(row, inside, first, V, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Load a tile of logits (BLOCK_N, BLOCK_V); return it, its columns, and which logits exist."""
    columns = first + tl.arange(0, BLOCK_V)[None, :]
    if MASKED:
        inside = inside & (columns < V)
    x = tl.load(row + columns, mask=inside, other=0.0)
    return x.to(tl.float32), columns, inside


@triton.jit
def _add_tile(m_i, l_i, total, row, inside, first, V, terms, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Update the running maximum and, by column, the sums of exp(s - m_i) and, for label smoothing, of s."""
    x, columns, _ = _load(row, inside, first, V, MASKED, BLOCK_V)
    s, _ = _capped(x, terms.softcap)
    if terms.smoothing is not None:
        total += tl.where(columns < V, s, 0.0)
    if MASKED:
        s = tl.where(columns < V, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    l_i = l_i * tl.exp(m_i - m_new)[:, None] + tl.exp(s - m_new[:, None])
    return m_new, l_i, total


@triton.jit
def _sums(row, inside, V, terms, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Compute lse of each row and, for label smoothing, the sum of its logits."""
    m_i = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        m_i, l_i, total = _add_tile(m_i, l_i, total, row, inside, first, V, terms, False, BLOCK_V)
    if full < V:
        m_i, l_i, total = _add_tile(m_i, l_i, total, row, inside, full, V, terms, True, BLOCK_V)
    return m_i + tl.log(tl.sum(l_i, 1)), tl.sum(total, 1)


@triton.jit
def _write_tile(row, inside, first, target, lse, dloss, V, terms, MASKED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Overwrite each logit of a tile with dloss * d loss / d logit; target, lse and dloss are (BLOCK_N, 1)."""
    x, columns, inside = _load(row, inside, first, V, MASKED, BLOCK_V)
    s, slope = _capped(x, terms.softcap)
    gradient = tl.exp(s - lse) * (1.0 + 2.0 * terms.z_loss * lse)
    if terms.smoothing is not None:
        gradient -= terms.smoothing / V + tl.where(columns == target, 1.0 - terms.smoothing, 0.0)
    else:
        gradient -= tl.where(columns == target, 1.0, 0.0)
    # An ignored row gets zeros, even if its logits are NaN.
    gradient = tl.where(target == terms.ignore_index, 0.0, gradient * slope * dloss)
    tl.store(row + columns, gradient, mask=inside)


@triton.jit
def _write_gradient(row, inside, target, lse, dloss, V, terms, BLOCK_V: tl.constexpr):
    # A GPU cannot raise an error for a target outside the vocabulary: the gradient becomes NaN.
    dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))[:, None]
    target, lse = target[:, None], lse[:, None]
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        _write_tile(row, inside, first, target, lse, dloss, V, terms, False, BLOCK_V)
    if full < V:
        _write_tile(row, inside, full, target, lse, dloss, V, terms, True, BLOCK_V)


@triton.jit
def _rows(logits, stride, targets, N, BLOCK_N: tl.constexpr):
    """Return this program's rows, a pointer to each, their targets, and which rows exist."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(targets + offs_n, mask=offs_n < N, other=0)
    return offs_n, logits + offs_n[:, None] * stride, target, offs_n < N


@triton.jit
def loss_kernel(logits, stride, targets, losses, lse, N, V, terms, GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_V: tl.constexpr):  # fmt: skip
    """Compute losses and lse of N rows of logits, `stride` apart; GRADIENT: also overwrite logits with gradients."""
    offs_n, row, target, inside = _rows(logits, stride, targets, N, BLOCK_N)
    is_known = (target >= 0) & (target < V)
    # Read before the gradient overwrites it.
    x_target = tl.load(logits + offs_n * stride + tl.where(is_known, target, 0), mask=inside, other=0.0)
    s_target, _ = _capped(x_target.to(tl.float32), terms.softcap)
    row_lse, total = _sums(row, inside[:, None], V, terms, BLOCK_N, BLOCK_V)
    loss = row_lse - s_target
    if terms.smoothing is not None:
        loss += terms.smoothing * (s_target - total / V)
    loss += terms.z_loss * row_lse * row_lse
    loss = tl.where(is_known, loss, float("nan"))
    tl.store(losses + offs_n, tl.where(target == terms.ignore_index, 0.0, loss), mask=inside)
    tl.store(lse + offs_n, row_lse, mask=inside)
    if GRADIENT:
        dloss = tl.full((BLOCK_N,), 1.0, tl.float32)
        _write_gradient(row, inside[:, None], target, row_lse, dloss, V, terms, BLOCK_V)


@triton.jit
def gradient_kernel(logits, stride, targets, lse, dlosses, N, V, terms, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Overwrite logits with dlosses * d losses / d logits, from lse."""
    offs_n, row, target, inside = _rows(logits, stride, targets, N, BLOCK_N)
    row_lse = tl.load(lse + offs_n, mask=inside, other=0.0)
    dloss = tl.load(dlosses + offs_n, mask=inside, other=0.0)
    _write_gradient(row, inside[:, None], target, row_lse, dloss, V, terms, BLOCK_V)


def loss_launch(logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, terms: Terms, gradient: bool) -> Launch:
    """Prepare the loss kernel: logits (n, V), rows contiguous; targets (n,) int64; losses and lse (n,) float32."""
    return _launch(loss_kernel, logits, targets, terms, losses=losses, lse=lse, GRADIENT=gradient)


def gradient_launch(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, terms: Terms) -> Launch:
    """Prepare the gradient kernel; shapes as for loss_launch."""
    return _launch(gradient_kernel, logits, targets, terms, lse=lse, dlosses=dlosses)


def _launch(kernel, logits: Tensor, targets: Tensor, terms: Terms, **args) -> Launch:
    N, V = logits.shape
    block_v = min(MOST_COLUMNS, max(16, triton.next_power_of_2(V)))
    block_n = min(TILE // block_v, triton.next_power_of_2(N))
    terms = terms._replace(softcap=terms.softcap or None, smoothing=terms.smoothing or None)
    args |= {"logits": logits, "stride": logits.stride(0), "targets": targets, "N": N, "V": V, "terms": terms}
    args |= {"BLOCK_N": block_n, "BLOCK_V": block_v}
    return Launch(kernel, (triton.cdiv(N, block_n),), args, {"num_warps": 8})

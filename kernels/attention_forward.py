"""Attention forward: FlashAttention-2's online softmax (https://arxiv.org/abs/2307.08691), one program for each tile of
queries of a head. Logits and their running maximum are in base 2, for the hardware's exp2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.problem import Launch, Problem
from kernels.tiles import (
    FLOOR,
    LOG2E,
    LOWEST,
    add_bias,
    count_full,
    count_partial,
    dot,
    dropout_keep,
    full_tile,
    head,
    in_base_2,
    load_bias,
    load_tile,
    logits,
    narrow,
    natural_lse,
    partial_tile,
    store_tile,
    visible,
    visits,
)


@triton.jit
def softmax_step(q, k, l_i, m_i, shift, b, h, q_position, k_index, q_index, sizes, masking, scoring,
                 PREDICATE: tl.constexpr, MASKED: tl.constexpr, FOLD: tl.constexpr):  # fmt: skip
    """Add one tile of keys to the online softmax. Returns its weights p, the factor for earlier sums, l_i, m_i, shift.

    shift: each row's largest bias so far, which is not in m_i; unused without a bias.
    """
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32))
    if FOLD:
        scale = scoring.scale
    else:
        s, _ = logits(s, scoring, h, q_position, k_index)
        scale = 1.0
    if MASKED:
        seen = visible(masking, b, q_position, k_index, q_index, k_index, sizes, PREDICATE)
    m_old = m_i
    if scoring.bias is not None:
        bias = load_bias(scoring, b, h, q_index, k_index, sizes)
        if MASKED:
            bias = tl.where(seen, bias, float("-inf"))
        raised = tl.maximum(shift, tl.max(bias, 1))
        m_old = tl.maximum(m_i + (shift - raised) * LOG2E, FLOOR)
        shift = raised
        s = add_bias(s, bias, shift[:, None])
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m_old, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m_old - m_new)
    return p, alpha, l_i * alpha + tl.sum(p, 1), m_new, shift


@triton.jit
def _tile(acc, l_i, m_i, shift, q, k_base, v_base, n, b, h, q_index, k_strides, v_strides, sizes, masking, scoring,
          dropout, PREDICATE: tl.constexpr, MASKED: tl.constexpr, FOLD: tl.constexpr, CHECK_D: tl.constexpr,
          CHECK_DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Update (acc, l_i, m_i, shift) with one tile of keys."""
    k_first = n * BLOCK_N
    k_index = (k_first + tl.arange(0, BLOCK_N))[None, :]
    q_position = q_index + (sizes.Tk - sizes.Tq)
    k = load_tile(k_base, k_strides, k_first, sizes.Tk, sizes.D, BLOCK_N, BLOCK_D, MASKED, CHECK_D)
    p, alpha, l_i, m_i, shift = softmax_step(q, k, l_i, m_i, shift, b, h, q_position, k_index, q_index, sizes, masking,
                                             scoring, PREDICATE, MASKED, FOLD)  # fmt: skip
    if dropout.seed is not None:
        p = tl.where(dropout_keep(dropout, b, h, q_index, k_index), p * dropout.scale, 0.0)
    v = load_tile(v_base, v_strides, k_first, sizes.Tk, sizes.Dv, BLOCK_N, BLOCK_DV, MASKED, CHECK_DV)
    acc = dot(narrow(p, v.dtype), v, acc * alpha[:, None])
    return acc, l_i, m_i, shift


@triton.jit
def forward_kernel(q, k, v, out, lse, sinks, visited, q_strides, k_strides, v_strides, out_strides, sizes, masking,
                   scoring, dropout, PREDICATE: tl.constexpr, FOLD: tl.constexpr, CHECK_D: tl.constexpr,
                   CHECK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute out (B, Tq, H, Dv), lse (B, H, Tq) and, with a bias, scoring.shift (B, H, Tq), which is not in lse.

    visited: int32, a count of tiles for each program, or None.
    """
    tiles_m = tl.cdiv(sizes.Tq, BLOCK_M)
    # Start the long programs first: under a causal mask the last queries see the most keys.
    m = tiles_m - 1 - tl.program_id(0) % tiles_m
    h = tl.program_id(0) // tiles_m % sizes.H
    b = tl.program_id(0) // tiles_m // sizes.H
    q_first = m * BLOCK_M
    q_index = (q_first + tl.arange(0, BLOCK_M))[:, None]
    first = q_first + sizes.Tk - sizes.Tq
    last = tl.minimum(q_first + BLOCK_M, sizes.Tq) - 1 + sizes.Tk - sizes.Tq

    b_long = tl.cast(b, tl.int64)
    h_long = tl.cast(h, tl.int64)
    h_kv = h_long // sizes.GROUP
    q_base = head(q, q_strides, b_long, h_long)
    k_base = head(k, k_strides, b_long, h_kv)
    v_base = head(v, v_strides, b_long, h_kv)
    q_tile = load_tile(q_base, q_strides, q_first, sizes.Tq, sizes.D, BLOCK_M, BLOCK_D, True, CHECK_D)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), FLOOR, tl.float32)
    shift = tl.full((BLOCK_M,), LOWEST, tl.float32)
    sink = None
    if sinks is not None:
        # Start as if a key with the sink's logit and a value of zero had been seen. With a bias, the sink is one.
        sink = tl.load(sinks + h).to(tl.float32)
        if scoring.bias is not None:
            shift = tl.maximum(shift, sink)
            sink = tl.max(sink - shift, 0)
        m_i = tl.maximum(m_i, in_base_2(sink))
        l_i = tl.exp2(in_base_2(sink) - m_i)

    spans = visits(masking, b, m, first, last, sizes, BLOCK_N, True)
    for i in range(count_full(spans)):
        acc, l_i, m_i, shift = _tile(acc, l_i, m_i, shift, q_tile, k_base, v_base, full_tile(spans, i), b, h, q_index,
                                     k_strides, v_strides, sizes, masking, scoring, dropout, PREDICATE, False, FOLD,
                                     CHECK_D, CHECK_DV, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    for i in range(count_partial(spans)):
        acc, l_i, m_i, shift = _tile(acc, l_i, m_i, shift, q_tile, k_base, v_base, partial_tile(spans, i), b, h,
                                     q_index, k_strides, v_strides, sizes, masking, scoring, dropout, PREDICATE, True,
                                     FOLD, CHECK_D, CHECK_DV, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    if visited is not None:
        tl.store(visited + tl.program_id(0), count_full(spans) + count_partial(spans))

    # A query that saw no key has l_i = 0: its output is 0 and its lse -inf.
    is_empty = l_i == 0
    l_i = tl.where(is_empty, 1.0, l_i)
    acc = acc / l_i[:, None]
    out_base = out + b_long * out_strides[0] + h_long * out_strides[2]
    store_tile(out_base, out_strides, acc, q_first, sizes.Tq, sizes.Dv, BLOCK_M, BLOCK_DV)
    rows = q_first + tl.arange(0, BLOCK_M)
    lse_rows = (b_long * sizes.H + h_long) * sizes.Tq + rows
    natural = tl.where(is_empty, float("-inf"), natural_lse(m_i, l_i, sink))
    tl.store(lse + lse_rows, natural, mask=rows < sizes.Tq)
    if scoring.bias is not None:
        tl.store(scoring.shift + lse_rows, shift, mask=rows < sizes.Tq)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return out (B, Tq, H, Dv) in q's dtype, natural lse (B, H, Tq) in float32, and shift: see `operators.define`."""
    Tq, _, H, _, _, Dv = problem.sizes
    out = problem.empty(problem.B, Tq, H, Dv)
    lse = problem.empty(problem.B, H, Tq, dtype=torch.float32)
    forward_launch(problem, out, lse).run()
    return out, lse, problem.shift


def forward_launch(problem: Problem, out: Tensor, lse: Tensor, visited: Tensor | None = None) -> Launch:
    """Prepare the launch that fills out and lse, and `visited` (programs,) int32 with each program's count of tiles."""
    outputs = {"out": out, "lse": lse, "sinks": problem.call.sinks, "visited": visited, "out_strides": out.stride()}
    Tq, H = problem.sizes.Tq, problem.sizes.H
    return problem.launch(forward_kernel, "forward", Tq, H, rows_are_queries=True, **outputs)

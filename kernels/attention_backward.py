"""Attention backward (https://arxiv.org/abs/2307.08691, section 3.2): three kernels without atomic additions.

prepare  for each query: delta = sum(out * dout) - dlse, and lse in base 2
dkdv     one program for each tile of keys of a key head: it loops over the heads of the group and over the queries
dq       one program for each tile of queries of a head

With p = softmax and dp = dout v^T: dv = p^T dout, ds = p * (dp - delta), dk = scale * ds^T q, dq = scale * ds k. The
gradient of lse, dlse, adds p * dlse to ds, so delta includes it. attention_dbias.py has the gradient of a bias.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_dbias import bias_gradient
from kernels.attention_scores import score_gradient, weights
from kernels.configs import block_dim
from kernels.problem import Launch, Problem, within_reach
from kernels.tiles import (
    LOG2E,
    count_full,
    count_partial,
    dot,
    dropout_keep,
    full_tile,
    head,
    load_tile,
    narrow,
    partial_tile,
    store_tile,
    visits,
)


@triton.jit
def prepare_kernel(out, dout, lse, dlse, delta, lse2, out_strides, dout_strides, dlse_strides, sizes,
                   BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute delta and lse2 (B, H, Tq) from out and dout (B, Tq, H, Dv), lse (B, H, Tq) and dlse or None."""
    tiles_m = tl.cdiv(sizes.Tq, BLOCK_M)
    m = tl.program_id(0) % tiles_m
    h = tl.cast(tl.program_id(0) // tiles_m % sizes.H, tl.int64)
    b = tl.cast(tl.program_id(0) // tiles_m // sizes.H, tl.int64)
    first = m * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    inside = rows < sizes.Tq
    out_base = out + b * out_strides[0] + h * out_strides[2]
    dout_base = dout + b * dout_strides[0] + h * dout_strides[2]
    o = load_tile(out_base, out_strides, first, sizes.Tq, sizes.Dv, BLOCK_M, BLOCK_DV, True, True).to(tl.float32)
    do = load_tile(dout_base, dout_strides, first, sizes.Tq, sizes.Dv, BLOCK_M, BLOCK_DV, True, True).to(tl.float32)
    d = tl.sum(o * do, 1)
    if dlse is not None:
        d -= tl.load(dlse + b * dlse_strides[0] + h * dlse_strides[1] + rows * dlse_strides[2], mask=inside, other=0.0)
    row_of_all = (b * sizes.H + h) * sizes.Tq + rows
    natural = tl.load(lse + row_of_all, mask=inside, other=0.0)
    # A query that sees no key gets p = exp2(s - inf) = 0.
    tl.store(lse2 + row_of_all, tl.where(natural == float("-inf"), float("inf"), natural * LOG2E), mask=inside)
    tl.store(delta + row_of_all, d, mask=inside)


@triton.jit
def _dkdv_tile(dk, dv, k, v, q_base, do_base, lse2_base, delta_base, m, b, h, k_index, q_strides, do_strides, sizes,
               masking, scoring, dropout, PREDICATE: tl.constexpr, MASKED: tl.constexpr, FOLD: tl.constexpr,
               CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr):  # fmt: skip
    """Add one tile of queries to dk and dv. Tiles are transposed: rows are keys, columns are queries."""
    q_first = m * BLOCK_M
    columns = q_first + tl.arange(0, BLOCK_M)
    q_index = columns[None, :]
    q_position = q_index + (sizes.Tk - sizes.Tq)
    q = load_tile(q_base, q_strides, q_first, sizes.Tq, sizes.D, BLOCK_M, BLOCK_D, MASKED, CHECK_D)
    do = load_tile(do_base, do_strides, q_first, sizes.Tq, sizes.Dv, BLOCK_M, BLOCK_DV, MASKED, CHECK_DV)
    if MASKED:
        lse2 = tl.load(lse2_base + columns, mask=columns < sizes.Tq, other=float("inf"))
        delta = tl.load(delta_base + columns, mask=columns < sizes.Tq, other=0.0)
    else:
        lse2 = tl.load(lse2_base + columns)
        delta = tl.load(delta_base + columns)

    s = dot(k, tl.trans(q), tl.zeros((k.shape[0], BLOCK_M), tl.float32))
    p, slope = weights(s, lse2[None, :], b, h, q_position, k_index, q_index, sizes, masking, scoring, PREDICATE,
                       MASKED, FOLD)  # fmt: skip
    dp = dot(v, tl.trans(do), tl.zeros((k.shape[0], BLOCK_M), tl.float32))
    if dropout.seed is not None:
        keep = dropout_keep(dropout, b, h, q_index, k_index)
        dv = dot(narrow(tl.where(keep, p * dropout.scale, 0.0), do.dtype), do, dv)
        dp = tl.where(keep, dp * dropout.scale, 0.0)
    else:
        dv = dot(narrow(p, do.dtype), do, dv)
    ds = p * (dp - delta[None, :])
    if not FOLD:
        ds = ds * slope
    dk = dot(narrow(ds, q.dtype), q, dk)
    return dk, dv


@triton.jit
def dkdv_kernel(q, k, v, dout, lse2, delta, dk, dv, visited, q_strides, k_strides, v_strides, dout_strides, dk_strides,
                dv_strides, scale, sizes, masking, scoring, dropout, PREDICATE: tl.constexpr, FOLD: tl.constexpr,
                CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute dk (B, Tk, H_kv, D) and dv (B, Tk, H_kv, Dv), summed over the heads of each group in a fixed order."""
    tiles_n = tl.cdiv(sizes.Tk, BLOCK_N)
    heads = sizes.H // sizes.GROUP
    n = tl.program_id(0) % tiles_n
    h_kv = tl.program_id(0) // tiles_n % heads
    b = tl.program_id(0) // tiles_n // heads
    first = n * BLOCK_N
    last = tl.minimum(first + BLOCK_N, sizes.Tk) - 1
    k_index = (first + tl.arange(0, BLOCK_N))[:, None]

    b_long = tl.cast(b, tl.int64)
    kv_long = tl.cast(h_kv, tl.int64)
    k_base = head(k, k_strides, b_long, kv_long)
    v_base = head(v, v_strides, b_long, kv_long)
    k_tile = load_tile(k_base, k_strides, first, sizes.Tk, sizes.D, BLOCK_N, BLOCK_D, True, CHECK_D)
    v_tile = load_tile(v_base, v_strides, first, sizes.Tk, sizes.Dv, BLOCK_N, BLOCK_DV, True, CHECK_DV)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)

    spans = visits(masking, b, n, first, last, sizes, BLOCK_M, False)
    # Without LICM: values hoisted out of the loop over heads would occupy registers throughout.
    for g in tl.range(sizes.GROUP, disable_licm=True):
        h = h_kv * sizes.GROUP + g
        h_long = kv_long * sizes.GROUP + g
        q_base = head(q, q_strides, b_long, h_long)
        do_base = head(dout, dout_strides, b_long, h_long)
        lse2_base = lse2 + (b_long * sizes.H + h_long) * sizes.Tq
        delta_base = delta + (b_long * sizes.H + h_long) * sizes.Tq
        for i in range(count_full(spans)):
            acc_k, acc_v = _dkdv_tile(acc_k, acc_v, k_tile, v_tile, q_base, do_base, lse2_base, delta_base,
                                      full_tile(spans, i), b, h, k_index, q_strides, dout_strides, sizes, masking,
                                      scoring, dropout, PREDICATE, False, FOLD, CHECK_D, CHECK_DV, BLOCK_M, BLOCK_D,
                                      BLOCK_DV)  # fmt: skip
        for i in range(count_partial(spans)):
            acc_k, acc_v = _dkdv_tile(acc_k, acc_v, k_tile, v_tile, q_base, do_base, lse2_base, delta_base,
                                      partial_tile(spans, i), b, h, k_index, q_strides, dout_strides, sizes, masking,
                                      scoring, dropout, PREDICATE, True, FOLD, CHECK_D, CHECK_DV, BLOCK_M, BLOCK_D,
                                      BLOCK_DV)  # fmt: skip
    if visited is not None:
        tl.store(visited + tl.program_id(0), count_full(spans) + count_partial(spans))

    dk_base = dk + b_long * dk_strides[0] + kv_long * dk_strides[2]
    dv_base = dv + b_long * dv_strides[0] + kv_long * dv_strides[2]
    store_tile(dk_base, dk_strides, acc_k * scale, first, sizes.Tk, sizes.D, BLOCK_N, BLOCK_D)
    store_tile(dv_base, dv_strides, acc_v, first, sizes.Tk, sizes.Dv, BLOCK_N, BLOCK_DV)


@triton.jit
def _dq_tile(dq, q, do, lse2, delta, k_base, v_base, n, b, h, q_index, k_strides, v_strides, sizes, masking, scoring,
             dropout, PREDICATE: tl.constexpr, MASKED: tl.constexpr, FOLD: tl.constexpr, CHECK_D: tl.constexpr,
             CHECK_DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Add one tile of keys to dq."""
    k_first = n * BLOCK_N
    k_index = (k_first + tl.arange(0, BLOCK_N))[None, :]
    q_position = q_index + (sizes.Tk - sizes.Tq)
    k = load_tile(k_base, k_strides, k_first, sizes.Tk, sizes.D, BLOCK_N, BLOCK_D, MASKED, CHECK_D)
    v = load_tile(v_base, v_strides, k_first, sizes.Tk, sizes.Dv, BLOCK_N, BLOCK_DV, MASKED, CHECK_DV)
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
    p, slope = weights(s, lse2, b, h, q_position, k_index, q_index, sizes, masking, scoring, PREDICATE, MASKED, FOLD)
    ds = score_gradient(p, do, v, delta, b, h, q_index, k_index, dropout)
    if not FOLD:
        ds = ds * slope
    return dot(narrow(ds, k.dtype), k, dq)


@triton.jit
def dq_kernel(q, k, v, dout, lse2, delta, dq, visited, q_strides, k_strides, v_strides, dout_strides, dq_strides, scale,
              sizes, masking, scoring, dropout, PREDICATE: tl.constexpr, FOLD: tl.constexpr, CHECK_D: tl.constexpr,
              CHECK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute dq (B, Tq, H, D)."""
    tiles_m = tl.cdiv(sizes.Tq, BLOCK_M)
    m = tiles_m - 1 - tl.program_id(0) % tiles_m
    h = tl.program_id(0) // tiles_m % sizes.H
    b = tl.program_id(0) // tiles_m // sizes.H
    q_first = m * BLOCK_M
    rows = q_first + tl.arange(0, BLOCK_M)
    q_index = rows[:, None]
    first = q_first + sizes.Tk - sizes.Tq
    last = tl.minimum(q_first + BLOCK_M, sizes.Tq) - 1 + sizes.Tk - sizes.Tq

    b_long = tl.cast(b, tl.int64)
    h_long = tl.cast(h, tl.int64)
    h_kv = h_long // sizes.GROUP
    q_base = head(q, q_strides, b_long, h_long)
    do_base = head(dout, dout_strides, b_long, h_long)
    k_base = head(k, k_strides, b_long, h_kv)
    v_base = head(v, v_strides, b_long, h_kv)
    q_tile = load_tile(q_base, q_strides, q_first, sizes.Tq, sizes.D, BLOCK_M, BLOCK_D, True, CHECK_D)
    do_tile = load_tile(do_base, dout_strides, q_first, sizes.Tq, sizes.Dv, BLOCK_M, BLOCK_DV, True, CHECK_DV)
    row_of_all = (b_long * sizes.H + h_long) * sizes.Tq + rows
    lse2_rows = tl.load(lse2 + row_of_all, mask=rows < sizes.Tq, other=float("inf"))[:, None]
    delta_rows = tl.load(delta + row_of_all, mask=rows < sizes.Tq, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    spans = visits(masking, b, m, first, last, sizes, BLOCK_N, True)
    for i in range(count_full(spans)):
        acc = _dq_tile(acc, q_tile, do_tile, lse2_rows, delta_rows, k_base, v_base, full_tile(spans, i), b, h, q_index,
                       k_strides, v_strides, sizes, masking, scoring, dropout, PREDICATE, False, FOLD, CHECK_D,
                       CHECK_DV, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    for i in range(count_partial(spans)):
        acc = _dq_tile(acc, q_tile, do_tile, lse2_rows, delta_rows, k_base, v_base, partial_tile(spans, i), b, h,
                       q_index, k_strides, v_strides, sizes, masking, scoring, dropout, PREDICATE, True, FOLD, CHECK_D,
                       CHECK_DV, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
    if visited is not None:
        tl.store(visited + tl.program_id(0), count_full(spans) + count_partial(spans))

    dq_base = dq + b_long * dq_strides[0] + h_long * dq_strides[2]
    store_tile(dq_base, dq_strides, acc * scale, q_first, sizes.Tq, sizes.D, BLOCK_M, BLOCK_D)


def backward(problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, wants_dbias: bool):
    """Return dq, dk, dv in q's dtype, dsinks and dbias in float32 or None, from the forward pass's out and lse."""
    B, (Tq, Tk, H, _, D, Dv) = problem.B, problem.sizes
    dout = within_reach(dout)
    lse2, delta = (problem.empty(B, H, Tq, dtype=torch.float32) for _ in range(2))
    dq = problem.empty(B, Tq, H, D)
    dk, dv = problem.empty(B, Tk, problem.H_kv, D), problem.empty(B, Tk, problem.H_kv, Dv)
    prepare_launch(problem, out, dout, lse, dlse, delta, lse2).run()
    dkdv_launch(problem, dout, lse2, delta, dk, dv).run()
    dq_launch(problem, dout, lse2, delta, dq).run()
    dsinks, sinks = None, problem.call.sinks
    if sinks is not None:
        # The sink is a key with a value of zero, so its dp is 0: ds = p * (0 - delta).
        sinks = sinks.float().view(1, H, 1) - (0.0 if problem.shift is None else problem.shift)
        p_sink = torch.exp(sinks - lse.masked_fill(lse == -math.inf, math.inf))
        dsinks = -(p_sink * delta).sum(dim=(0, 2))
    return dq, dk, dv, dsinks, bias_gradient(problem, dout, lse2, delta) if wants_dbias else None


def prepare_launch(problem: Problem, out, dout, lse, dlse, delta, lse2) -> Launch:
    """Prepare the launch that fills delta and lse2 (B, H, Tq), float32."""
    block_m = 64
    grid = (math.ceil(problem.sizes.Tq / block_m) * problem.sizes.H * problem.B,)
    args = {"out": out, "dout": dout, "lse": lse, "dlse": dlse, "delta": delta, "lse2": lse2, "sizes": problem.sizes}
    args |= {"out_strides": out.stride(), "dout_strides": dout.stride()}
    args |= {"dlse_strides": () if dlse is None else dlse.stride()}
    args |= {"BLOCK_M": block_m, "BLOCK_DV": block_dim(problem.sizes.Dv)}
    return Launch(prepare_kernel, grid, args, {"num_warps": 4})


def dkdv_launch(problem: Problem, dout, lse2, delta, dk, dv, visited: Tensor | None = None) -> Launch:
    """Prepare the launch that fills dk and dv."""
    args = {"dk": dk, "dv": dv, "dk_strides": dk.stride(), "dv_strides": dv.stride(), "visited": visited}
    args |= {"dout": dout, "dout_strides": dout.stride(), "lse2": lse2, "delta": delta, "scale": problem.call.scale}
    return problem.launch(dkdv_kernel, "dkdv", problem.sizes.Tk, problem.H_kv, rows_are_queries=False, **args)


def dq_launch(problem: Problem, dout, lse2, delta, dq, visited: Tensor | None = None) -> Launch:
    """Prepare the launch that fills dq."""
    args = {"dq": dq, "dq_strides": dq.stride(), "visited": visited}
    args |= {"dout": dout, "dout_strides": dout.stride(), "lse2": lse2, "delta": delta, "scale": problem.call.scale}
    return problem.launch(dq_kernel, "dq", problem.sizes.Tq, problem.sizes.H, rows_are_queries=True, **args)

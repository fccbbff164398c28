"""The gradient of an additive bias of any shape: one program for each tile of the bias.

The program loops in a fixed order over the axes along which the bias is broadcast (batch, heads, queries, keys) and
adds up ds = p * (dp - delta) in registers, without atomic additions and without a (B, H, Tq, Tk) tensor.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_scores import score_gradient, weights
from kernels.problem import Launch, Problem
from kernels.tile_lists import tile_map
from kernels.tiles import dot, load_tile


@triton.jit
def _tile(acc, q_base, k_base, v_base, do_base, lse2_base, delta_base, m, n, b, h, q_strides, k_strides, v_strides,
          do_strides, sizes, masking, scoring, dropout, PREDICATE: tl.constexpr, CHECK_D: tl.constexpr,
          CHECK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
          BLOCK_DV: tl.constexpr):  # fmt: skip
    """Add ds of one tile of one head to acc."""
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    q_index = rows[:, None]
    q_position = q_index + (sizes.Tk - sizes.Tq)
    k_index = (n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    q = load_tile(q_base, q_strides, m * BLOCK_M, sizes.Tq, sizes.D, BLOCK_M, BLOCK_D, True, CHECK_D)
    k = load_tile(k_base, k_strides, n * BLOCK_N, sizes.Tk, sizes.D, BLOCK_N, BLOCK_D, True, CHECK_D)
    s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
    lse2 = tl.load(lse2_base + rows, mask=rows < sizes.Tq, other=float("inf"))
    p, _ = weights(s, lse2[:, None], b, h, q_position, k_index, q_index, sizes, masking, scoring, PREDICATE, True,
                   False)  # fmt: skip
    do = load_tile(do_base, do_strides, m * BLOCK_M, sizes.Tq, sizes.Dv, BLOCK_M, BLOCK_DV, True, CHECK_DV)
    v = load_tile(v_base, v_strides, n * BLOCK_N, sizes.Tk, sizes.Dv, BLOCK_N, BLOCK_DV, True, CHECK_DV)
    delta = tl.load(delta_base + rows, mask=rows < sizes.Tq, other=0.0)
    return acc + score_gradient(p, do, v, delta[:, None], b, h, q_index, k_index, dropout)


@triton.jit
def dbias_kernel(q, k, v, dout, lse2, delta, dbias, needed, needed_strides, visited, B, q_strides, k_strides, v_strides,
                 dout_strides, dbias_strides, sizes, masking, scoring, dropout, PREDICATE: tl.constexpr,
                 LOOP_B: tl.constexpr, LOOP_H: tl.constexpr, LOOP_Q: tl.constexpr, LOOP_K: tl.constexpr,
                 FOLD: tl.constexpr, CHECK_D: tl.constexpr, CHECK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Compute dbias, in bias's shape, float32. LOOP_*: bias is broadcast along this axis. needed: see `TileMap`."""
    tiles_m = tl.cdiv(sizes.Tq, BLOCK_M)
    tiles_n = tl.cdiv(sizes.Tk, BLOCK_N)
    # This program's part of each axis: all of it if the program loops, else one tile, head or row.
    left = tl.program_id(0)
    n_first, n_end, m_first, m_end, h_first, h_end, b_first, b_end = 0, tiles_n, 0, tiles_m, 0, sizes.H, 0, B
    if not LOOP_K:
        n_first, n_end, left = left % tiles_n, left % tiles_n + 1, left // tiles_n
    if not LOOP_Q:
        m_first, m_end, left = left % tiles_m, left % tiles_m + 1, left // tiles_m
    if not LOOP_H:
        h_first, h_end, left = left % sizes.H, left % sizes.H + 1, left // sizes.H
    if not LOOP_B:
        b_first, b_end = left, left + 1

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = 0
    for b in range(b_first, b_end):
        b_long = tl.cast(b, tl.int64)
        for h in range(h_first, h_end):
            h_long = tl.cast(h, tl.int64)
            h_kv = h_long // sizes.GROUP
            q_base = q + b_long * q_strides[0] + h_long * q_strides[2]
            k_base = k + b_long * k_strides[0] + h_kv * k_strides[2]
            v_base = v + b_long * v_strides[0] + h_kv * v_strides[2]
            do_base = dout + b_long * dout_strides[0] + h_long * dout_strides[2]
            lse2_base = lse2 + (b_long * sizes.H + h_long) * sizes.Tq
            delta_base = delta + (b_long * sizes.H + h_long) * sizes.Tq
            for m in range(m_first, m_end):
                for n in range(n_first, n_end):
                    tile = needed + b_long * needed_strides[0] + m * needed_strides[1] + n * needed_strides[2]
                    if tl.load(tile) != 0:
                        acc = _tile(acc, q_base, k_base, v_base, do_base, lse2_base, delta_base, m, n, b, h, q_strides,
                                    k_strides, v_strides, dout_strides, sizes, masking, scoring, dropout, PREDICATE,
                                    CHECK_D, CHECK_DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV)  # fmt: skip
                        count += 1
    if visited is not None:
        tl.store(visited + tl.program_id(0), count)

    if LOOP_Q:
        rows = tl.zeros((1, 1), tl.int64)
        acc = tl.sum(acc, 0)[None, :]
    else:
        rows = tl.cast(m_first * BLOCK_M + tl.arange(0, BLOCK_M), tl.int64)[:, None]
    if LOOP_K:
        columns = tl.zeros((1, 1), tl.int64)
        acc = tl.sum(acc, 1)[:, None]
    else:
        columns = tl.cast(n_first * BLOCK_N + tl.arange(0, BLOCK_N), tl.int64)[None, :]
    base = dbias + tl.cast(b_first, tl.int64) * dbias_strides[0] + tl.cast(h_first, tl.int64) * dbias_strides[1]
    pointers = base + rows * dbias_strides[2] + columns * dbias_strides[3]
    tl.store(pointers, acc, mask=(rows < sizes.Tq) & (columns < sizes.Tk))


def bias_gradient(problem: Problem, dout: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    """Compute dbias in bias's shape, float32."""
    bias = problem.call.bias
    if 0 in (problem.B, *problem.sizes[:2]):
        return torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    dbias = problem.empty(*bias.shape, dtype=torch.float32)
    dbias_launch(problem, dout, lse2, delta, dbias).run()
    return dbias


def dbias_launch(problem: Problem, dout, lse2, delta, dbias, visited: Tensor | None = None) -> Launch:
    """Prepare the launch that fills dbias, whose shape broadcasts to (B, H, Tq, Tk)."""
    Tq, Tk, H = problem.sizes[:3]
    dbias = dbias.view((1,) * (4 - dbias.ndim) + tuple(dbias.shape))
    loops = [n == 1 for n in dbias.shape]
    args = {"dout": dout, "dout_strides": dout.stride(), "lse2": lse2, "delta": delta, "B": problem.B}
    args |= {"dbias": dbias, "dbias_strides": dbias.stride(), "visited": visited}
    args |= dict(zip(("LOOP_B", "LOOP_H", "LOOP_Q", "LOOP_K"), loops))
    launch = problem.launch(dbias_kernel, "dbias", Tq, H, rows_are_queries=True, needed=None, needed_strides=(), **args)
    block_m, block_n = launch.args["BLOCK_M"], launch.args["BLOCK_N"]
    needed = tile_map(problem.call.pattern(), Tq, Tk, block_m, block_n, dout.device).needed.to(torch.int8)
    strides = needed.stride(0) if needed.shape[0] > 1 else 0, needed.stride(1), needed.stride(2)
    pieces = problem.B, H, math.ceil(Tq / block_m), math.ceil(Tk / block_n)
    programs = math.prod(n for n, is_looped in zip(pieces, loops) if not is_looped)
    return launch._replace(grid=(programs,), args=launch.args | {"needed": needed, "needed_strides": strides})

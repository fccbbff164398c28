"""What the kernels of the backward pass share: the softmax, computed again from lse, and the gradient of the scores."""

import triton
import triton.language as tl

from kernels.tiles import add_bias, dot, dropout_keep, load_bias, logits, visible


@triton.jit
def weights(s, lse2, b, h, q_position, k_index, q_index, sizes, masking, scoring, PREDICATE: tl.constexpr,
            MASKED: tl.constexpr, FOLD: tl.constexpr):  # fmt: skip
    """Compute the softmax's weights p from dot products s, and the derivative of softcap.

    Rows are queries and columns keys, or the other way round: lse2, q_index and k_index broadcast to s.
    """
    slope = 1.0
    if FOLD:
        p = tl.exp2(s * scoring.scale - lse2)
    else:
        s, slope = logits(s, scoring, h, q_position, k_index)
        if scoring.bias is not None:
            row = (tl.cast(b, tl.int64) * sizes.H + h) * sizes.Tq + q_index
            shift = tl.load(scoring.shift + row, mask=q_index < sizes.Tq, other=0.0)
            s = add_bias(s, load_bias(scoring, b, h, q_index, k_index, sizes), shift)
        p = tl.exp2(s - lse2)
    if MASKED:
        seen = visible(masking, b, q_position, k_index, q_index, k_index, sizes, PREDICATE)
        p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def score_gradient(p, do, v, delta, b, h, q_index, k_index, dropout):
    """Compute ds = p * (dp - delta) for a tile of queries by keys: the gradient of the logits after softcap."""
    dp = dot(do, tl.trans(v), tl.zeros((do.shape[0], v.shape[0]), tl.float32))
    if dropout.seed is not None:
        dp = tl.where(dropout_keep(dropout, b, h, q_index, k_index), dp * dropout.scale, 0.0)
    return p * (dp - delta)

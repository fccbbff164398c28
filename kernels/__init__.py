"""Triton kernels for attention and for the loss, each with a plain PyTorch reference.

from kernels import attention, masks
out = attention(q, k, v, mask=masks.sliding_window(256))  # (B, T, H, D) in, (B, T, H, D) out
loss = linear_cross_entropy(x, weight, targets)  # x (..., C), weight (V, C), targets (...); the head is fused in
"""

from kernels import masks
from kernels.attention import attention
from kernels.attention_decode import attention_decode
from kernels.attention_reference import attention_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

__all__ = [
    "attention",
    "attention_decode",
    "attention_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "masks",
]

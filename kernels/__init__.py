"""Attention kernels in Triton, each beside a plain PyTorch reference.

from kernels import attention, masks
out = attention(q, k, v, mask=masks.sliding_window(256))  # (B, T, H, D) in, (B, T, H, D) out
"""

from kernels import masks
from kernels.attention import attention
from kernels.attention_decode import attention_decode
from kernels.attention_reference import attention_reference

__all__ = ["attention", "attention_decode", "attention_reference", "masks"]

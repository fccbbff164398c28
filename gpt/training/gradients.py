"""Norm and scaling of all gradients together."""

import torch
from torch import Tensor, nn

from gpt.distributed import full, local


def gradient_norm(weights: list[nn.Parameter]) -> Tensor:
    """Return the norm () of all gradients together, over all ranks."""
    return full(torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]))


@torch.no_grad()
def scale_gradients(weights: list[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a factor ()."""
    torch._foreach_mul_([local(p.grad) for p in weights if p.grad is not None], factor)

"""Checks of the arguments of GPT.forward, GPT.logits and GPT.loss."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from gpt.model.config import ModelConfig
from kernels.arguments import check_tensors


def check_call(
    config: ModelConfig, weight: Tensor, idx: Tensor, positions: Tensor | None, segment_ids: Tensor | None
) -> None:
    """Raise TypeError or ValueError for arguments of GPT.forward that do not fit, quickly: each call is checked."""
    given = {"idx": idx, "positions": positions, "segment_ids": segment_ids}
    given = {name: x for name, x in given.items() if x is not None or name == "idx"}
    check_tensors(**given)
    if idx.ndim != 2:
        raise ValueError(f"idx has the axes (B, T), not shape {tuple(idx.shape)}")
    B, T = idx.shape
    for name, x in given.items():
        known = (torch.int32,) if name == "segment_ids" else (torch.int64, torch.int32)
        if x.dtype not in known:
            raise TypeError(f"{name} is {' or '.join(map(str, known))}, not {x.dtype}")
        if x.shape != (B, T) and not (name == "positions" and x.shape == (T,)):
            raise ValueError(f"{name} has the shape {(B, T)} of idx, not {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"{name} is on {x.device}, and the model on {weight.device}")
    # Elsewhere nothing waits to see them, and the plan's have no values.
    if positions is not None and positions.device.type == "cpu" and positions.numel() and not is_fake(positions):
        least, most = (int(n) for n in positions.aminmax())
        if least < 0 or most >= config.seq_len:
            raise ValueError(f"positions are 0 to {config.seq_len - 1}, not {least} to {most}")


def check_hidden(weight: Tensor, hidden: Tensor) -> None:
    """Raise TypeError or ValueError for what the head cannot read."""
    check_tensors(hidden=hidden)
    if hidden.shape[-1:] != (weight.shape[1],):
        raise ValueError(f"hidden has the shape (..., {weight.shape[1]}), not {tuple(hidden.shape)}")
    if not torch.is_autocast_enabled(weight.device.type) and hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, and the head {weight.dtype}")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, and the head on {weight.device}")


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise TypeError or ValueError unless there is one target for each position of hidden (..., C)."""
    check_tensors(targets=targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets has the shape {tuple(hidden.shape[:-1])} of idx, not {tuple(targets.shape)}")

"""Checks of the arguments of GPT.forward, GPT.logits and GPT.loss."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from gpt.model.config import ModelConfig
from kernels.arguments import check_tensors


def check_call(
    config: ModelConfig, weight: Tensor, idx: Tensor, positions: Tensor | None, segment_ids: Tensor | None
) -> None:
    """Raise TypeError or ValueError for invalid arguments of GPT.forward. Runs at each call, so it must be fast."""
    given = {"idx": idx, "positions": positions, "segment_ids": segment_ids}
    given = {name: x for name, x in given.items() if x is not None or name == "idx"}
    check_tensors(**given)
    if idx.ndim != 2:
        raise ValueError(f"idx must have the shape (B, T), not {tuple(idx.shape)}")
    B, T = idx.shape
    for name, x in given.items():
        known = (torch.int32,) if name == "segment_ids" else (torch.int64, torch.int32)
        if x.dtype not in known:
            raise TypeError(f"{name} must be {' or '.join(map(str, known))}, not {x.dtype}")
        if x.shape != (B, T) and not (name == "positions" and x.shape == (T,)):
            raise ValueError(f"{name} must have the shape {(B, T)} of idx, not {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"{name} is on {x.device}, but the model is on {weight.device}")
    # Not on other devices, which would have to wait; fake tensors have no values.
    if positions is not None and positions.device.type == "cpu" and positions.numel() and not is_fake(positions):
        least, most = (int(n) for n in positions.aminmax())
        if least < 0 or most >= config.seq_len:
            raise ValueError(f"positions must be 0 to {config.seq_len - 1}, not {least} to {most}")


def check_hidden(weight: Tensor, hidden: Tensor) -> None:
    """Raise TypeError or ValueError for an invalid input of the head."""
    check_tensors(hidden=hidden)
    if hidden.shape[-1:] != (weight.shape[1],):
        raise ValueError(f"hidden must have the shape (..., {weight.shape[1]}), not {tuple(hidden.shape)}")
    if not torch.is_autocast_enabled(weight.device.type) and hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, but the head is {weight.dtype}")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, but the head is on {weight.device}")


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise TypeError or ValueError unless targets has one value for each position of hidden (..., C)."""
    check_tensors(targets=targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(hidden.shape[:-1])} of idx, not {tuple(targets.shape)}")

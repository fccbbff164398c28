"""What GPT.forward takes besides tokens: a cache of keys and values; and the checks of its arguments."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from gpt.arguments import checked, shown
from gpt.config import ModelConfig
from gpt.device import Device, pick_device
from gpt.errors import require
from kernels.arguments import check_tensors

if TYPE_CHECKING:
    from gpt.model import GPT


class KVCache:
    """Keys and values of the tokens seen so far, in one fixed buffer per layer.

    k, v: (n_layer, B, capacity, H_kv, D). `length` tokens of it are filled; GPT.forward appends and advances it.
    """

    @checked
    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ):
        for name, size in (("batch_size", batch_size), ("capacity", capacity)):
            require(0 <= size < 1 << 31, f"{name} must be at least 0 and below {1 << 31}, not {shown(size)}")
        require(dtype is None or dtype.is_floating_point, f"dtype must be a floating point one, not {dtype}")
        device = None if device is None else pick_device(device)
        shape = (config.n_layer, batch_size, capacity, config.kv_heads, config.head_width)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.capacity = capacity

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, T, H_kv, D) of one layer behind what is there; all of that layer's keys and values so far."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens; {end} are too many")
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]


def check_call(
    model: "GPT", idx: Tensor, positions: Tensor | None, segment_ids: Tensor | None, cache: KVCache | None
) -> None:
    """Raise TypeError or ValueError for arguments of GPT.forward that do not fit, quickly: each call is checked."""
    given = {"idx": idx, "positions": positions, "segment_ids": segment_ids}
    given = {name: x for name, x in given.items() if x is not None or name == "idx"}
    check_tensors(**given)
    if idx.ndim != 2:
        raise ValueError(f"idx has the axes (B, T), not shape {tuple(idx.shape)}")
    B, T = idx.shape
    weight, config = model.embed.weight, model.config
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
    if cache is None:
        return
    if segment_ids is not None:
        raise ValueError("segment_ids and a cache do not go together: the cached tokens' segments are not kept")
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache is a KVCache or None, not {shown(cache)}")
    shape = (config.n_layer, B, cache.capacity, config.kv_heads, config.head_width)
    if cache.k.shape != shape or cache.k.device != weight.device:
        raise ValueError(
            f"cache is {tuple(cache.k.shape)} on {cache.k.device}, and this call needs {shape} on {weight.device}"
        )


def check_hidden(model: "GPT", hidden: Tensor) -> None:
    """Raise TypeError or ValueError for what the head cannot read."""
    check_tensors(hidden=hidden)
    if hidden.shape[-1:] != (model.config.n_embd,):
        raise ValueError(f"hidden has the shape (..., {model.config.n_embd}), not {tuple(hidden.shape)}")
    weight = model.head.weight
    if not torch.is_autocast_enabled(weight.device.type) and hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype}, and the head {weight.dtype}")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, and the head on {weight.device}")


def check_targets(targets: Tensor, hidden: Tensor) -> None:
    """Raise TypeError or ValueError unless there is one target for each position of hidden (..., C)."""
    check_tensors(targets=targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets has the shape {tuple(hidden.shape[:-1])} of idx, not {tuple(targets.shape)}")

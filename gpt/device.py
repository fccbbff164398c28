"""Device, precision, random seeds and compiler."""

import ctypes
import functools
import hashlib
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from gpt.arguments import shown
from gpt.errors import UserError

Device = str | torch.device


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether the device has matrix units for bfloat16: GPUs from sm_80 up, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def pick_device(name: Device) -> torch.device:
    """Return the named device; auto prefers a GPU. Raises UserError if the device cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {shown(name)} cannot be used here: {str(error).splitlines()[0]:.160}") from error
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Return the autocast context of a dtype; auto is bfloat16 if the device has matrix units for it."""
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=getattr(torch, dtype))


def seed_generators(device: torch.device, *numbers: int) -> None:
    """Seed torch's global CPU and device generators with a hash of the numbers, without waiting for the device."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def give_back_freed_memory() -> None:
    """Make glibc return freed blocks of 1 MiB and more to the system at once, which costs a little time.

    By default glibc keeps freed blocks of up to 32 MiB. Under activation checkpointing gradients end up between
    activations, the gaps fit nothing else, and the heap grows. Does nothing without glibc.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def require_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile needs a C++ compiler and none is installed."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if device.type == "cpu" and not any(c and shutil.which(c) for c in compilers):
        raise UserError("--compile needs a C++ compiler on a CPU and none was found: install g++, or leave it out")

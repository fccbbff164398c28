"""What a run computes on: the device, its precision, and whether it can compile."""

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
    """Whether bfloat16 products run on matrix units: GPUs from sm_80 up, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def pick_device(name: Device) -> torch.device:
    """The device that a name asks for; auto takes a GPU where there is one. UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {shown(name)} cannot be used here: {str(error).splitlines()[0]:.160}") from error
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """The autocast context of a dtype's name; auto is bfloat16 where the device multiplies it in hardware."""
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=getattr(torch, dtype))


def seed_generators(device: torch.device, *numbers: int) -> None:
    """Seed torch's global generators of the CPU and of the device by a hash of the numbers; waits for no device."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def give_back_freed_memory() -> None:
    """From now on memory of a MiB or more goes back to the system when it is freed, at the cost of a little time.

    glibc would keep freed pieces of up to 32 MiB for later. Where gradients come to lie between activations that are
    freed and computed again, what is left between them fits nothing, and the heap grows. Does nothing without glibc.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def require_compiler(device: torch.device) -> None:
    """UserError where torch.compile would fail for want of a C++ compiler."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    if device.type == "cpu" and not any(c and shutil.which(c) for c in compilers):
        raise UserError("--compile needs a C++ compiler on a CPU and none was found: install g++, or leave it out")

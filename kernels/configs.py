"""Tile sizes: a pure function of (architecture, dtype, head dims, kernel), from the table below.

The same inputs therefore give the same bits, run after run. Each entry compiles for its architecture within its shared
memory; for 16-bit inputs and head dims up to 128 without a register spilled (tests/test_kernels_compile.py).
"""

from typing import NamedTuple

import torch

# What one program may use of it, in bytes (CUDA C++ Programming Guide, table "Technical Specifications"; CDNA3 ISA).
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}


class Config(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys in a tile; num_stages loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


INTERPRETER = Config(64, 64, 4, 1)


def architecture(device: torch.device) -> str:
    """The table's name for what a device is; "interpreter" for the CPU, on which kernels run in numpy."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    if major == 8:
        return "sm_89"
    # What is newer than the table has at least the shared memory of the small chips of its time.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def choose(arch: str, dtype: torch.dtype, D: int, Dv: int, kernel: str) -> Config:
    """The tile of `kernel` ("forward", "dkdv" or "dq") for head dims that round up to powers of two."""
    width = max(block_dim(D), block_dim(Dv))
    if arch == "interpreter":
        return INTERPRETER
    bits = 32 if dtype == torch.float32 else 16
    for limit, config in TABLE[arch][kernel, bits]:
        if width <= limit:
            return config
    raise ValueError(f"head dims of {D} and {Dv} are not supported: 8 to 256 are")


def block_dim(D: int) -> int:
    """The power of two that a head dim is computed as; matrix instructions take 16 at least."""
    return max(16, 1 << (D - 1).bit_length())


# arch -> (kernel, bits of an input) -> (largest head dim, config), ascending.
_SMALL = {
    ("forward", 16): [(64, Config(128, 64, 4, 3)), (128, Config(128, 64, 8, 2)), (256, Config(64, 32, 4, 2))],
    ("dkdv", 16): [(64, Config(64, 64, 4, 2)), (128, Config(32, 64, 4, 2)), (256, Config(32, 32, 4, 1))],
    ("dq", 16): [(64, Config(64, 64, 4, 2)), (128, Config(64, 32, 4, 2)), (256, Config(32, 32, 4, 1))],
    ("forward", 32): [(64, Config(64, 32, 4, 2)), (128, Config(32, 32, 4, 2)), (256, Config(16, 32, 4, 1))],
    ("dkdv", 32): [(64, Config(32, 32, 4, 1)), (128, Config(32, 16, 4, 1)), (256, Config(16, 16, 4, 1))],
    ("dq", 32): [(64, Config(32, 32, 4, 1)), (128, Config(32, 16, 4, 1)), (256, Config(16, 16, 4, 1))],
}
TABLE = dict.fromkeys(SHARED_MEMORY, _SMALL)

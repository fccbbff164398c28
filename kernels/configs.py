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
# No tile has more rows or columns.
MAX_TILE_EXTENT = 256


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
    """The tile of `kernel` ("forward", "dkdv", "dq" or "dbias") for head dims that round up to powers of two."""
    width = max(block_dim(D), block_dim(Dv))
    if arch == "interpreter":
        return INTERPRETER
    bits = 32 if dtype == torch.float32 else 16
    # A tile of dbias holds what a tile of dq does, and its sum besides: the same one, with fewer columns.
    if kernel == "dbias":
        config = choose(arch, dtype, D, Dv, "dq")
        return config._replace(block_n=min(config.block_n, 32), num_stages=1)
    for limit, config in TABLE[arch, bits, kernel]:
        if width <= limit:
            return config
    raise ValueError(f"head dims of {D} and {Dv} are not supported: 8 to 256 are")


def block_dim(D: int) -> int:
    """The power of two that a head dim is computed as; matrix instructions take 16 at least."""
    return max(16, 1 << (D - 1).bit_length())


def _rows(forward: list, dkdv: list, dq: list) -> dict:
    """Configs for head dims up to 64, 128 and 256, for each kernel."""
    return {
        name: [(limit, Config(*config)) for limit, config in zip((64, 128, 256), configs)]
        for name, configs in (("forward", forward), ("dkdv", dkdv), ("dq", dq))
    }


# float32 multiplies outside the matrix units of NVIDIA's chips: small tiles, the same everywhere.
_FLOAT32 = _rows(
    forward=[(64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)],
    dkdv=[(32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
    dq=[(32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
)

# What decides is the compiler's report (benchmarks/compile_report.py): no spill first, then the largest tile, then
# loads in flight. Two programs of four warps hide each other's softmax: preferred where registers allow. Triton 3.6 to
# 3.9 must agree, whose compilers differ by some registers. Nothing here has been tuned by timing yet.
_16_BIT = {
    "sm_80": _rows(
        forward=[(128, 32, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)],
        dkdv=[(32, 128, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 1)],
    ),
    "sm_89": _rows(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
        dkdv=[(32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 1)],
    ),
    "sm_90": _rows(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)],
        dkdv=[(32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)],
    ),
    "sm_100": _rows(
        forward=[(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)],
        dkdv=[(64, 128, 8, 1), (32, 128, 8, 1), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 1)],
    ),
    "sm_120": _rows(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
        dkdv=[(32, 128, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 1)],
    ),
    "gfx942": _rows(
        forward=[(128, 64, 4, 2), (128, 64, 4, 2), (64, 32, 4, 2)],
        dkdv=[(32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        dq=[(64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)],
    ),
}
# (arch, bits of an input, kernel) -> (largest head dim, config), ascending.
TABLE = {
    (arch, bits, kernel): row
    for arch in SHARED_MEMORY
    for bits, rows in ((16, _16_BIT[arch]), (32, _FLOAT32))
    for kernel, row in rows.items()
}

"""Tile sizes: a pure function of (architecture, dtype, head dims, kernel), from the table below.

So the same inputs give the same bits in every run, unless KERNELS_TUNED_TABLE names a file of configs chosen by timing
(`python -m benchmarks.tune_attention` writes one). Each config fits into its architecture's shared memory and, for
16-bit inputs and head dims up to 128, spills no register with Triton 3.6, 3.7 and 3.9 (tests/test_kernels_compile.py;
make tritons).
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

log = logging.getLogger("kernels")

# Bytes available to one program (CUDA C++ Programming Guide, table "Technical Specifications"; CDNA3 ISA).
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}
# Chips with a copy engine for tiles (tensor memory accelerator, TMA).
HAS_TMA = ("sm_90", "sm_100", "sm_120")
HEAD_DIMS = (64, 128, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TUNED_KERNELS = ("forward", "dkdv", "dq")
MAX_TILE_EXTENT = 256  # rows or columns of a tile


class Config(NamedTuple):
    """A tile of BLOCK_M queries by BLOCK_N keys; num_stages loads in flight.

    tma: the copy engine of sm_90 and later fetches tiles, if it can read q, k, v and dout: see problem.descriptor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


class Key(NamedTuple):
    """What a config is for. head_dim, one of HEAD_DIMS, is the largest."""

    arch: str
    dtype: torch.dtype
    head_dim: int
    kernel: str


INTERPRETER = Config(64, 64, 4, 1)


def architecture(device: torch.device) -> str:
    """Return the table's name of a device's architecture; "interpreter" for the CPU, on which kernels run in numpy."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 0), (8, 7)):
        return "sm_80"
    if major == 8:
        return "sm_89"
    # A chip newer than the table has at least the shared memory of the table's small chips.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def choose(arch: str, dtype: torch.dtype, D: int, Dv: int, kernel: str) -> Config:
    """Return the config of `kernel` ("forward", "dkdv", "dq", "dbias" or "decode") for these head dims."""
    # dbias needs the registers of dq and those of its sum: take dq's tile with fewer columns.
    if kernel == "dbias":
        config = choose(arch, dtype, D, Dv, "dq")
        return config._replace(block_n=min(config.block_n, 32), num_stages=1, tma=False)
    key = Key(arch, dtype, head_dim_class(D, Dv), kernel)
    if key in tuned():
        return tuned()[key]
    if arch == "interpreter":
        return INTERPRETER
    return dict(TABLE[arch, 32 if dtype == torch.float32 else 16, kernel])[key.head_dim]


def head_dim_class(D: int, Dv: int) -> int:
    """Return the smallest of HEAD_DIMS that is not below D and Dv."""
    for limit in HEAD_DIMS:
        if max(D, Dv) <= limit:
            return limit
    raise ValueError(f"head dims must be from 8 to 256, not {D} and {Dv}")


def block_dim(D: int) -> int:
    """Return the power of two to which a head dim is padded: at least 16, for matrix instructions."""
    return max(16, 1 << (D - 1).bit_length())


def _rows(forward: list, dkdv: list, dq: list) -> dict:
    """Name each kernel's configs by head dim."""
    return {
        name: [(limit, Config(*config)) for limit, config in zip(HEAD_DIMS, configs)]
        for name, configs in (("forward", forward), ("dkdv", dkdv), ("dq", dq))
    }


# NVIDIA's chips multiply float32 outside the matrix units: small tiles, the same everywhere.
_FLOAT32 = _rows(
    forward=[(64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)],
    dkdv=[(32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
    dq=[(32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)],
)

# Chosen by the compiler's report (benchmarks/compile_report.py), not by timing yet: first no spill, even with BigBird's
# predicate, then the fewest instructions for each query-key pair, then loads in flight. Two programs of four warps
# hide each other's softmax and are preferred if registers allow. With Triton 3.6, 3.7 and 3.9 nothing spills under
# full, causal, window, window+sinks and BigBird, but their compilers differ by a few registers: the forward tiles of
# sm_80 and sm_120 at D = 128 and of sm_89 at D = 64 have none to spare.
# TMA is off until it is timed, although on sm_90 and sm_100 up to D = 128 it saves 8 to 30 percent of the registers. On
# sm_120, and with tiles too small for wgmma, it can spill: mma.sync needs its operands in registers, and the compiler
# keeps tiles there that came by TMA.
_16_BIT = {
    "sm_80": _rows(
        forward=[(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 8, 2)],
        dkdv=[(32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)],
    ),
    "sm_89": _rows(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
        dkdv=[(32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)],
    ),
    "sm_90": _rows(
        forward=[(128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)],
        dkdv=[(32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)],
    ),
    "sm_100": _rows(
        forward=[(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)],
        dkdv=[(64, 128, 8, 1), (32, 128, 8, 1), (32, 32, 8, 1)],
        dq=[(128, 64, 4, 2), (128, 32, 4, 2), (64, 64, 8, 1)],
    ),
    "sm_120": _rows(
        forward=[(128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
        dkdv=[(32, 128, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
        dq=[(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)],
    ),
    "gfx942": _rows(
        forward=[(128, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 2)],
        dkdv=[(32, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)],
        dq=[(64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)],
    ),
}
# Decoding reads each key once and is limited by memory bandwidth. block_m is the most rows (queries by heads of a
# group) that share a tile of keys; the rest allows as many loads in flight as registers and shared memory do. block_n
# divides attention_decode_triton.SPLIT.
_DECODE = {
    16: [(64, Config(64, 64, 4, 3)), (128, Config(32, 32, 4, 4)), (256, Config(16, 32, 4, 2))],
    32: [(64, Config(16, 32, 4, 2)), (128, Config(16, 16, 8, 2)), (256, Config(16, 16, 4, 1))],
}
# (arch, bits of an input, kernel) -> (largest head dim, config), ascending.
TABLE = {
    (arch, bits, kernel): row
    for arch in SHARED_MEMORY
    for bits, rows in ((16, _16_BIT[arch]), (32, _FLOAT32))
    for kernel, row in (*rows.items(), ("decode", _DECODE[bits]))
}
# Exceptions where 64 or 32 keys would spill a few bytes with some mask or with Triton 3.6.
for _arch in ("sm_80", "sm_90", "sm_100"):
    TABLE[_arch, 16, "decode"] = [(64, Config(64, 32, 4, 4)), *_DECODE[16][1:]]
for _arch in ("sm_89", "sm_120"):
    TABLE[_arch, 16, "decode"] = [(64, Config(64, 64, 8, 3)), *_DECODE[16][1:]]
for _arch in ("sm_90", "sm_100", "sm_120"):
    TABLE[_arch, 16, "decode"][1] = (128, Config(32, 64, 4, 3))
# Three stages would take all the shared memory, and one program would run instead of two.
TABLE["gfx942", 16, "decode"] = [(limit, config._replace(num_stages=2)) for limit, config in _DECODE[16]]


@functools.cache
def tuned() -> dict[Key, Config]:
    """Return the configs of the file that KERNELS_TUNED_TABLE names, read once: they override the table."""
    name = os.environ.get("KERNELS_TUNED_TABLE")
    if not name:
        return {}
    found = read_tuned(Path(name))
    log.warning("tiles from %s (KERNELS_TUNED_TABLE): bits may differ from those of the default table", name)
    return found


@contextlib.contextmanager
def trying(key: Key, config: Config) -> Iterator[None]:
    """Override the config for `key` within a with block."""
    table = tuned()
    before = table.get(key)
    table[key] = config
    try:
        yield
    finally:
        del table[key]
        if before is not None:
            table[key] = before


def read_tuned(path: Path) -> dict[Key, Config]:
    """Read a file that benchmarks.tune_attention wrote; raise ValueError, with the file's name, for any other."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        found = dict(map(_entry, entries))
        if len(found) < len(entries):
            raise ValueError("two entries are for the same arch, dtype, head_dim and kernel")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} (KERNELS_TUNED_TABLE) is not a table of tuned tiles: {what}") from error
    return found


def _entry(entry: dict) -> tuple[Key, Config]:
    """Check and convert one entry of the file, ignoring additional fields."""
    allowed = {"arch": SHARED_MEMORY, "dtype": DTYPES, "head_dim": HEAD_DIMS, "kernel": TUNED_KERNELS}
    extents = (16, 32, 64, 128, MAX_TILE_EXTENT)
    allowed |= {"block_m": extents, "block_n": extents, "num_warps": (1, 2, 4, 8, 16), "num_stages": range(1, 9)}
    allowed["tma"] = (False, True) if entry["arch"] in HAS_TMA else (False,)
    for name, values in allowed.items():
        # JSON's true is not a number, though Python's True equals 1.
        if entry[name] not in values or isinstance(entry[name], bool) != (name == "tma"):
            raise ValueError(f"{name} is {entry[name]!r} in {entry}")
    key = Key(entry["arch"], DTYPES[entry["dtype"]], entry["head_dim"], entry["kernel"])
    return key, Config(*(entry[name] for name in Config._fields))

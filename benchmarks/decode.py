"""Time decoding on a GPU: `python -m benchmarks.decode`.

Measures the share of the memory's bandwidth that `attention_decode` reaches on a cache too large for the level-2 cache.
The bandwidth is measured in the same run: a copy of as many bytes, timed in turn with the kernels, in an order that
swaps each round. Both are replayed from CUDA graphs, as a server would do, so that no launch from Python is timed.
Reports medians, and the median of the paired shares. `--write` writes the result to results/decode/.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import positive, print_table
from benchmarks.attention import RESULTS, EventTimer, assert_alike, conditions, interleaved, slug, write_record
from kernels import attention_decode, attention_reference

# Cached tokens of all sequences: at least 256 MiB of keys and values, more than any GPU's level-2 cache today.
TOKENS = 1 << 17


@dataclass(frozen=True)
class Setting:
    """One line of the table: B sequences of T cached tokens, H_kv key heads of D, `group` query heads for each."""

    B: int
    T: int
    H_kv: int
    group: int
    D: int
    page: int = 0

    def bytes(self) -> int:
        """Count the bytes of the cache in bfloat16, each key and value once; other reads and writes are left out."""
        return self.B * self.T * self.H_kv * self.D * 2 * 2


@dataclass
class Row:
    """Medians: milliseconds of a call and of a copy, GB/s of each (a copy reads and writes), and the paired share."""

    setting: Setting
    milliseconds: float
    copy_milliseconds: float
    gigabytes_per_second: float
    copy_gigabytes_per_second: float
    share: float


def settings() -> list[Setting]:
    """List the lines of the table: few long caches, many short ones, single and grouped heads, and pages."""
    found = [
        Setting(B, TOKENS // B, H_kv, group, D)
        for D in (64, 128)
        for H_kv, group in ((16, 1), (8, 4))
        for B in (1, 16, 64)
    ]
    return found + [Setting(16, TOKENS // 16, 8, 4, 128, page) for page in (16, 64)]


def prepare(setting: Setting, device: str, impl: str) -> Callable:
    """Return the call to time, after comparing one of its sequences with the reference."""
    B, T, H_kv, group, D = setting.B, setting.T, setting.H_kv, setting.group, setting.D
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = randn(B, 1, H_kv * group, D), randn(B, T, H_kv, D), randn(B, T, H_kv, D)
    lens = torch.full((B,), T, dtype=torch.int32, device=device)
    expected = attention_reference(q[:1], k[:1], v[:1])
    table = None
    if setting.page:
        # Pages in random order, as in a server that has run for a while.
        order = torch.randperm(B * T // setting.page, generator=generator, device=device)
        k, v = (x.view(-1, setting.page, H_kv, D)[order] for x in (k, v))
        table = order.argsort().int().view(B, -1)

    def call() -> torch.Tensor:
        return attention_decode(q, k, v, lens, block_table=table, impl=impl)

    assert_alike("attention_decode", [call()[:1]], "the reference", [expected])
    return call


def captured(fn: Callable) -> Callable:
    """Capture fn, which must have run before, in a CUDA graph; return its replay."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def measure(setting: Setting, timer: Callable, rounds: int, device: str = "cuda", impl: str = "triton") -> Row:
    """Time one setting for `rounds` rounds, after three that do not count."""
    call = prepare(setting, device, impl)
    # A copy reads half of the bytes and writes half, so that it moves as many as a call reads.
    source = torch.ones(setting.bytes() // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "ours": call}
    if device == "cuda":
        calls = {name: captured(fn) for name, fn in calls.items()}
    times = interleaved(calls, timer, rounds)
    ours, copy = statistics.median(times["ours"]), statistics.median(times["copy"])
    share = statistics.median(theirs / own for own, theirs in zip(times["ours"], times["copy"]))
    return Row(setting, ours, copy, setting.bytes() / ours / 1e6, setting.bytes() / copy / 1e6, share)


def show(rows: list[Row], device: str) -> None:
    """Print the table."""
    headings, cells = ("B", "T", "H_kv", "group", "D", "page", "MiB", "us", "GB/s", "copy GB/s", "share of a copy"), []
    for row in rows:
        s = row.setting
        shape = map(str, (s.B, s.T, s.H_kv, s.group, s.D, s.page or "-", s.bytes() >> 20))
        speeds = f"{row.milliseconds * 1e3:.0f}", f"{row.gigabytes_per_second:.0f}"
        cells.append((*shape, *speeds, f"{row.copy_gigabytes_per_second:.0f}", f"{row.share:.0%}"))
    print_table(f"attention_decode, bf16, one new query, on {device}", headings, cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=30)
    parser.add_argument("--write", action="store_true", help="also write the result to --results")
    parser.add_argument("--results", type=Path, help="the folder to write to; by default benchmarks/results")
    args = parser.parse_args(argv)
    if args.results is not None and not args.write:
        parser.error("--results does nothing without --write: add --write")
    if not torch.cuda.is_available():
        print("benchmarks.decode needs a GPU and found none: nothing measured")
        return 0
    device = torch.cuda.get_device_name()
    before, timer = conditions(), EventTimer()
    rows = [measure(setting, timer, args.rounds) for setting in settings()]
    show(rows, device)
    if args.write:
        path, content = (args.results or RESULTS) / "decode" / f"{slug(device)}.json", [asdict(row) for row in rows]
        print(f"written to {write_record(path, 'decode', device, before, dtype='bfloat16', rows=content)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

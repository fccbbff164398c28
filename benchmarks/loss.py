"""Time the output head and its loss on a GPU: `python -m benchmarks.loss`.

Compares forward and backward of kernels.linear_cross_entropy with F.linear and F.cross_entropy, eager and compiled,
with float32 weights under bf16 autocast as in training: milliseconds, and the peak memory beyond the inputs. Every
round times each of them once, in a rotating order. Reports medians and writes results/loss-<device>.json.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import positive
from benchmarks.attention import RESULTS, EventTimer, assert_alike, conditions, interleaved, slug, write_record
from kernels import linear_cross_entropy

OURS, EAGER, COMPILED = "ours", "eager", "compiled"


@dataclass
class Row:
    """Medians of one contender at one size; None if it did not fit into memory."""

    tokens: int
    name: str
    milliseconds: float | None
    peak_gib: float | None

    def cells(self) -> list[str]:
        numbers = (self.milliseconds, self.peak_gib)
        return [f"{self.tokens:,}", self.name, *("does not fit" if n is None else f"{n:.2f}" for n in numbers)]


def plain(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def contenders() -> dict[str, Callable]:
    return {OURS: linear_cross_entropy, EAGER: plain, COMPILED: torch.compile(plain, dynamic=False)}


def step_of(loss: Callable, x, weight, targets, device: str) -> Callable:
    """Return a function that runs forward and backward."""

    def step():
        with torch.autocast(device, torch.bfloat16):
            value = loss(x, weight, targets)
        return value.detach(), *torch.autograd.grad(value, (x, weight))

    return step


def measure(
    tokens: int, C: int, V: int, losses: dict[str, Callable], timer: Callable, peak: Callable, rounds: int, device: str
) -> list[Row]:
    """Time one size for `rounds` rounds, after three that do not count. All contenders must agree."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, C, generator=generator, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(V, C, generator=generator, device=device) * C**-0.5).requires_grad_()
    targets = torch.randint(V, (tokens,), generator=generator, device=device)
    steps, peaks, expected = {}, {}, None
    for name, loss in losses.items():
        step = step_of(loss, x, weight, targets, device)
        try:
            results = step()
            expected = expected or results
            assert_alike(name, results, next(iter(losses)), expected)
            del results
            peaks[name] = peak(step)
            steps[name] = step
        except torch.OutOfMemoryError:
            if name == OURS:
                raise
    medians = {name: statistics.median(each) for name, each in interleaved(steps, timer, rounds).items()}
    return [Row(tokens, name, medians.get(name), peaks.get(name)) for name in losses]


def peak_gib(step: Callable) -> float:
    """Measure the most GiB allocated while step runs, beyond those allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="*", type=positive, default=[16384, 65536, 524288])
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument("--vocab-size", type=positive, default=50304)
    parser.add_argument("--rounds", type=positive, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.loss needs a GPU and found none: nothing measured")
        return 0
    before, timer, losses = conditions(), EventTimer(), contenders()
    sizes = args.width, args.vocab_size
    rows = [row for n in args.tokens for row in measure(n, *sizes, losses, timer, peak_gib, args.rounds, device="cuda")]
    print(f"{'tokens':>10}  {'':10}{'ms':>14}{'peak GiB':>14}")
    for row in rows:
        print("{:>10}  {:10}{:>14}{:>14}".format(*row.cells()))
    device = torch.cuda.get_device_name()
    content = {"width": args.width, "vocab_size": args.vocab_size, "rows": [asdict(row) for row in rows]}
    path = write_record(args.results / f"loss-{slug(device)}.json", "loss", device, before, **content)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

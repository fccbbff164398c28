"""Choose tile sizes by timing on a GPU: `python -m benchmarks.tune_attention`.

For each dtype, class of head dims and kernel it lists candidates, with and without TMA if the chip has it; refuses
those that need more shared memory than the chip has or whose results break the rule of tests/attention_checks.py; and
times the rest as benchmarks.attention does: in turn, medians, with an empty L2 cache. The winner must also be right
with every feature, with a padded head dim and with lists of tiles. The table goes to a JSON file;
KERNELS_TUNED_TABLE=<file> makes it override the default table, and bits may then differ.
"""

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from benchmarks import positive
from benchmarks.attention import MASKS, RESULTS, EventTimer, Setting, conditions, interleaved, slug, write_record
from kernels import configs, masks
from kernels.attention_arguments import Arguments
from kernels.attention_backward import dkdv_launch, dq_launch, prepare_launch
from kernels.attention_forward import forward_launch
from kernels.configs import Config, Key
from kernels.operators import call_of
from kernels.problem import Launch, Problem
from tests.attention_checks import Case, check

# A candidate must beat the default by more than this share: less is noise.
MARGIN = 0.01
# Queries and keys where results are checked: not a multiple of any tile, but of 16, like the timed lengths, because
# Triton specialises on lengths and head counts divisible by 16.
LENGTH = 304
EVERYTHING = ("segments", "alibi", "softcap", "bias", "dropout", "sinks")
# Queries and keys in a tile. The side that a program keeps gets the large extents.
EXTENTS = {
    "forward": ((64, 128), (32, 64, 128)),
    "dkdv": ((32, 64, 128), (64, 128)),
    "dq": ((64, 128), (32, 64, 128)),
}
SMALL = (16, 32, 64), (16, 32, 64)


@dataclass
class Outcome:
    """The outcome for one key: the winning config, median milliseconds, and why other configs were refused."""

    key: Key
    default: Config
    winner: Config | None = None
    milliseconds: dict[Config, float] = field(default_factory=dict)
    refused: dict[Config, str] = field(default_factory=dict)

    def entry(self) -> dict:
        """Return the entry that configs.read_tuned reads, with the measurements."""
        key = self.key._replace(dtype=str(self.key.dtype).removeprefix("torch."))
        return {
            **key._asdict(),
            **self.winner._asdict(),
            "milliseconds": self.milliseconds[self.winner],
            "default": self.default,
            "default_milliseconds": self.milliseconds.get(self.default),
            "timed": len(self.milliseconds),
            "refused": len(self.refused),
        }


def candidates(key: Key) -> list[Config]:
    """List the configs to try, the default first."""
    extents = SMALL if key.dtype == torch.float32 else EXTENTS[key.kernel]
    # float32 multiplies from registers; whole tiles fetched by TMA would have to stay there, and all of them spilled.
    engines = (False, True) if key.arch in configs.HAS_TMA and key.dtype != torch.float32 else (False,)
    tried = (Config(*each) for each in itertools.product(*extents, (4, 8), (1, 2, 3), engines))
    return list(dict.fromkeys([default_config(key), *tried]))


def default_config(key: Key) -> Config:
    return configs.choose(key.arch, key.dtype, key.head_dim, key.head_dim, key.kernel)


class Bench:
    """One problem, on which a kernel runs with any config."""

    def __init__(self, key: Key, setting: Setting, device: str):
        self.key = key
        generator = torch.Generator(device).manual_seed(0)

        def randn() -> torch.Tensor:
            return torch.randn(setting.shape, generator=generator, device=device, dtype=key.dtype)

        self.call = call_of(Arguments(randn(), randn(), randn(), MASKS[setting.mask]))
        self.dout, self.out = randn(), torch.empty_like(self.call.q)
        self.dq, self.dk, self.dv = (torch.empty_like(x) for x in self.call[:3])
        B, T, H, _ = setting.shape
        lse, self.lse2, self.delta = (torch.empty(B, H, T, device=device) for _ in range(3))
        self.lse = lse
        if key.kernel != "forward":
            problem = Problem(self.call)
            forward_launch(problem, self.out, lse).run()
            prepare_launch(problem, self.out, self.dout, lse, None, self.delta, self.lse2).run()

    def launch(self, config: Config) -> Launch:
        with configs.trying(self.key, config):
            problem = Problem(self.call)
            if self.key.kernel == "forward":
                return forward_launch(problem, self.out, self.lse)
            if self.key.kernel == "dkdv":
                return dkdv_launch(problem, self.dout, self.lse2, self.delta, self.dk, self.dv)
            return dq_launch(problem, self.dout, self.lse2, self.delta, self.dq)


def shared_memory(launch: Launch) -> int:
    """Compile a launch, without running it, and return the bytes of shared memory of a program."""
    return launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options).metadata.shared


def why_not_compiled(bench: Bench, config: Config, shared: Callable[[Launch], int]) -> str | None:
    """Say why a config cannot be launched, or None. With tma it must also fit without: not every tensor suits TMA."""
    for each in dict.fromkeys((config, config._replace(tma=False))):
        try:
            needed = shared(bench.launch(each))
        except (RuntimeError, TritonError) as error:
            return f"does not compile: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        limit = configs.SHARED_MEMORY.get(bench.key.arch, needed)
        if needed > limit:
            return f"needs {needed} bytes of shared memory of {limit}"
    return None


def plain_cases(key: Key) -> list[Case]:
    """List what every candidate must compute correctly: the timed kernel, on a shape with partial tiles."""
    return [Case(LENGTH, LENGTH, H=16, H_kv=16, D=key.head_dim, dtype=key.dtype, layout="contiguous")]


def thorough_cases(key: Key) -> list[Case]:
    """List what the winner must also compute correctly."""
    shape = {"H": 4, "H_kv": 2, "dtype": key.dtype}
    return [
        Case(LENGTH, LENGTH + 37, D=key.head_dim, features=EVERYTHING, layout="contiguous", **shape),
        Case(LENGTH, LENGTH, D=key.head_dim - 16, mask=masks.sliding_window(LENGTH // 3), layout="contiguous", **shape),
        Case(LENGTH, LENGTH, D=key.head_dim - 8, mask=masks.CAUSAL & masks.strided(50), **shape),
    ]


def why_wrong(key: Key, config: Config, cases: Iterable[Case], device: str) -> str | None:
    """Say what a config computes wrongly, or None; all other kernels keep their default configs."""
    for case in cases:
        try:
            with configs.trying(key, config):
                # With many configs on small samples, one would break the unchanged rule by chance.
                check(case, device, slack=2.0)
        except (AssertionError, OutOfResources) as error:
            return f"{case}: {error}"
    return None


def fastest(milliseconds: dict[Config, float], default: Config) -> list[Config]:
    """Sort configs, best first. The default comes before every config that does not beat it by the margin."""
    order = sorted(milliseconds, key=milliseconds.get)
    if default in milliseconds:
        limit = milliseconds[default] * (1 - MARGIN)
        better = [config for config in order if milliseconds[config] < limit]
        order = [*better, default, *(config for config in order if config not in (*better, default))]
    return order


def tune(
    bench: Bench, tried: list[Config], timer: Callable, rounds: int, device: str, shared: Callable = shared_memory
) -> Outcome:
    """Choose the best of `tried` for one key; the first is the default."""
    key, result = bench.key, Outcome(bench.key, tried[0])
    for config in tried:
        reason = why_not_compiled(bench, config, shared) or why_wrong(key, config, plain_cases(key), device)
        if reason is not None:
            result.refused[config] = reason
    calls = {config: bench.launch(config).run for config in tried if config not in result.refused}
    if calls:
        times = interleaved(calls, timer, rounds)
        result.milliseconds = {config: statistics.median(each) for config, each in times.items()}
    for config in fastest(result.milliseconds, result.default):
        reason = why_wrong(key, config, thorough_cases(key), device)
        if reason is None:
            result.winner = config
            break
        result.refused[config] = reason
    return result


def write(outcomes: list[Outcome], device: str, before: dict, path: Path) -> None:
    """Write the table, and check that it can be read."""
    entries = [outcome.entry() for outcome in outcomes if outcome.winner is not None]
    configs.read_tuned(write_record(path, "tune_attention", device, before, entries=entries))


def show(outcome: Outcome) -> None:
    """Print one line for the winner and one for each refusal."""
    key, best = outcome.key, outcome.winner
    name = f"{key.kernel} {str(key.dtype).removeprefix('torch.')} D<={key.head_dim}"
    if best is None:
        print(f"{name}: no candidate was right")
    else:
        new, old = outcome.milliseconds[best], outcome.milliseconds.get(outcome.default)
        print(f"{name}: {tuple(best)} {new:.4f} ms; default {tuple(outcome.default)} {old and round(old, 4)} ms")
    for config, reason in outcome.refused.items():
        print(f"  refused {tuple(config)}: {reason}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128], choices=configs.HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], choices=list(configs.DTYPES))
    parser.add_argument("--kernels", nargs="*", default=list(configs.TUNED_KERNELS), choices=configs.TUNED_KERNELS)
    parser.add_argument("--mask", default="causal", choices=list(MASKS))
    parser.add_argument("--length", type=positive, default=4096)
    parser.add_argument("--rounds", type=positive, default=30)
    parser.add_argument(
        "--write", type=Path, default=None, help="where to write the table (results/tuned-<device>.json)"
    )
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.tune_attention needs a GPU and found none: nothing tuned")
        return 0
    if os.environ.get("KERNELS_TUNED_TABLE"):
        parser.error("unset KERNELS_TUNED_TABLE: configs must be compared with the default table")
    device, arch = torch.cuda.get_device_name(), configs.architecture(torch.device("cuda"))
    before, timer, outcomes = conditions(), EventTimer(), []
    for dtype, head_dim, kernel in itertools.product(args.dtypes, args.head_dims, args.kernels):
        key = Key(arch, configs.DTYPES[dtype], head_dim, kernel)
        bench = Bench(key, Setting(head_dim, args.length, args.mask, kernel), "cuda")
        outcomes.append(tune(bench, candidates(key), timer, args.rounds, "cuda"))
        show(outcomes[-1])
    path = args.write or RESULTS / f"tuned-{slug(device)}.json"
    write(outcomes, device, before, path)
    print(f"written to {path}: KERNELS_TUNED_TABLE={path} uses it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

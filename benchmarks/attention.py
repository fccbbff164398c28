"""Time attention on a GPU: `python -m benchmarks.attention`.

Measures forward and backward TFLOP/s of our kernels, of torch's scaled_dot_product_attention pinned to FlashAttention-2
and to cuDNN, and of FlexAttention, in one process on the same tensors. Every round times each of them once, in a
rotating order, so that drifting clocks affect all alike. Reports medians, and the median of the paired ratios. Writes
results/<device>.json with the clocks, the driver and the versions.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import positive, print_table
from kernels import attention, masks

RESULTS = Path(__file__).parent / "results"
WINDOW = 512
MASKS = {"causal": masks.CAUSAL, "full": masks.FULL, "window": masks.sliding_window(WINDOW)}
OURS, FLASH, CUDNN, FLEX = "ours", "sdpa flash", "sdpa cudnn", "flex"


@dataclass(frozen=True)
class Setting:
    """One line of the table. `tokens`: B * T; `width`: H * D (FlashAttention's own benchmark uses 16k and 2048)."""

    D: int
    T: int
    mask: str
    direction: str
    tokens: int = 16384
    width: int = 2048

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return max(1, self.tokens // self.T), self.T, self.width // self.D, self.D

    def flops(self) -> float:
        """Count the operations of the matrix products as FlashAttention does: a causal mask needs half of T * T.

        Forward has two products of 2 * D operations for each pair of positions, backward five.
        """
        B, T, H, D = self.shape
        pairs = {"full": T * T, "causal": T * T / 2, "window": min(WINDOW, T) * T - min(WINDOW, T) ** 2 / 2}[self.mask]
        return B * H * pairs * 2 * D * (2 if self.direction == "forward" else 5)


@dataclass
class Row:
    """A measurement: medians in milliseconds, TFLOP/s, and our speed relative to each other contender."""

    setting: Setting
    milliseconds: dict[str, float]
    tflops: dict[str, float]
    speedup: dict[str, float]
    missing: dict[str, str]


def sdpa_on(backend: SDPBackend) -> Callable:
    """Pin torch's attention to one back end, for (B, T, H, D) tensors."""

    def call(q, k, v, mask: str):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=mask == "causal")
        return out.transpose(1, 2)

    return call


def flex() -> Callable:
    """Compile FlexAttention; its block mask is made once for each length."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Donated buffers would forbid timing the backward pass of one graph repeatedly.
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(flex_attention, dynamic=False)
    rules = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k < WINDOW),
    }
    block_masks: dict = {}

    def call(q, k, v, mask: str):
        T = q.shape[1]
        if mask != "full" and (mask, T) not in block_masks:
            block_masks[mask, T] = create_block_mask(rules[mask], None, None, T, T, device=q.device)
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_masks.get((mask, T)))
        return out.transpose(1, 2)

    return call


def contenders() -> dict[str, Callable]:
    """List the functions of (q, k, v, name of the mask) to compare. The first is ours."""
    return {
        OURS: lambda q, k, v, mask: attention(q, k, v, mask=MASKS[mask], impl="triton"),
        FLASH: sdpa_on(SDPBackend.FLASH_ATTENTION),
        CUDNN: sdpa_on(SDPBackend.CUDNN_ATTENTION),
        FLEX: flex(),
    }


class EventTimer:
    """Time one call on the GPU in milliseconds, by events, after emptying the L2 cache."""

    def __init__(self):
        self.scratch = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, fn: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def prepare(
    setting: Setting, contenders: dict[str, Callable], device: str
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Return the call to time for each contender, and the reason for each missing one. All must agree."""
    generator = torch.Generator(device).manual_seed(0)

    def randn() -> torch.Tensor:
        return torch.randn(setting.shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = (randn().requires_grad_() for _ in range(3))
    dout = randn()
    calls, missing, expected = {}, {}, None
    for name, contender in contenders.items():
        if setting.mask == "window" and name in (FLASH, CUDNN):
            missing[name] = "no sliding window"
            continue
        try:
            out = contender(q, k, v, setting.mask)
            grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        except RuntimeError as error:
            if name == OURS:
                raise
            missing[name] = str(error).splitlines()[0]
            continue
        results = [out.detach(), *grads]
        if expected is None:
            expected = results
        assert_alike(name, results, OURS, expected)
        if setting.direction == "forward":
            calls[name] = lambda f=contender: f(q.detach(), k.detach(), v.detach(), setting.mask)
        else:
            calls[name] = lambda out=out: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    return calls, missing


def assert_alike(name: str, results: list[torch.Tensor], other: str, expected: list[torch.Tensor]) -> None:
    """Raise AssertionError if a result differs from the expected one by 2% of its norm or more."""
    for result, right in zip(results, expected):
        difference = (result.float() - right.float()).norm() / right.float().norm()
        assert difference < 0.02, f"{name} computes something else than {other}: {difference:.3f} apart"


def interleaved(calls: dict, timer: Callable, rounds: int, warmup: int = 3) -> dict:
    """Time each call once in every round, in a rotating order; the warm-up rounds do not count."""
    times: dict = {name: [] for name in calls}
    names = list(calls)
    for n in range(-warmup, rounds):
        turn = n % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = timer(calls[name])
            if n >= 0:
                times[name].append(elapsed)
    return times


def measure(setting: Setting, contenders: dict[str, Callable], timer: Callable, rounds: int, device: str) -> Row:
    """Time all contenders on one setting."""
    calls, missing = prepare(setting, contenders, device)
    times = interleaved(calls, timer, rounds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    tflops = {name: setting.flops() / median / 1e9 for name, median in medians.items()}
    speedup = {
        name: statistics.median(theirs / ours for ours, theirs in zip(times[OURS], times[name]))
        for name in times
        if name != OURS
    }
    return Row(setting, medians, tflops, speedup, missing)


def conditions() -> dict[str, str]:
    """Read versions, driver, and the GPU's present clocks, power limit and temperature."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu"]
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        values = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError) as error:
        return found | {"nvidia-smi": f"not read: {error}"}
    return found | dict(zip(fields, values))


def slug(device: str) -> str:
    """Turn a device's name into part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_record(path: Path, benchmark: str, device: str, before: dict, **content) -> Path:
    """Write a measurement as JSON, with the conditions before it and now."""
    record = {
        "benchmark": benchmark,
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "conditions_before": before,
        "conditions_after": conditions(),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def show(rows: list[Row], device: str) -> None:
    """Print the table, in TFLOP/s."""
    names, cells = [OURS, FLASH, CUDNN, FLEX], []
    for row in rows:
        s = row.setting
        speeds = [f"{row.tflops[name]:.0f}" if name in row.tflops else "-" for name in names]
        ratios = [f"{row.speedup[name]:.2f}" if name in row.speedup else "-" for name in (FLASH, CUDNN)]
        cells.append((s.direction, s.mask, str(s.D), str(s.T), *speeds, *ratios))
    headings = "", "mask", "D", "T", *names, f"{OURS} / flash", f"{OURS} / cudnn"
    print_table(f"attention, bf16, TFLOP/s on {device}", headings, cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--lengths", nargs="*", type=positive, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--masks", nargs="*", default=["causal", "full", "window"], choices=list(MASKS))
    parser.add_argument("--rounds", type=positive, default=30)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.attention needs a GPU and found none: nothing measured")
        return 0
    device = torch.cuda.get_device_name()
    before, timer, everyone = conditions(), EventTimer(), contenders()
    rows = []
    for D in args.head_dims:
        for mask in args.masks:
            for T in args.lengths:
                for direction in ("forward", "backward"):
                    rows.append(measure(Setting(D, T, mask, direction), everyone, timer, args.rounds, "cuda"))
    show(rows, device)
    for name, reason in sorted({item for row in rows for item in row.missing.items()}):
        print(f"{name}: {reason}")
    content = {"dtype": "bfloat16", "rows": [asdict(row) for row in rows]}
    path = write_record(args.results / f"{slug(device)}.json", "attention", device, before, **content)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sampling, timed: `python -m benchmarks.sample`, on any machine.

Tokens per second of greedy decoding: our decoder in fp32, bf16 and with int8 weights, Hugging Face transformers'
generate on a GPT-2 of the same shape, and our own model without a cache. All weights are random. Every round times each
contender once, in an order that rotates, so that what else the machine does is shared by all; medians are reported, and
the medians of the paired ratios. Without a cache a token's cost grows with its position: it is timed at a few evenly
spread lengths, and their mean stands for all. "weights GB/s" (fp32, bf16, int8) is the bytes of all matrices over a
step's time, which a copy's GB/s, measured before and after, bounds where one row is decoded.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gpt  # isort: skip  # noqa: F401 - before torch, whose threads' waiting it sets
import torch

from benchmarks import positive
from gpt.config import PRESETS, ModelConfig
from gpt.device import pick_device
from gpt.errors import UserError
from gpt.inference.decoder import Decoder
from gpt.model import GPT

FP32, BF16, INT8, HF, UNCACHED = "fp32", "bf16", "int8", "transformers", "uncached"
Run = Callable[[int], list[float]]  # so many new tokens, in seconds: of each step, or of all in one number


@dataclass(frozen=True)
class Setting:
    """One line of the table: a GPT-2 of this shape, `rows` prompts of `prompt` tokens, `new` tokens for each."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    rows: int
    prompt: int
    new: int

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the matrices that a step reads, by our contenders."""
        weights = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return {FP32: 4 * weights, BF16: 2 * weights, INT8: weights}

    def config(self, preset: str = "gpt2") -> ModelConfig:
        shape = {key: getattr(self, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return ModelConfig(**(PRESETS[preset] | shape | {"seq_len": self.prompt + self.new}))


@dataclass
class Row:
    """What was measured: tokens per second (all rows together) by contender, and ours in fp32 over the others."""

    setting: Setting
    tokens_per_second: dict[str, float]
    ratios: dict[str, float]
    milliseconds_per_step: dict[str, float]
    early_and_late_ms: tuple[float, float]  # a step of fp32 in the first and in the last quarter of the text
    weights_gb_per_second: dict[str, float]  # bytes of all matrices over the time of a step
    missing: dict[str, str] = field(default_factory=dict)


def settings(quick: bool, full: bool, device: str = "cpu") -> list[Setting]:
    medium_text = (256, 256) if full else (64, 32)
    small = ("6 x 384", 6, 6, 384, 65)
    medium = ("GPT-2 124M", 12, 12, 768, 50257)
    if quick:
        return [Setting(*small, rows, 16, 32) for rows in (1, 8)]
    large = [Setting("GPT 1B", 16, 16, 2048, 50257, 1, 256, 256)] if device == "cuda" else []
    models = ((small, (16, 240)), (medium, medium_text))
    return [Setting(*model, rows, *text) for model, text in models for rows in (1, 8)] + large


def steps_of(decoder: Decoder, prompts: torch.Tensor, new: int) -> list[float]:
    """Seconds of each of `new` steps of greedy decoding: the first is the prompts'."""
    seconds, device, tokens = [], decoder.device.type, prompts[:, -1:]
    for step in range(new):
        start = time.perf_counter()
        if step == 0:
            logits = torch.stack([decoder.prefill(row, prompt) for row, prompt in enumerate(prompts.tolist())])
        else:
            logits = decoder.step(tokens)[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(model: GPT, setting: Setting, prompts: torch.Tensor, **options) -> Run:
    """A run of our decoder, as the seconds of its steps. Its weights are prepared once, as for many texts."""
    decoder = Decoder(model, setting.rows, setting.prompt + setting.new, **options)

    def run(new: int) -> list[float]:
        for row in range(setting.rows):
            decoder.truncate(row, 0)
        return steps_of(decoder, prompts, new)

    return run


def transformers_of(setting: Setting, prompts: torch.Tensor) -> Run:
    """A run of transformers' generate on a GPT-2 with weights of its own, as one number of seconds."""
    from transformers import GPT2Config, GPT2LMHeadModel

    length = setting.prompt + setting.new
    shape = {"n_layer": setting.n_layer, "n_head": setting.n_head, "n_embd": setting.n_embd, "n_positions": length}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=setting.vocab_size, bos_token_id=0, eos_token_id=None, **shape))
    model = model.float().eval().to(prompts.device)

    def run(new: int) -> list[float]:
        options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False, "use_cache": True}
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, eos_token_id=None, **options
            )
        if prompts.is_cuda:
            torch.cuda.synchronize()
        assert made.shape[1] == setting.prompt + new, f"transformers stopped at {made.shape[1]} tokens"
        return [time.perf_counter() - start]

    return run


def without_cache(model: GPT, setting: Setting, prompts: torch.Tensor, samples: int) -> Run:
    """All new tokens' time when each reads everything before it again, from `samples` lengths spread over the text."""
    text = prompts.repeat(1, -(-(setting.prompt + setting.new) // setting.prompt))

    def run(new: int) -> list[float]:
        lengths = [setting.prompt + round((i + 0.5) * new / samples) for i in range(samples)]
        start = time.perf_counter()
        with torch.inference_mode():
            for length in lengths:
                model.head(model.hidden(text[:, :length])[:, -1]).argmax(-1)
        if text.is_cuda:
            torch.cuda.synchronize()
        return [(time.perf_counter() - start) / samples * new]

    return run


def prepare(setting: Setting, device: str, samples: int) -> tuple[dict[str, Run], dict[str, str]]:
    """What to time, by contender, and why what is missing is missing."""
    torch.manual_seed(0)
    model = GPT(setting.config()).to(device).eval()
    prompts = torch.randint(setting.vocab_size, (setting.rows, setting.prompt), device=device)
    runs, missing = (
        {
            FP32: ours(model, setting, prompts),
            BF16: ours(model, setting, prompts, dtype=torch.bfloat16),
            INT8: ours(model, setting, prompts, quantize="int8"),
        },
        {},
    )
    try:
        runs[HF] = transformers_of(setting, prompts)
    except ImportError as error:
        missing[HF] = str(error)
    runs[UNCACHED] = without_cache(model, setting, prompts, samples)
    return runs, missing


def measure(setting: Setting, rounds: int, device: str, samples: int) -> Row:
    """Time one setting: `rounds` rounds, after a shorter one that does not count."""
    runs, missing = prepare(setting, device, samples)
    names = list(runs)
    for name in names:
        runs[name](min(4, setting.new))
    times: dict[str, list[float]] = {name: [] for name in names}
    steps: list[list[float]] = []
    for n in range(rounds):
        turn = n % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = runs[name](setting.new)
            times[name].append(sum(seconds))
            if name == FP32:
                steps.append(seconds[1:])
    medians = {name: statistics.median(each) for name, each in times.items()}
    quarter = max(1, len(steps[0]) // 4)
    early = statistics.median(t for each in steps for t in each[:quarter])
    late = statistics.median(t for each in steps for t in each[-quarter:])
    step_ms = {name: 1000 * seconds / setting.new for name, seconds in medians.items()}
    made = setting.rows * setting.new
    return Row(
        setting,
        {name: made / seconds for name, seconds in medians.items()},
        {
            f"{name} / {other}": statistics.median(b / a for a, b in zip(times[name], times[other]))
            for name in (FP32, BF16, INT8)
            for other in (HF, UNCACHED)
            if other in times
        },
        step_ms,
        (1000 * early, 1000 * late),
        {name: size / step_ms[name] / 1e6 for name, size in setting.weight_bytes().items()},
        missing,
    )


def copy_bandwidth(device: str) -> float:
    """GB/s, read and written, of copying 512 MB: what the weights' GB/s may be held against."""
    source = torch.ones(1 << 27, device=device)
    target, seconds = torch.zeros_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def conditions(device: str) -> dict[str, object]:
    """Where it was measured, and how busy the machine was: a load above 1 before the run is somebody else's."""
    found: dict[str, object] = {"torch": torch.__version__, "device": device, "machine": platform.machine()}
    found |= {"threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    found["copy_gb_per_second"] = copy_bandwidth(device)
    found["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def show(rows: list[Row]) -> None:
    """The table: tokens per second, and how many times as fast as the others ours is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="greedy decoding, tokens/s")
    names = [FP32, BF16, INT8, HF, UNCACHED]
    ratios = [f"{name} / {HF}" for name in (FP32, BF16, INT8)] + [f"{FP32} / {UNCACHED}"]
    for heading in ("model", "rows", "prompt + new", *names, *ratios, "ms early, late", "weights GB/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        s = row.setting
        speeds = [f"{row.tokens_per_second[name]:.1f}" if name in row.tokens_per_second else "-" for name in names]
        times = [f"{row.ratios[name]:.2f}" if name in row.ratios else "-" for name in ratios]
        ends = "{:.2f}, {:.2f}".format(*row.early_and_late_ms)
        read = ", ".join(f"{row.weights_gb_per_second[name]:.0f}" for name in (FP32, BF16, INT8))
        table.add_row(s.name, str(s.rows), f"{s.prompt} + {s.new}", *speeds, *times, ends, read)
    Console(width=None if sys.stdout.isatty() else 190).print(table)
    for name, reason in {item for row in rows for item in row.missing.items()}:
        print(f"{name}: {reason}")


def write(path: Path, rows: list[Row], before: dict, device: str) -> None:
    """What has been measured so far, as JSON."""
    record = {"benchmark": "sample", "before": before, "after": conditions(device)}
    path.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n", "utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model and short texts alone: seconds")
    parser.add_argument("--full", action="store_true", help="GPT-2 on texts of 256 + 256 tokens: many minutes on a CPU")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--only", help="only models whose name contains this")
    parser.add_argument("--rows", type=positive, nargs="*", help="only these batch sizes")
    parser.add_argument("--new", type=positive, help="new tokens of each text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    args = parser.parse_args(argv)
    if args.quick and args.full:
        parser.error("--quick and --full contradict each other: give one")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"there is no folder {args.json.parent} to write --json to")
    try:
        pick_device(args.device)
    except UserError as error:
        parser.error(str(error))
    known = settings(args.quick, args.full, args.device)
    chosen = [s for s in known if (args.only or "") in s.name and (not args.rows or s.rows in args.rows)]
    if not chosen:
        names = ", ".join(f"{s.name} with {s.rows} rows" for s in known)
        parser.error(f"--only and --rows leave nothing to measure: there are {names}")
    before, rows = conditions(args.device), []
    for setting in chosen:
        setting = Setting(**(asdict(setting) | ({"new": args.new} if args.new else {})))
        rows.append(measure(setting, args.rounds, args.device, 1 if args.quick else 4))
        if args.json:
            write(args.json, rows, before, args.device)
        print(f"{setting.name}, {setting.rows} rows: done", file=sys.stderr)
    show(rows)
    print("before: {}, after: load {}".format(before, conditions(args.device)["load"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

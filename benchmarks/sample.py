"""Time sampling on any machine: `python -m benchmarks.sample`.

Measures tokens per second of greedy decoding: our decoder in fp32, bf16 and with int8 weights, Hugging Face
transformers' generate on a GPT-2 of the same shape, and our own model without a cache. All weights are random. Every
round times each contender once, in a rotating order, so that other work on the machine affects all alike. Reports
medians, and medians of the paired ratios. Without a cache a token's cost grows with its position, so a few evenly
spread lengths are timed and averaged. "weights GB/s" (fp32, bf16, int8) is the bytes of all matrices over the time of a
step; for one row, a copy's GB/s, measured before and after, is its upper bound.
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

import gpt  # isort: skip  # noqa: F401 - before torch: sets how its threads wait
import torch

from benchmarks import positive, print_table
from benchmarks.attention import interleaved
from gpt.config import PRESETS, ModelConfig
from gpt.device import pick_device
from gpt.errors import UserError
from gpt.inference.decoder import Decoder
from gpt.model import GPT

FP32, BF16, INT8, HF, UNCACHED = "fp32", "bf16", "int8", "transformers", "uncached"
Run = Callable[[int], list[float]]  # number of new tokens -> seconds of each step, or of all steps in one number


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
        """Count the bytes of the matrices that a step of each of our contenders reads."""
        weights = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return {FP32: 4 * weights, BF16: 2 * weights, INT8: weights}

    def config(self, preset: str = "gpt2") -> ModelConfig:
        shape = {key: getattr(self, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        return ModelConfig(**(PRESETS[preset] | shape | {"seq_len": self.prompt + self.new}))


@dataclass
class Row:
    """A measurement: tokens per second (all rows together) by contender, and the ratios of ours to the others."""

    setting: Setting
    tokens_per_second: dict[str, float]
    ratios: dict[str, float]
    milliseconds_per_step: dict[str, float]
    early_and_late_ms: tuple[float, float]  # an fp32 step in the first and in the last quarter of the text
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
    """Time each of `new` steps of greedy decoding; the first step reads the prompts."""
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
    """Return a run of our decoder, which gives the seconds of its steps. Its weights are prepared once for all runs."""
    decoder = Decoder(model, setting.rows, setting.prompt + setting.new, **options)

    def run(new: int) -> list[float]:
        for row in range(setting.rows):
            decoder.truncate(row, 0)
        return steps_of(decoder, prompts, new)

    return run


def transformers_of(setting: Setting, prompts: torch.Tensor) -> Run:
    """Return a run of transformers' generate on a GPT-2 with its own random weights, which gives its total seconds."""
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
    """Return a run that reads the whole text again for each token, estimated from `samples` evenly spread lengths."""
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
    """Return each contender's run, and the reason for each missing contender."""
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
    """Time one setting for `rounds` rounds, after a shorter one that does not count."""
    runs, missing = prepare(setting, device, samples)
    for run in runs.values():
        run(min(4, setting.new))
    seconds = interleaved(runs, lambda run: run(setting.new), rounds, warmup=0)
    times = {name: list(map(sum, each)) for name, each in seconds.items()}
    steps = [each[1:] for each in seconds[FP32]]
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
    """Measure the GB/s, read and written, of copying 512 MB, to compare with the weights' GB/s."""
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
    """Describe the machine and its load: a load above 1 before the run comes from other programs."""
    found: dict[str, object] = {"torch": torch.__version__, "device": device, "machine": platform.machine()}
    found |= {"threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    found["copy_gb_per_second"] = copy_bandwidth(device)
    found["load"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def show(rows: list[Row]) -> None:
    """Print the table: tokens per second, and our speed relative to the others."""
    names = [FP32, BF16, INT8, HF, UNCACHED]
    ratios = [f"{name} / {HF}" for name in (FP32, BF16, INT8)] + [f"{FP32} / {UNCACHED}"]
    headings, cells = ("model", "rows", "prompt + new", *names, *ratios, "ms early, late", "weights GB/s"), []
    for row in rows:
        s = row.setting
        speeds = [f"{row.tokens_per_second[name]:.1f}" if name in row.tokens_per_second else "-" for name in names]
        times = [f"{row.ratios[name]:.2f}" if name in row.ratios else "-" for name in ratios]
        ends = "{:.2f}, {:.2f}".format(*row.early_and_late_ms)
        read = ", ".join(f"{row.weights_gb_per_second[name]:.0f}" for name in (FP32, BF16, INT8))
        cells.append((s.name, str(s.rows), f"{s.prompt} + {s.new}", *speeds, *times, ends, read))
    print_table("greedy decoding, tokens/s", headings, cells, width=None if sys.stdout.isatty() else 190)
    for name, reason in {item for row in rows for item in row.missing.items()}:
        print(f"{name}: {reason}")


def write(path: Path, rows: list[Row], before: dict, device: str) -> None:
    """Write the measurements so far as JSON."""
    record = {"benchmark": "sample", "before": before, "after": conditions(device)}
    path.write_text(json.dumps(record | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n", "utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the small model and short texts: seconds")
    parser.add_argument("--full", action="store_true", help="GPT-2 on texts of 256 + 256 tokens: many minutes on a CPU")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--only", help="only models with this in their name")
    parser.add_argument("--rows", type=positive, nargs="*", help="only these batch sizes")
    parser.add_argument("--new", type=positive, help="new tokens of each text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    args = parser.parse_args(argv)
    if args.quick and args.full:
        parser.error("--quick and --full contradict each other: give one")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: the folder {args.json.parent} does not exist: create it")
    try:
        pick_device(args.device)
    except UserError as error:
        parser.error(str(error))
    known = settings(args.quick, args.full, args.device)
    chosen = [s for s in known if (args.only or "") in s.name and (not args.rows or s.rows in args.rows)]
    if not chosen:
        names = ", ".join(f"{s.name} with {s.rows} rows" for s in known)
        parser.error(f"--only and --rows leave nothing to measure: choose among {names}")
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

"""Measure the loader: the cost of a batch, and its share of a training step.

    python -m benchmarks.loader [--device cpu|cuda] [--rows 12] [--steps 3] [--tokens 50_000_000]

The loader reads rows of 1,024 tokens, under each packing, from a file of random tokens in documents of 1 to about
10,000 tokens (log-normal, 700 on average). The training step is that of GPT-2's 124M shape with AdamW: forward,
backward, update. On a CPU the loader works between the steps, on a GPU in a thread beside them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gpt.data.loader import Batches
from gpt.data.packing import make_loader
from gpt.device import autocast
from gpt.model import GPT
from gpt.training.command import load_config
from gpt.training.optim import build_optimizers

ROOT = Path(__file__).parents[1]
V, T = 50257, 1024
DOCUMENT = V - 1


def write_tokens(path: Path, count: int) -> tuple[np.ndarray, float]:
    """Write random documents to a file; return it memory-mapped, and its tokens per document."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, DOCUMENT, count).astype(np.uint16)
    lengths = rng.lognormal(6.0, 1.05, count // 500).astype(np.int64).clip(1, 20_000) + 1
    starts = lengths.cumsum()
    starts = starts[starts < count]
    tokens[starts] = DOCUMENT
    tokens[0] = DOCUMENT
    tokens.tofile(path)
    return np.memmap(path, np.uint16, "r").view(np.ndarray), count / (len(starts) + 1)


def loader_seconds(tokens: np.ndarray, packing: str, rows: int) -> dict[str, float]:
    """Time opening the loader and, over many batches, one batch; count the share of positions without a target."""
    began = time.perf_counter()
    loader = make_loader(tokens, packing, DOCUMENT, batch_size=rows, seq_len=T, seed=0)
    opened, batches, free = time.perf_counter() - began, 0, 0
    began = time.perf_counter()
    while time.perf_counter() - began < 3:
        y = loader.next_batch()[1]
        batches += 1
        free += int(y.lt(0).sum())
    return {
        "open": opened,
        "batch": (time.perf_counter() - began) / batches,
        "free": free / (batches * rows * T),
    }


def step_seconds(tokens: np.ndarray, rows: int, steps: int, device: torch.device) -> tuple[float, float]:
    """Time training steps at 124M: medians of a whole step, and of reading its batch in the loop."""
    config = load_config([str(ROOT / "configs/gpt2_124m.toml"), "--vocab-size", str(V)])
    model = GPT(config.model).to(device)
    optimizers = build_optimizers(model, config.optim)
    batches = Batches(make_loader(tokens, "stream", DOCUMENT, batch_size=rows, seq_len=T, seed=0), device)
    dtype, taken, read = "bfloat16" if device.type == "cuda" else "float32", [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        x, y = batches.next_batch()
        read.append(time.perf_counter() - began)
        with autocast(device, dtype):
            loss = model.loss(x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()
        taken.append(time.perf_counter() - began)
    batches.close()
    return statistics.median(taken[1:]), statistics.median(read[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="0 measures the loader alone")
    parser.add_argument("--tokens", type=int, default=50_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens, mean = write_tokens(Path(folder) / "tokens", arguments.tokens)
        print(f"batches of {arguments.rows} x {T} from {len(tokens):,} tokens in documents of {mean:.0f} on average")
        measured = {name: loader_seconds(tokens, name, arguments.rows) for name in ("stream", "documents", "best_fit")}
        step = None
        if arguments.steps:
            step, read = step_seconds(tokens, arguments.rows, arguments.steps, torch.device(arguments.device))
            rate = arguments.rows * T / step
            print(f"a training step of 124M on {arguments.device}: {step:.3f} s, {rate:,.0f} tokens/s; ", end="")
            print(f"its batch {1e6 * read:.0f} us in the loop")
        for name, seconds in measured.items():
            share = "" if step is None else f"{seconds['batch'] / step:.5%} of the step, "
            print(
                f"{name:10} {1e6 * seconds['batch']:7.0f} us a batch, {arguments.rows * T / seconds['batch']:,.0f} "
                f"tokens/s, {share}opened in {seconds['open']:.2f} s, {seconds['free']:.2%} of the positions free"
            )


if __name__ == "__main__":
    main()

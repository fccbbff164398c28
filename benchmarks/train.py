"""Time training to a loss: our recipe beside a plain GPT-2, as whole commands, one after the other.

    python -m benchmarks.train --device cpu --corpus tinyshakespeare.txt --seeds 1 2 3

"ours" is `train.py configs/shakespeare_char_cpu.toml` with an empty cache. The peer is transformers' GPT2LMHeadModel
with the shape and schedule of nanoGPT's CPU recipe (4 layers, 128 wide, context 64, batches of 12, 2,000 steps of
AdamW), in a plain loop. Both learn from the first 90% of the characters and are measured on all of the last 10%, in
windows of 64, in float32. Seconds are the wall time of the whole process, imports and evaluation included. Unknown
flags are passed to train.py.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import positive

ROOT = Path(__file__).parents[1]
T, PEER_BATCH, PEER_STEPS = 64, 12, 2000


def peer_learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: warm-up over 100 steps to 1e-3, then a cosine to 1e-4."""
    if step < 100:
        return 1e-3 * (step + 1) / 101
    share = (step - 100) / max(1, steps - 100)
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * min(1.0, share))) * 9e-4


def train_peer(corpus: Path, seed: int, device: str, steps: int) -> dict:
    """Train GPT2LMHeadModel and measure its loss over the whole held-out tail."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    text = corpus.read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[c] for c in text])
    train, val = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    config = GPT2Config(
        vocab_size=len(ids), n_positions=T, n_embd=128, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peer_learning_rate(step, steps)
        starts = torch.randint(len(train) - T, (PEER_BATCH,)).tolist()
        x = torch.stack([train[i : i + T] for i in starts]).to(device)
        y = torch.stack([train[i + 1 : i + 1 + T] for i in starts]).to(device)
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    float(loss)
    rate = steps * PEER_BATCH * T / (time.perf_counter() - began)
    return {"val_loss": peer_loss(model.eval(), val, device), "tokens_per_second": rate}


@torch.no_grad()
def peer_loss(model, val: torch.Tensor, device: str) -> float:
    """Measure nats per token over windows of T that tile the tail: each token but the first is a target once."""
    nats, targets = 0.0, len(val) - 1
    for start in range(0, targets, 128 * T):
        end = min(start + 128 * T, targets)
        whole = start + (end - start) // T * T
        for a, b, rows in ((start, whole, (whole - start) // T), (whole, end, 1)):
            if b > a:
                x, y = val[a:b].view(rows, -1).to(device), val[a + 1 : b + 1].view(rows, -1).to(device)
                logits = model(x).logits.flatten(0, 1).float()
                nats += float(torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="sum"))
    return nats / targets


def run(command: list[str]) -> tuple[float, str]:
    """Run a command; return its wall seconds and output. A failing command ends the benchmark."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, done.stdout


def run_ours(config: Path, corpus: Path, seed: int, device: str, options: list[str]) -> dict:
    """Run one whole training command with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "train.py", str(config), "--corpus", str(corpus), "--seed", str(seed)]
        command += ["--device", device, "--run-dir", str(run_dir), "--cache-dir", str(Path(folder, "cache")), *options]
        seconds, _ = run(command)
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    final = [r["val_loss"] for r in records if "val_loss" in r][-1]
    return {"seconds": seconds, "val_loss": final, "tokens_per_second": statistics.median(rates)}


def run_peer(corpus: Path, seed: int, device: str, steps: int) -> dict:
    """Run the peer in its own process."""
    command = [sys.executable, "-m", "benchmarks.train", "--peer", "--corpus", str(corpus), "--seeds", str(seed)]
    seconds, output = run([*command, "--device", device, "--peer-steps", str(steps)])
    return {"seconds": seconds, **json.loads(output.splitlines()[-1])}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="one text file, such as tiny Shakespeare")
    parser.add_argument("--config", type=Path, default=Path("configs/shakespeare_char_cpu.toml"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--peer-steps", type=positive, default=PEER_STEPS)
    parser.add_argument("--peer-runs", type=int, default=1, help="number of seeds that the peer trains with too")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--peer", action="store_true", help="train only the peer, in this process")
    args, options = parser.parse_known_args(arguments)
    if not args.corpus.is_file():
        parser.error(f"{args.corpus} is not a file: give the text with --corpus")
    if args.peer and options:
        parser.error(f"--peer does not accept train.py's flags: leave out {options[0]}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: the folder {args.json.parent} does not exist: create it")
    if args.peer:
        print(json.dumps(train_peer(args.corpus, args.seeds[0], args.device, args.peer_steps)))
        return
    ours, peers = [], []
    form = "{:>6} {:>12} {:>9} {:>10} {:>12}"
    print(form.format("seed", "what", "seconds", "val loss", "tokens/s"))
    corpus = args.corpus.resolve()
    for number, seed in enumerate(args.seeds):
        found = {"ours": run_ours(args.config, corpus, seed, args.device, options)}
        ours.append(found["ours"])
        if number < args.peer_runs:
            found["GPT-2"] = run_peer(corpus, seed, args.device, args.peer_steps)
            peers.append(found["GPT-2"])
        for what, r in found.items():
            row = f"{r['seconds']:.1f}", f"{r['val_loss']:.4f}", f"{r['tokens_per_second']:,.0f}"
            print(form.format(seed, what, *row), flush=True)
    median = {
        what: statistics.median(r["seconds"] for r in runs) for what, runs in (("ours", ours), ("peer", peers)) if runs
    }
    worst = max(r["val_loss"] for r in ours)
    print(f"median seconds, ours: {median['ours']:.1f}; worst loss of {len(ours)} seeds: {worst:.4f}")
    if peers:
        best = min(r["val_loss"] for r in peers)
        print(f"GPT-2 took {median['peer'] / median['ours']:.1f} x as long, to a loss of {best:.4f}")
    if args.json is not None:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": args.device}
        args.json.write_text(json.dumps({"about": about, "ours": ours, "peer": peers}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compare random calls of attention with the reference: `python -m tests.fuzz_attention --cases N --seed S`.

Draws shapes, strides, tile sizes, masks and features; runs forward and backward in the kernels and, every third case,
in the chunked path. Prints each failing case as a line that repeats it, and exits with 1 if any case failed.
"""

import argparse
import os
import random
import sys
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from kernels import attention_chunked, configs, masks
from tests.attention_checks import Case, check

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 48, 63, 64, 65, 90, 127, 129]
FEATURES = ("softcap", "alibi", "bias", "sinks", "segments", "dropout")


def random_mask(rng: random.Random, B: int, depth: int, device: str) -> masks.Mask:
    """Draw a built-in mask, or a combination of two by `&` or `|`."""
    if depth > 0 and rng.random() < 0.7:
        left, right = (random_mask(rng, B, depth - 1, device) for _ in range(2))
        return left & right if rng.random() < 0.5 else left | right
    leaf = rng.randrange(9)
    if leaf == 0:
        return masks.FULL
    if leaf == 1:
        return masks.sliding_window(rng.randint(1, 80))
    if leaf == 2:
        return masks.sink_tokens(rng.randint(0, 20))
    if leaf == 3:
        return masks.prefix(torch.tensor([rng.randint(0, 130) for _ in range(B)], dtype=torch.int32, device=device))
    if leaf == 4:
        return masks.global_tokens(rng.sample(range(130), rng.randint(0, 9)))
    if leaf == 5:
        return masks.strided(rng.choice([1, 2, 7, 50]))
    if leaf == 6:
        return masks.bigbird(rng.randint(1, 30), rng.randint(0, 4), rng.randint(0, 3), rng.randint(0, 99), 16)
    if leaf == 7:
        layout = torch.tensor([[rng.random() < 0.5 for _ in range(6)] for _ in range(6)])
        return masks.block_sparse(layout, rng.choice([16, 23]))
    return masks.CAUSAL


def random_case(rng: random.Random, device: str) -> Case:
    B, H_kv = rng.randint(1, 2), rng.randint(1, 2)
    Tq = rng.choice(LENGTHS)
    depth = rng.choice([0, 0, 1, 2])
    return Case(
        Tq,
        Tq if rng.random() < 0.5 else rng.choice(LENGTHS),
        B=B,
        H=H_kv * rng.randint(1, 3),
        H_kv=H_kv,
        D=rng.choice([8, 16, 24, 40, 64]),
        Dv=rng.choice([None, 8, 20, 72]),
        dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        mask=random_mask(rng, B, depth, device),
        features=tuple(name for name in FEATURES if rng.random() < 0.3),
        layout=rng.choice(["poisoned", "contiguous", "heads first", "strided"]),
        gain=rng.choice([1.0, 1.0, 1e-4, 3.0]),
        scale=rng.choice([None, None, 0.3, -0.5]),
        seed=rng.randrange(2**20),
        bias_axes="".join(axis for axis in "bhqk" if rng.random() < 0.5),
    )


def run_case(seed: int, number: int, device: str) -> str | None:
    """Run one case, which depends on (seed, number) alone; return its failure or None."""
    rng = random.Random(f"{seed} {number}")
    case = random_case(rng, device)
    tile = configs.Config(rng.choice([16, 32, 64]), rng.choice([16, 32, 64]), 4, 1)
    try:
        if number % 3 == 2:
            with mock.patch.multiple(attention_chunked, SCORES=2 ** rng.randint(8, 20), TILE=rng.choice([16, 64])):
                check(case, device, slack=2.0, impl="chunked")
        else:
            with mock.patch.object(configs, "INTERPRETER", tile):
                check(case, device, slack=2.0)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}  [{case} {case.mask} {tile[:2]}]"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="run only the case with this number")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    failed = 0
    for number in range(args.cases) if args.only is None else [args.only]:
        fault = run_case(args.seed, number, device)
        if fault is not None:
            failed += 1
            print(f"python -m tests.fuzz_attention --seed {args.seed} --only {number}  # {fault}", flush=True)
    print(f"{failed} of {args.cases if args.only is None else 1} cases failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

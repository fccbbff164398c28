"""Kill a training at random moments, resume it each time, and compare the result with an uninterrupted run.

python -m tests.crash --kills 100 [--seed 0]

Half of the kills come after a random time, the others before a random file operation in the run directory, which
reaches every step of a save. A process that has imported everything forks one child per start.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forking is safe only before torch starts threads

import matplotlib.pyplot  # noqa: F401 - a training imports it late; import it before forking
import rich.progress  # noqa: F401
import safetensors.torch  # noqa: F401

import train
from gpt.run.checkpoint import list_checkpoints, verify
from gpt.run.layout import REQUIRED, STATE, WEIGHTS
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from gpt.training.state import read_state

STEPS = 30
TEXT = "".join(f"{a} and {b} went up the hill, said {c}.\n" for a in "JKLM" for b in "abcdef" for c in "xyz")
FLAGS = (
    "--corpus text.txt --cache-dir cache --device cpu --dtype float32 --n-layer 1 --n-head 2 --n-embd 16 --seq-len 16 "
    "--batch-size 8 --dropout 0.1 --eval-interval 3 --checkpoint-interval 1 --warmup-steps 2 --log-interval 1 "
    "--sample-tokens 0"
)
FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def child(run_dir: str, kill_at: int | None) -> int:
    """Fork a training that resumes run_dir; return its process id. kill_at: SIGKILL before that file operation."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(f"{run_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        if kill_at is not None:
            kill_before(kill_at, run_dir)
        status = train.main(load_config(f"{FLAGS} --run-dir {run_dir} --max-steps {STEPS} --resume".split()))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def kill_before(number: int, run_dir: str) -> None:
    """Kill this process before its number-th operation on a file in run_dir, in any thread."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in FILE_OPERATIONS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            left -= run_dir in Path(os.fsdecode(arguments[0])).parts
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def ended(pid: int, run_dir: str) -> bool:
    """Wait for a child: True if it finished, False if it was killed. AssertionError with its log otherwise."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"status {status}\n{Path(f'{run_dir}.log').read_text()[-4000:]}"
    return status == 0


def outcome(run_dir: str) -> tuple[list[dict], dict[str, object]]:
    """Read everything that must be bit-identical: metrics and checkpoint files, without clock times."""
    clock = ("seconds", "tokens_per_second", "mfu")
    metrics = [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(Path(run_dir, "metrics.jsonl"))]
    files: dict[str, object] = {}
    for checkpoint in list_checkpoints(Path(run_dir, "checkpoints")):
        assert verify(checkpoint) is None, verify(checkpoint)
        files |= {f"{checkpoint.name}/{name}": (checkpoint / name).read_bytes() for name in REQUIRED}
        state = read_state(checkpoint)
        del state["metrics_bytes"]  # clock times vary in length
        files[f"{checkpoint.name}/{STATE}"] = state
    assert f"step_{STEPS:08d}/{WEIGHTS}" in files
    return metrics, files


def crash(kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` times and count. AssertionError if a start fails or a finished run differs."""
    draw = random.Random(seed)
    counts = {"kills": 0, "kills within a save": 0, "runs compared": 0}
    began = time.monotonic()
    assert ended(child("whole", None), "whole")
    seconds = time.monotonic() - began
    expected = outcome("whole")
    run_dir = ""
    while counts["kills"] < kills or run_dir:
        if not run_dir:
            run_dir = f"run{counts['runs compared']}"
        if counts["kills"] == kills:
            pid = child(run_dir, None)
        elif draw.random() < 0.5:
            pid = child(run_dir, draw.randrange(80))  # a start has about 20, a save 30
        else:
            pid = child(run_dir, None)
            time.sleep(draw.random() * seconds / 4)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if ended(pid, run_dir):
            assert outcome(run_dir) == expected, f"{run_dir} differs from the uninterrupted run"
            counts["runs compared"] += 1
            shutil.rmtree(run_dir)
            run_dir = ""
        else:
            counts["kills"] += 1
            counts["kills within a save"] += any(Path(run_dir).glob("checkpoints/.*.tmp"))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("text.txt").write_text(TEXT)
        counts = crash(arguments.kills, arguments.seed)
    kills, runs = counts["kills"], counts["runs compared"]
    print(
        f"seed {arguments.seed}: {kills} of {kills} kills resumed, {counts['kills within a save']} within a save; "
        f"{runs} run{'s' * (runs != 1)} ended bit for bit like the uninterrupted one"
    )


if __name__ == "__main__":
    main()

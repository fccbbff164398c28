"""Run the numeric tests as if on other processors: `python -m tests.numerics [--only Haswell] [--workers 2]`.

Each setting makes a library add in another order: numpy's OpenBLAS, which Triton's interpreter uses for products, with
the kernels of another processor; torch's vectorised loops with another instruction set; both with another thread count.
tests/conftest.py marks the numeric tests. Unknown arguments go to pytest. Prints a table, and exits with 1 if a test
failed under any setting.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CORES = ("Haswell", "SkylakeX", "Zen", "Prescott")
SETTINGS = {
    "default": {},
    **{f"OPENBLAS_CORETYPE={core}": {"OPENBLAS_CORETYPE": core} for core in CORES},
    **{f"ATEN_CPU_CAPABILITY={name}": {"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2")},
    **{f"{n} threads": {"OMP_NUM_THREADS": str(n)} for n in (1, 2, 4)},
}
# Removed from the caller's environment.
UNSET = ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


class Result(NamedTuple):
    passed: int
    failed: list[str]
    status: int
    seconds: float


def environment(changes: dict[str, str], workers: int) -> dict[str, str]:
    """Return the caller's environment with one setting; parallel workers have one thread each."""
    own = {name: value for name, value in os.environ.items() if name not in UNSET}
    return own | ({"OMP_NUM_THREADS": "1"} if workers > 1 else {}) | changes


def run(name: str, workers: int, arguments: list[str]) -> Result:
    """Run the numeric tests under one setting; their output goes to build/numerics."""
    changes = SETTINGS[name]
    workers = 1 if "OMP_NUM_THREADS" in changes else workers
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric and not slow", *arguments]
    command += ["-n", str(workers)] if workers > 1 else []
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(changes, workers),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = ROOT / "build" / "numerics" / f"{re.sub(r'[^A-Za-z0-9]+', '_', name)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout)
    return read(done.stdout, done.returncode, time.monotonic() - start)


def read(output: str, status: int, seconds: float) -> Result:
    """Parse pytest's output."""
    passed = re.search(r"(\d+) passed", output)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    return Result(int(passed[1]) if passed else 0, failed, status, seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only settings with this in their name")
    parser.add_argument(
        "--workers", type=int, default=1, help="parallel processes, unless the setting is a thread count"
    )
    options, rest = parser.parse_known_args(arguments)
    print("| setting | passed | failed | seconds |\n| --- | --- | --- | --- |", flush=True)
    results = {}
    for name in SETTINGS:
        if options.only in name:
            results[name] = found = run(name, options.workers, rest)
            print(f"| {name} | {found.passed} | {len(found.failed)} | {found.seconds:.0f} |", flush=True)
    for name, found in results.items():
        for test in found.failed:
            print(f"{name}: {test}")
        if found.status and not found.failed:
            print(f"{name}: pytest ended with status {found.status}; see build/numerics")
    return int(not results or any(found.status for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())

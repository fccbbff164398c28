"""Every default configuration compiles ahead of time for every target, within its limits; no GPU is needed.

The compiler runs in its own process, without TRITON_INTERPRET, which Triton reads when a kernel is defined.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import triton

from kernels import configs

TARGETS = sorted(configs.SHARED_MEMORY)
KERNELS = ("forward", "dkdv", "dq")
# One tile too large: what it spills shows that the test can see a spill.
TOO_LARGE = {"target": "sm_90", "kernel": "dkdv", "dtype": "bf16", "D": 128, "config": [128, 128, 4, 2]}
# Bytes that one version of Triton spills, where no tile avoids it in all versions: a forward tile fetched by TMA, which
# no default uses, and the loss with every term.
SPILLED = {"3.6": {("sm_120", "forward", 80): 92}, "3.9": {("sm_100", "loss", 50257): 20}}


def cases() -> list[dict]:
    """List D 64 and 128 in bf16 for every target and kernel, and a few other dtypes, head dims and masks."""
    found = [
        {"target": target, "kernel": kernel, "dtype": "bf16", "D": D, "mask": mask}
        for target in TARGETS
        for kernel in KERNELS
        for D, mask in ((64, "causal"), (128, "window+sinks"))
    ]
    found += [
        {"target": target, "kernel": kernel, "dtype": "bf16", "D": 256}
        for target in ("sm_89", "gfx942")
        for kernel in KERNELS
    ]
    found += [{"target": "sm_89", "kernel": kernel, "dtype": "fp32", "D": 64} for kernel in KERNELS]
    found += [{"target": "sm_90", "kernel": kernel, "dtype": "fp16", "D": 80, "mask": "full"} for kernel in KERNELS]
    found += [
        {"target": target, "kernel": "decode", "dtype": "bf16", "D": D, "mask": mask, "group": group}
        for target in TARGETS
        for D, mask, group in ((64, "causal", 1), (128, "window+sinks", 4))
        if D == 128 or target in ("sm_90", "gfx942")
    ]
    found += [{"target": "sm_89", "kernel": "decode", "dtype": dtype, "D": 128} for dtype in ("fp16", "fp32")]
    # Also compile all features at once, lengths of 1, and prepare, which other tests only interpret.
    found += [
        {"target": target, "kernel": kernel, "dtype": "bf16", "D": 24, "variant": variant}
        for target, variant in (("sm_90", "features"), ("gfx942", "features"), ("sm_80", "one"))
        for kernel in (*KERNELS, "dbias", "prepare", "decode", "combine")
    ]
    # Lists of tiles instead of bands.
    found += [
        {"target": target, "kernel": kernel, "dtype": "bf16", "D": 64, "mask": "bigbird"}
        for target in ("sm_80", "sm_90", "gfx942")
        for kernel in KERNELS
    ]
    # Other tiles spilled a few bytes here with some versions of Triton.
    found += [
        {"target": target, "kernel": kernel, "dtype": "bf16", "D": 128, "mask": mask}
        for target, kernel, mask in (
            ("sm_80", "dkdv", "full"),
            ("sm_90", "decode", "full"),
            ("sm_100", "decode", "full"),
            ("sm_100", "dq", "window"),
            ("sm_100", "dq", "bigbird"),
            ("gfx942", "forward", "full"),
        )
    ]
    # The loss with every term and a row that ends within a tile; GPT-2's padded vocabulary; a small one in float32.
    found += [{"target": t, "kernel": "loss", "dtype": "bf16", "D": 50257, "variant": "features"} for t in TARGETS]
    found += [
        {"target": t, "kernel": "loss gradient", "dtype": "bf16", "D": 50304} for t in ("sm_80", "sm_90", "gfx942")
    ]
    found += [{"target": "sm_90", "kernel": "loss", "dtype": "fp32", "D": 65, "variant": "features"}]
    # Tiles fetched by the copy engine, in a config that then spills nothing.
    found += [
        {"target": target, "kernel": kernel, "dtype": "bf16", "D": 80, "config": [64, 64, 8, 2, True]}
        for target, kernel in (("sm_90", "forward"), ("sm_90", "dkdv"), ("sm_90", "dq"), ("sm_120", "forward"))
    ]
    found += [{"target": "sm_100", "kernel": "dkdv", "dtype": "bf16", "D": 128, "config": [64, 128, 8, 1, True]}]
    return [*found, TOO_LARGE]


def compiled() -> list[dict]:
    """Compile the cases; return a report on each, in order."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--json", "--cases", json.dumps(cases())],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(report: dict) -> list[str]:
    """List the faults of a kernel: too much shared memory, a spill, or a matrix product outside the matrix units.

    For 16-bit inputs and head dims up to 128 nothing may spill, and both inner loops, over full tiles and over masked
    ones, must have the chip's matrix instruction (mma.sync, wgmma, tcgen05, mfma) equally often. For float32 it must
    not occur, because it would round, except on gfx942, where it does not.
    """
    case, found = report["case"], []
    # The loss kernels multiply no matrices.
    is_loss = case["kernel"].startswith("loss")
    is_lean = case["dtype"] != "fp32" and case["D"] <= 128 and case["variant"] == "plain" and not is_loss
    if not report["shared"] <= configs.SHARED_MEMORY[case["target"]]:
        found.append(f"{report['shared']} bytes of shared memory")
    allowed = SPILLED.get(triton.__version__[:3], {}).get((case["target"], case["kernel"], case["D"]), 0)
    if (is_lean or is_loss) and report["spilled"] != allowed:
        found.append(f"{report['spilled']} bytes of registers spilled")
    # One loop over full tiles and one over masked tiles.
    in_loops = [matrix for matrix, _ in report["loops"]]
    if is_lean and not (len(in_loops) == 2 and in_loops[0] == in_loops[1] > 0):
        found.append(f"matrix instructions in inner loops: {in_loops}")
    if is_lean and len(in_loops) == 2 and report["loops"][0][1] > report["loops"][1][1]:
        found.append("a full tile takes more instructions than a masked one")
    if case["dtype"] == "fp32" and case["target"] != "gfx942" and report["matrix_instructions"]:
        found.append("a matrix instruction on float32")
    if (report["tma_copies"] > 0) != (case["config"] is not None and case["config"][4:] == [True]):
        found.append(f"{report['tma_copies']} copies by TMA")
    return [f"{case} in {report['config']}: {fault}" for fault in found]


def test_every_default_config_compiles_within_its_limits():
    """A single test, so that the compiler runs once. The tile that is too large shows that spills are found."""
    *reports, too_large = compiled()
    assert len(reports) == len(cases()) - 1
    assert [fault for report in reports for fault in faults(report)] == []
    assert any("spilled" in fault for fault in faults(too_large))


def test_faults_are_found():
    case = {"target": "sm_89", "kernel": "dq", "dtype": "fp16", "D": 128, "variant": "plain", "config": None}
    report = {"case": case, "config": [64, 64, 4, 2], "shared": 99 << 10, "spilled": 0, "matrix_instructions": 9}
    report["loops"] = [[3, 7], [3, 9]]
    report["tma_copies"] = 0
    assert faults(report) == []
    assert len(faults(report | {"shared": (99 << 10) + 1, "spilled": 4, "loops": []})) == 3
    for loops in ([[3, 7]], [[0, 7], [0, 9]], [[3, 7], [2, 9]], [[3, 9], [3, 7]]):
        assert len(faults(report | {"loops": loops})) == 1
    assert len(faults(report | {"case": case | {"dtype": "fp32"}})) == 1
    assert faults(report | {"case": case | {"D": 256}, "spilled": 4}) == []
    assert len(faults(report | {"tma_copies": 1})) == 1
    assert len(faults(report | {"case": case | {"config": [64, 64, 4, 2, True]}})) == 1

"""What the compiler makes of every kernel, for GPUs that need not be here: `python -m benchmarks.compile_report`.

Registers, bytes spilled, shared memory and the matrix instructions of each kernel's default configuration. It compiles
what a launch would compile, ahead of time, so it runs without TRITON_INTERPRET: that choice falls when a kernel is
defined.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import attention_backward, attention_dbias, attention_forward, configs, cross_entropy_triton, masks
from kernels.operators import call_of
from kernels.problem import Launch, Problem

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
KERNELS = ("forward", "dkdv", "dq")  # and "dbias", and "prepare", which has no matrix product
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
COMMAND = "python -m benchmarks.compile_report --masks causal bigbird --write docs/compile_report.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel for one target. `config` overrides the table: (block_m, block_n, num_warps, num_stages).

    variant: "plain"; "features", with everything that `attention` can do at once; "one", where each length is 1.
    Of the kernels "loss" and "loss gradient" D is the number of columns, V.
    """

    target: str
    kernel: str
    dtype: str
    D: int
    mask: str = "causal"
    variant: str = "plain"
    config: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Report:
    """Bytes of shared memory; registers of a thread; bytes of registers spilled; matrix instructions in the code."""

    case: Case
    config: tuple[int, int, int, int]
    shared: int
    registers: int
    spilled: int
    matrix_instructions: int


class _Device:
    """A stand-in for Triton's driver: it names the target to compile for, and can do nothing else."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: each target is a device of its own.
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


MASKS = {
    "full": masks.FULL,
    "causal": masks.CAUSAL,
    "window": masks.sliding_window(256),
    "bigbird": masks.bigbird(256, 4, 2, seed=0),
    "window+sinks": masks.CAUSAL & (masks.sliding_window(256) | masks.sink_tokens(4)),
}


def launch_of(case: Case) -> Launch:
    """The launch that this case stands for, on tensors without memory."""
    if case.kernel.startswith("loss"):
        return loss_launch_of(case)
    B, T, H, H_kv = (1, 1, 1, 1) if case.variant == "one" else (2, 2048, 4, 2)
    mask = MASKS[case.mask]

    def tensor(*shape, dtype=DTYPES[case.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = tensor(B, T, H, case.D), tensor(B, T, H_kv, case.D)
    rows = tensor(B, H, T, dtype=torch.float32)
    segments = softcap = slopes = bias = sinks = seed = None
    dropout_p = 0.0
    if case.variant == "features":
        mask = mask | masks.Mask(in_prefix, tensor(B, dtype=torch.int32))
        segments, softcap, dropout_p = tensor(B, T, dtype=torch.int32), 30.0, 0.1
        slopes, bias, sinks, seed = rows[0, :, 0], rows[0, :, None], rows[0, :, 0], tensor(1, dtype=torch.int64)
    features = {"segment_ids": segments, "softcap": softcap, "alibi_slopes": slopes, "bias": bias, "sinks": sinks}
    call = call_of(q, k, k, mask=mask, scale=None, dropout_p=dropout_p, seed=seed, **features)
    problem = Problem(call, case.target)
    if case.kernel == "forward":
        return attention_forward.forward_launch(problem, q, rows)
    if case.kernel == "dkdv":
        return attention_backward.dkdv_launch(problem, q, rows, rows, k, k)
    if case.kernel == "dbias":
        return attention_dbias.dbias_launch(problem, q, rows, rows, rows[0, :, None])
    if case.kernel == "dq":
        return attention_backward.dq_launch(problem, q, rows, rows, q)
    return attention_backward.prepare_launch(problem, q, q, rows, rows, rows, rows)


def loss_launch_of(case: Case) -> Launch:
    """The kernels of kernels.linear_cross_entropy on a chunk of 4096 rows."""
    logits = torch.empty(4096, -(-case.D // 64) * 64, dtype=DTYPES[case.dtype], device="meta")[:, : case.D]
    targets, row = (torch.empty(4096, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
    softcap, smoothing = (30.0, 0.1) if case.variant == "features" else (0.0, 0.0)
    terms = cross_entropy_triton.Terms(softcap, 1e-4, smoothing, -100)
    if case.kernel == "loss":
        return cross_entropy_triton.loss_launch(logits, targets, row, row, terms, gradient=True)
    return cross_entropy_triton.gradient_launch(logits, targets, row, row, terms)


def in_prefix(q, k, length):
    return k < length


def compile_case(case: Case) -> Report:
    """Compile one case and read what came of it."""
    triton.runtime.driver.set_active(_Device(case.target))
    launch = launch_of(case)
    args, options = dict(launch.args), dict(launch.options)
    if case.config is not None:
        args["BLOCK_M"], args["BLOCK_N"], options["num_warps"], options["num_stages"] = case.config
    compiled = launch.kernel.warmup(grid=launch.grid, **args, **options)
    tile = ("BLOCK_N", "BLOCK_V") if "BLOCK_V" in args else ("BLOCK_M", "BLOCK_N")
    config = *(args.get(name, 0) for name in tile), options["num_warps"], options.get("num_stages", 0)
    assembly = compiled.asm["amdgcn" if case.target == "gfx942" else "ptx"]
    registers, spilled = (_amd_usage if case.target == "gfx942" else _nvidia_usage)(compiled)
    found = assembly.count(MATRIX_INSTRUCTION[case.target])
    return Report(case, config, compiled.metadata.shared, registers, spilled, found)


def _amd_usage(compiled) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory of a thread."""
    assembly = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return value("vgpr_count"), max(value("private_segment_fixed_size"), 4 * value("vgpr_spill_count"))


def _nvidia_usage(compiled) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, by cuobjdump; where there is a stack, ptxas counts the spills."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output([tools / "cuobjdump", "--dump-resource-usage", cubin])
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        if stack == 0:
            return registers, 0
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target (\S+?),?\s", compiled.asm["ptx"])[1]
        log = _assembled(tools, arch, ptx)
        return registers, int(re.search(r"(\d+) bytes spill stores", log)[1])


def _assembled(tools: Path, arch: str, ptx: Path) -> str:
    """What `ptxas -v` says. Triton brings two of them, and which one takes a target depends on its version."""
    for name in ("ptxas-blackwell", "ptxas"):
        command = [tools / name, "-v", f"-arch={arch}", ptx, "-o", ptx.with_suffix(".cubin")]
        if (tools / name).exists() and (log := _output(command, check=name == "ptxas")):
            return log
    raise FileNotFoundError(f"no ptxas in {tools}")


def _output(command: list, check: bool = True) -> str:
    """What a command prints; nothing if it fails and `check` is off."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=check)
    return done.stdout + done.stderr if done.returncode == 0 else ""


def compile_all(cases: list[Case], processes: int = 2) -> list[Report]:
    """Compile cases side by side."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_case, cases))


def markdown(reports: list[Report]) -> str:
    """The page docs/compile_report.md."""
    lines = [
        "# What the compiler makes of the kernels",
        "",
        f"By `{COMMAND}`",
        f"with Triton {triton.__version__}: default tiles (BLOCK_M x BLOCK_N, warps, stages), registers and bytes",
        "spilled of a thread, KiB of shared memory of a program out of what the chip has, and how often the chip's",
        "matrix instruction stands in the code. No GPU is needed, and nothing here was timed.",
        "",
        "| target | kernel | inputs | D | mask | tile | registers | spilled | KiB of | matrix instructions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in reports:
        c, limit = r.case, configs.SHARED_MEMORY[r.case.target] >> 10
        tile = "{}x{}, {} w, {} s".format(*r.config)
        found = f"{r.matrix_instructions} {MATRIX_INSTRUCTION[c.target]}"
        shared = f"{r.shared >> 10} / {limit}"
        row = (c.target, c.kernel, c.dtype, c.D, c.mask, tile, r.registers, r.spilled, shared, found)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="*", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--masks", nargs="*", default=["causal"], choices=list(MASKS))
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one object a line, for programs")
    parser.add_argument("--write", type=Path, default=None, help="a Markdown file to write the table to")
    parser.add_argument("--cases", type=json.loads, default=None, help="a JSON list of cases instead of the table's")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    if args.cases is not None:
        cases = [Case(**case) for case in args.cases]
    else:
        cases = [
            Case(target, kernel, dtype, D, mask)
            for target in args.targets
            for dtype in args.dtypes
            for D in args.head_dims
            for mask in args.masks
            for kernel in args.kernels
        ]
    reports = compile_all(cases, args.processes)
    if args.json:
        for report in reports:
            print(json.dumps(asdict(report)))
        return
    if args.write is not None:
        args.write.write_text(markdown(reports), encoding="utf-8")
        return
    heading = ("target", "kernel", "dtype", "D", "mask", "tile", "KiB", "limit", "regs", "spilled", "")
    form = "{:8}{:9}{:6}{:>4}  {:14}{:18}{:>6}{:>6}{:>6}{:>9}  {}"
    print(form.format(*heading))
    for r in reports:
        c, limit = r.case, configs.SHARED_MEMORY[r.case.target] >> 10
        tile = "{}x{} w{} s{}".format(*r.config)
        found = f"{r.matrix_instructions} {MATRIX_INSTRUCTION[c.target]}"
        shared = f"{r.shared / 1024:.1f}"
        print(form.format(c.target, c.kernel, c.dtype, c.D, c.mask, tile, shared, limit, r.registers, r.spilled, found))


if __name__ == "__main__":
    main()

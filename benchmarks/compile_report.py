"""Compile every kernel for several architectures, without a GPU: `python -m benchmarks.compile_report`.

Reports registers, bytes spilled, shared memory and the instructions of the inner loops for each kernel's default
configuration. Run it without TRITON_INTERPRET, which Triton reads when a kernel is defined. `make compile-report`
writes docs/compile_report.md.
"""

import argparse
import contextlib
import functools
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import assembly, positive
from benchmarks.assembly import Loop
from kernels import (
    attention_backward,
    attention_dbias,
    attention_decode_triton,
    attention_forward,
    configs,
    cross_entropy_triton,
    masks,
)
from kernels.attention_arguments import Arguments, DecodeArguments
from kernels.operators import call_of, decode_call_of
from kernels.problem import Launch, Problem

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
KERNELS = ("forward", "dkdv", "dq", "decode")  # also "dbias", and "prepare" and "combine", which have no matrix product
# Each chip's matrix instruction: its name in PTX or amdgcn, and in the binary.
MATRIX_INSTRUCTION = {
    "sm_80": ("mma.sync", "HMMA"),
    "sm_89": ("mma.sync", "HMMA"),
    "sm_90": ("wgmma.mma_async", "HGMMA"),
    "sm_100": ("tcgen05.mma", "UTCHMMA"),
    "sm_120": ("mma.sync", "HMMA"),
    "gfx942": ("v_mfma", "v_mfma"),
}
# Tiles of decoding have too few rows for the newer instructions.
DECODE_INSTRUCTION = MATRIX_INSTRUCTION | dict.fromkeys(("sm_90", "sm_100"), MATRIX_INSTRUCTION["sm_80"])
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One kernel for one target. `config` overrides the table: (block_m, block_n, num_warps, num_stages[, tma]).

    variant: "plain"; "features", with every feature of `attention` at once; "one", with all lengths 1.
    D: for the kernels "loss" and "loss gradient", the number of columns, V.
    group: query heads for each key head.
    """

    target: str
    kernel: str
    dtype: str
    D: int
    mask: str = "causal"
    variant: str = "plain"
    group: int = 2
    config: tuple | None = None


@dataclass(frozen=True)
class Report:
    """The compiler's result for a case.

    shared: bytes per program; registers, spilled: registers and bytes per thread; matrix_instructions: in all of the
    code; tma_copies: instructions that make the copy engine fetch a tile; loops: the innermost loops with a matrix
    instruction, the loop over full tiles first.
    """

    case: Case
    config: tuple[int, int, int, int]
    shared: int
    registers: int
    spilled: int
    matrix_instructions: int
    tma_copies: int
    loops: tuple[Loop, ...]


class _Device:
    """A stand-in for Triton's driver that only names the target to compile for."""

    def __init__(self, target: str):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device, so each target counts as one.
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
    """Build the launch of a case, on tensors without memory."""
    if case.kernel.startswith("loss"):
        return loss_launch_of(case)
    B, T, H, H_kv = (1, 1, 1, 1) if case.variant == "one" else (2, 2048, 4, 2)
    mask = MASKS[case.mask]
    if case.kernel in ("decode", "combine"):
        return decode_launch_of(case, mask)
    tensor = functools.partial(torch.empty, dtype=DTYPES[case.dtype], device="meta")
    q, k = tensor(B, T, H, case.D), tensor(B, T, H_kv, case.D)
    rows = tensor(B, H, T, dtype=torch.float32)
    arguments = Arguments(q, k, k, mask)
    if case.variant == "features":
        arguments = Arguments(
            q, k, k, mask | masks.Mask(in_prefix, tensor(B, dtype=torch.int32)), tensor(B, T, dtype=torch.int32),
            softcap=30.0, alibi_slopes=rows[0, :, 0], bias=rows[0, :, None], sinks=rows[0, :, 0], dropout_p=0.1,
            seed=tensor(1, dtype=torch.int64),
        )  # fmt: skip
    problem = Problem(call_of(arguments), case.target)
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
    """Build the launch of a kernel of kernels.linear_cross_entropy on a chunk of 4096 rows."""
    logits = torch.empty(4096, -(-case.D // 64) * 64, dtype=DTYPES[case.dtype], device="meta")[:, : case.D]
    targets, row = (torch.empty(4096, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
    softcap, smoothing = (30.0, 0.1) if case.variant == "features" else (0.0, 0.0)
    terms = cross_entropy_triton.Terms(softcap, 1e-4, smoothing, -100)
    if case.kernel == "loss":
        return cross_entropy_triton.loss_launch(logits, targets, row, row, terms, gradient=True)
    return cross_entropy_triton.gradient_launch(logits, targets, row, row, terms)


def decode_launch_of(case: Case, mask: masks.Mask) -> Launch:
    """Build a decoding launch that appends one new token to each sequence; "features" adds pages and rotary tables."""
    B, T, H_kv = (1, 1, 1) if case.variant == "one" else (2, 2048, 2)
    H = H_kv * case.group
    tensor = functools.partial(torch.empty, dtype=DTYPES[case.dtype], device="meta")
    lens, new, cache = tensor(B, dtype=torch.int32), tensor(B, 1, H_kv, case.D), tensor(B, T, H_kv, case.D)
    table = rotary = slopes = softcap = None
    if case.variant == "features":
        mask = mask | masks.Mask(in_prefix, lens)
        cache, table, rotary = (
            tensor(T, 16, H_kv, case.D),
            tensor(B, T // 16, dtype=torch.int32),
            (tensor(T, case.D),) * 2,
        )
        softcap, slopes = 30.0, tensor(H, dtype=torch.float32)
    arguments = DecodeArguments(
        tensor(B, 1, H, case.D),
        cache,
        cache,
        lens,
        new,
        new,
        rotary,
        mask,
        table,
        case.D**-0.5,
        softcap,
        slopes,
        slopes,
    )
    problem = attention_decode_triton.DecodeProblem(decode_call_of(arguments), case.target)
    if case.kernel == "decode":
        return attention_decode_triton.decode_launch(problem, problem.scratch())
    out, lse = tensor(B, 1, H, case.D), tensor(B, H, 1, dtype=torch.float32)
    return attention_decode_triton.combine_launch(problem, problem.scratch(), out, lse)


def in_prefix(q, k, length):
    return k < length


def compile_case(case: Case) -> Report:
    """Compile one case and measure the result."""
    triton.runtime.driver.set_active(_Device(case.target))
    with contextlib.ExitStack() as stack:
        if case.config is not None:
            key = configs.Key(case.target, DTYPES[case.dtype], configs.head_dim_class(case.D, case.D), case.kernel)
            stack.enter_context(configs.trying(key, configs.Config(*case.config)))
        launch = launch_of(case)
    args, options = launch.args, launch.options
    compiled = launch.kernel.warmup(grid=launch.grid, **args, **options)
    tile = ("BLOCK_N", "BLOCK_V") if "BLOCK_V" in args else ("BLOCK_M", "BLOCK_N")
    config = *(args.get(name, 0) for name in tile), options["num_warps"], options.get("num_stages", 0)
    in_text, in_binary = instruction(case)
    if case.target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers, spilled = _amd_usage(text)
        code = assembly.amdgcn(text)
    else:
        text = compiled.asm["ptx"]
        registers, disassembled = _disassembled(compiled.asm["cubin"])
        spilled = assembly.bytes_spilled(disassembled)
        code = assembly.sass(disassembled)
    copies = text.count("cp.async.bulk.tensor")
    loops = tuple(assembly.inner_loops(code, in_binary))
    return Report(case, config, compiled.metadata.shared, registers, spilled, text.count(in_text), copies, loops)


def instruction(case: Case) -> tuple[str, str]:
    """Name the matrix instruction to look for, in text and in the binary."""
    return (DECODE_INSTRUCTION if case.kernel == "decode" else MATRIX_INSTRUCTION)[case.target]


def _amd_usage(text: str) -> tuple[int, int]:
    """Read a thread's vector registers and bytes of scratch memory."""

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return value("vgpr_count"), max(value("private_segment_fixed_size"), 4 * value("vgpr_spill_count"))


def _disassembled(cubin: bytes) -> tuple[int, str]:
    """Read a thread's registers and the code, with the tools in Triton's package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    return int(re.search(r"REG:(\d+)", usage)[1]), code


def compile_all(cases: list[Case], processes: int = 2) -> list[Report]:
    """Compile cases in several processes."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_case, cases))


def page_cases() -> list[Case]:
    """List the cases of docs/compile_report.md."""
    kinds = [("bf16", D, mask) for D in (64, 128) for mask in ("causal", "bigbird")]
    kinds += [("bf16", 256, "causal"), *(("fp32", D, "causal") for D in (64, 128, 256))]
    return [Case(target, kernel, *kind) for target in TARGETS for kind in kinds for kernel in KERNELS]


def markdown(reports: list[Report]) -> str:
    """Write the text of docs/compile_report.md."""
    columns = ("target", "kernel", "inputs", "D", "mask", *COLUMNS)
    lines = [
        "# The compiled kernels",
        "",
        f"Written by `make compile-report` with Triton {triton.__version__}; nothing was timed, and no GPU is needed.",
        "The columns are: default tile (BLOCK_M x BLOCK_N, warps, stages); registers and bytes spilled per thread; KiB",
        "of shared memory per program, out of those that the chip has; and one pass through each inner loop, over full",
        "tiles and over masked ones: the chip's matrix instructions + all other instructions per warp (per wavefront",
        "on gfx942). Compare counts within a chip only, because matrix instructions differ in size between chips.",
        "NVIDIA's chips multiply float32 outside their matrix units.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for r in reports:
        c = r.case
        lines.append(f"| {' | '.join(map(str, (c.target, c.kernel, c.dtype, c.D, c.mask, *_row(r))))} |")
    return "\n".join(lines) + "\n"


COLUMNS = ("tile", "registers", "spilled", "KiB of", "matrix", "full tile", "masked tile")


def _row(r: Report) -> tuple:
    """Format the cells under COLUMNS."""
    tile = "{}x{}, {} w, {} s".format(*r.config)
    shared = f"{r.shared >> 10} / {configs.SHARED_MEMORY[r.case.target] >> 10}"
    name = instruction(r.case)[0] if r.matrix_instructions else "none"
    loops = [f"{loop.matrix} + {loop.others}" for loop in r.loops] + ["", ""]
    return tile, r.registers, r.spilled, shared, name, *loops[:2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="*", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--masks", nargs="*", default=["causal"], choices=list(MASKS))
    parser.add_argument("--kernels", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--processes", type=positive, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--write", type=Path, default=None, help="write the cases of docs/compile_report.md to this file"
    )
    parser.add_argument("--cases", type=json.loads, default=None, help="compile this JSON list of cases instead")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    if args.write is not None and (args.json or args.cases is not None):
        parser.error("--write fixes the cases and the format: leave out --json and --cases")
    if args.cases is not None:
        try:
            cases = [Case(**case) for case in args.cases]
        except TypeError as error:
            parser.error(f"--cases is not a JSON list of cases: {error}")
    elif args.write is not None:
        cases = page_cases()
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
    form = "{:8}{:9}{:6}{:>4}  {:14}{:18}{:>9}{:>9}{:>11}  {:17}{:>11}{:>13}"
    print(form.format("target", "kernel", "dtype", "D", "mask", *COLUMNS))
    for r in reports:
        c = r.case
        print(form.format(c.target, c.kernel, c.dtype, c.D, c.mask, *_row(r)))


if __name__ == "__main__":
    main()

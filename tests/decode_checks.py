"""The rule of attention_checks.py for decoding: cases, caches that are NaN behind their tokens, and the comparison."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import attention_decode, masks
from kernels.attention_arguments import DecodeArguments
from kernels.attention_decode_reference import attention_decode_reference, by_length
from tests import attention_checks as checks
from tests.rounding import attend_deviation

LENGTHS = (0, 1, 17, 127, 128, 129, 1000)


@dataclass(frozen=True)
class Case:
    """One call: `lens` tokens in the cache, and Tq more if `new`. page: 0 for a contiguous cache."""

    name: str = ""
    lens: tuple[int, ...] = LENGTHS
    Tq: int = 1
    H: int = 2
    H_kv: int = 1
    D: int = 16
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    capacity: int = 1024
    page: int = 0
    new: bool = True
    features: tuple[str, ...] = ()
    mask: masks.Mask = masks.CAUSAL
    layout: str = "poisoned"
    seed: int = 0

    def __str__(self) -> str:
        return self.name


FEW = (0, 130, 600)
WINDOW = masks.sliding_window(150)
WINDOW_AND_SINKS = masks.CAUSAL & (WINDOW | masks.sink_tokens(4))

CASES = [
    Case("one query", H_kv=2),
    Case("fp16-D64", lens=FEW, D=64, dtype=torch.float16, layout="heads first"),
    Case("bf16-D128-groups-of-4-pages", Tq=3, H=4, D=128, dtype=torch.bfloat16, page=16),
    Case("D80-Dv24-groups-of-8-pages-of-48", Tq=5, H=8, D=80, Dv=24, page=48, lens=(1000, 129)),
    Case("two tiles of rows", Tq=9, H=8, lens=(3, 300), mask=WINDOW),
    Case("nothing new", Tq=2, new=False),
    Case("nothing new, all visible", lens=FEW, Tq=4, new=False, mask=masks.FULL, dtype=torch.float16, page=32),
    Case("all visible", lens=FEW, Tq=4, mask=masks.FULL),
    Case("rotary-pages", lens=FEW, Tq=2, features=("rotary",), page=16),
    Case("rotary-bf16", lens=FEW, D=64, features=("rotary",), dtype=torch.bfloat16),
    Case("everything", Tq=2, H=4, features=("rotary", "softcap", "alibi", "sinks"), page=64, mask=WINDOW_AND_SINKS),
    Case("everything-bf16", lens=FEW, Tq=2, features=("softcap", "alibi", "sinks"), dtype=torch.bfloat16),
    Case("window", lens=FEW, Tq=3, mask=WINDOW, layout="strided"),
    Case("window over all lengths", mask=WINDOW, H=1),
    Case("sinks that no key joins", features=("sinks",), new=False, mask=masks.sink_tokens(0), lens=(0, 300)),
    Case("bigbird", lens=(1000, 70), mask=masks.bigbird(64, 4, 2, seed=0)),
    Case("dilated", lens=(600, 17), mask=WINDOW & masks.strided(3)),
]


@dataclass
class Inputs:
    """Tensors in the case's dtype. Caches are NaN behind their tokens and in unused pages."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor
    arguments: dict


def make_inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    B, Tq, H, H_kv, D, Dv = len(case.lens), case.Tq, case.H, case.H_kv, case.D, case.Dv or case.D
    lens = torch.tensor(case.lens, dtype=torch.int32)
    arguments: dict = {"mask": case.mask}
    table = None
    if case.page:
        pages = -(-case.capacity // case.page)
        table = torch.randperm(B * pages, generator=generator).view(B, pages).int()
        for b, n in enumerate(case.lens):
            # Entries behind a sequence's tokens are not page numbers.
            table[b, -(-(n + Tq * case.new) // case.page) :] = 1 << 30
        arguments["block_table"] = table.to(device)
    caches = [fill(randn(B, case.capacity, H_kv, width), case, table) for width in (D, Dv)]
    if case.new:
        arguments["k_new"] = checks.lay_out(randn(B, Tq, H_kv, D), case.dtype, "strided", device)
        arguments["v_new"] = checks.lay_out(randn(B, Tq, H_kv, Dv), case.dtype, case.layout, device)
    if "rotary" in case.features:
        angles = torch.outer(torch.arange(case.capacity), 100.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)
        sign = torch.tensor([-1.0, 1.0]).repeat_interleave(D // 2)
        arguments["rotary"] = angles.cos().to(device), (angles.sin() * sign).to(device)
    if "softcap" in case.features:
        arguments["softcap"] = 2.0
    if "alibi" in case.features:
        arguments["alibi_slopes"] = torch.rand(H, generator=generator).to(device)
    if "sinks" in case.features:
        arguments["sinks"] = randn(H).to(device)
    q = checks.lay_out(randn(B, Tq, H, D), case.dtype, case.layout, device)
    k, v = (checks.lay_out(cache, case.dtype, case.layout, device) for cache in caches)
    return Inputs(q, k, v, lens.to(device), arguments)


def fill(tokens: Tensor, case: Case, table: Tensor | None) -> Tensor:
    """Make a cache with the first lens of tokens (B, capacity, H_kv, D), and NaN elsewhere."""
    B, _, H_kv, D = tokens.shape
    shape = tokens.shape if table is None else (B * table.shape[1], case.page, H_kv, D)
    cache = torch.full(shape, math.nan)
    for b, n in enumerate(case.lens):
        if table is None:
            cache[b, :n] = tokens[b, :n]
        else:
            j = torch.arange(n)
            cache[table[b].long()[j // case.page], j % case.page] = tokens[b, :n]
    return cache


def run(fn, inputs: Inputs, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """Return out, lse and the caches afterwards, with floating inputs in `dtype` if given."""

    def cast(x):
        if isinstance(x, tuple):
            return tuple(map(cast, x))
        return x.to(dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating_point() else x

    layouts = [torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device) for x in
               (inputs.k_cache, inputs.v_cache)]  # fmt: skip
    caches = [to.copy_(x) for to, x in zip(layouts, (inputs.k_cache, inputs.v_cache))]
    arguments = {name: cast(x) for name, x in inputs.arguments.items()}
    out, lse = fn(cast(inputs.q), *caches, inputs.cache_lens, **arguments, return_lse=True, **options)
    return {"out": out, "lse": lse, "k_cache": caches[0], "v_cache": caches[1]}


def reference(*args, upcast: bool = True, **arguments):
    """Call attention_decode_reference with the arguments of attention_decode."""
    return attention_decode_reference(DecodeArguments(*args, **arguments), upcast)


def attention_deviation(*args, **arguments):
    """Return the expected rounding error of out and lse: see tests/rounding.py."""
    return by_length(attend_deviation, DecodeArguments(*args, **arguments))


def truth_plain_and_deviation(inputs: Inputs) -> tuple[dict[str, Tensor], ...]:
    """Return the reference in float64, plain PyTorch at the inputs' precision, and float32's expected rounding."""
    plain = run(reference, inputs, upcast=False)
    plain["lse"] = run(reference, inputs)["lse"]
    return run(reference, inputs, torch.float64), plain, run(attention_deviation, inputs, torch.float64)


def check(case: Case, device: str, impl: str = "triton") -> None:
    """Compare a path with the reference in float64. Outputs are NaN before the kernels write them."""
    inputs = make_inputs(case, device)
    with checks.poisoned_outputs():
        ours = run(attention_decode, inputs, impl=impl)
    truth, plain, deviation = truth_plain_and_deviation(inputs)
    for name in ("out", "lse"):
        assert ours[name].shape == truth[name].shape
        checks.assert_close(name, ours[name], plain[name], truth[name], case.dtype, deviation[name])
    # Rotation rounds a sum of two products in either order; everything else is copied exactly.
    step = {torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype] * ("rotary" in case.features)
    torch.testing.assert_close(ours["k_cache"], plain["k_cache"], rtol=step, atol=step, equal_nan=True)
    torch.testing.assert_close(ours["v_cache"], plain["v_cache"], rtol=0, atol=0, equal_nan=True)

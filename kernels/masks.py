"""Every attention mask: a predicate in plain operators, and the tiles it needs.

A mask says which keys a query may attend to. It is written once, as a function of positions, and the same function
runs inside the Triton kernels, in the PyTorch reference and in the picture of the mask::

    def dilated_window(q, k, window, step):        # q, k: positions; True = may attend
        return (q >= k) & (q - k < window) & ((q - k) % step == 0)

    mask = Mask(dilated_window, 64, 2, bands=[Band(least=0, most=63, exact=False)])

Query i of Tq stands at position i + Tk - Tq, key j at position j: queries line up with the last keys. A position may
therefore be negative, and a mask may leave a query without any key.

**Tiles.** A mask also tells which tiles of the (query, key) plane hold a True, as a short list of `Band`s whose union
covers every True. A band is a strip along the diagonal cut by a range of keys and a range of queries, so it says the
same thing of rows (for the forward pass and dQ) and of columns (for dK and dV). The `&` of two masks intersects their
bands and `|` joins the lists; both are arithmetic on integers, done once when the mask is built. Without bands every
tile is visited.
"""

import functools
import itertools
import linecache
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no triton: predicates still run on tensors
    triton = tl = None

# No position reaches this far: a bound at FAR is no bound. Sums of two stay within int32.
FAR = 1 << 29
# The kernels unroll over bands; a mask with more of them is covered by one wide band instead.
MAX_BANDS = 6


class Band(NamedTuple):
    """The set of (q, k) with least <= q - k <= most, k_begin <= k < k_end and q_begin <= q < q_end, in positions.

    `exact` says that the mask is True in all of the band, so that tiles inside it need no predicate.
    """

    least: int = -FAR
    most: int = FAR
    k_begin: int = -FAR
    k_end: int = FAR
    q_begin: int = -FAR
    q_end: int = FAR
    exact: bool = False

    def __and__(self, other: "Band") -> "Band":
        return Band(
            max(self.least, other.least),
            min(self.most, other.most),
            max(self.k_begin, other.k_begin),
            min(self.k_end, other.k_end),
            max(self.q_begin, other.q_begin),
            min(self.q_end, other.q_end),
            self.exact and other.exact,
        )

    def is_empty(self) -> bool:
        return self.least > self.most or self.k_begin >= self.k_end or self.q_begin >= self.q_end

    def covers(self, other: "Band") -> bool:
        """Whether `other` adds nothing: it lies within this band, and is not exact where this one is not."""
        return (self & other)[:6] == other[:6] and (self.exact or not other.exact)


EVERYTHING = Band()
NOTHING = Band(k_begin=0, k_end=0)


class _Predicate(NamedTuple):
    """A predicate with all its parameters in one tuple, f(q, k, params): for tensors, and for Triton (None without)."""

    python: Callable
    triton: object | None


_RESERVED = {"mask", "q", "k", "p", "tl"}  # what the compiled function itself calls things
_LEAVES: dict[str, Callable] = {}  # name -> a user's or a built-in predicate, f(q, k, *params)
_PREDICATES: dict[str, _Predicate] = {}  # a mask's key -> its compiled predicate


def predicate(key: str) -> _Predicate:
    """The predicate of every mask with this key. A custom operator takes no objects: masks reach it as their key."""
    return _PREDICATES[key]


class Mask:
    """Which keys each query may attend to.

    fn      f(q, k, *params) -> bool, in the operators that integers, tensors and Triton share (+ - * // % & | ~ and
            comparisons). It is evaluated on broadcasting blocks of int32 positions. A function decorated with
            `triton.jit` will do as well. Of negative numbers Triton's // and % round towards 0, Python's down.
    params  what fn takes after q and k: Python integers, or int32 tensors of shape (B,), one value for each row of the
            batch.
    bands   where the mask may be True: see `Band`. None: anywhere.

    Raises TypeError for parameters of another kind, ValueError for numbers that no position reaches.
    """

    def __init__(self, fn: Callable, *params, bands: Iterable[Band] | None = None):
        for param in params:
            is_row_tensor = isinstance(param, torch.Tensor) and param.dtype == torch.int32 and param.ndim == 1
            if not is_row_tensor and (not isinstance(param, int) or isinstance(param, bool)):
                raise TypeError(f"a mask takes integers and int32 tensors of shape (B,), not {param!r}")
        bands = (EVERYTHING,) if bands is None else tuple(bands)
        for n in (*(p for p in params if isinstance(p, int)), *(n for band in bands for n in band)):
            if not -FAR <= n <= FAR:
                raise ValueError(f"a mask's integers lie between -{FAR} and {FAR}, unlike {n}")
        name = _register_leaf(fn)
        slots = "".join(f", {{{i}}}" for i in range(len(params)))
        self._build(f"{name}(q, k{slots})", params, bands)

    @classmethod
    def _combine(cls, left: "Mask", operator: str, right: "Mask", bands: Iterable[Band]) -> "Mask":
        mask = cls.__new__(cls)
        # The right side's parameters come after the left side's.
        shift = len(left.params)
        moved = right._template.format(*(f"{{{i + shift}}}" for i in range(len(right.params))))
        mask._build(f"({left._template} {operator} {moved})", left.params + right.params, tuple(bands))
        return mask

    def _build(self, template: str, params: tuple, bands: tuple[Band, ...]) -> None:
        """`template` is the mask's expression with numbered holes where its parameters go."""
        self._template = template
        self.params = params
        self.bands = _simplify(bands)
        self.ints = tuple(p for p in params if isinstance(p, int))
        self.tensors = tuple(p for p in params if not isinstance(p, int))
        # What a custom operator gets of the mask beside its key: the bands, then the integers.
        self.operands = tuple(int(n) for band in self.bands for n in band) + self.ints
        # Every query sees the key at its own position, if there is one: a row of such a mask is never empty.
        self.shows_itself = any(b.exact and b.least <= 0 <= b.most and b[2:6] == EVERYTHING[2:6] for b in self.bands)
        self.dense_cache: dict = {}
        # In the predicate's one tuple the integers come first, then the values of the row.
        ints, rows = itertools.count(), itertools.count(len(self.ints))
        order = (next(ints if isinstance(p, int) else rows) for p in params)
        self.key = template.format(*(f"p[{n}]" for n in order))
        if self.key not in _PREDICATES:
            _PREDICATES[self.key] = _compile(self.key)

    def __and__(self, other: "Mask") -> "Mask":
        return Mask._combine(self, "&", other, [a & b for a in self.bands for b in other.bands])

    def __or__(self, other: "Mask") -> "Mask":
        return Mask._combine(self, "|", other, self.bands + other.bands)

    def __deepcopy__(self, memo) -> "Mask":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"Mask({self._template.format(*self.params)})"

    def visible(self, q, k):
        """The predicate on tensors of positions that broadcast against (B, H, Tq, Tk); a bool tensor of that kind."""
        rows = tuple(t.view(-1, 1, 1, 1) for t in self.tensors)
        return _PREDICATES[self.key].python(q, k, self.ints + rows)

    def dense(self, Tq: int, Tk: int, device="cpu") -> torch.Tensor:
        """The whole mask as a bool tensor (1 or B, 1, Tq, Tk)."""
        q = torch.arange(Tk - Tq, Tk, device=device, dtype=torch.int32)[:, None]
        k = torch.arange(Tk, device=device, dtype=torch.int32)[None, :]
        visible = self.visible(q, k)
        batch = visible.shape[0] if visible.ndim == 4 else 1
        return visible.expand(batch, 1, Tq, Tk)


def _register_leaf(fn: Callable) -> str:
    """The name under which a predicate is known: its own, with a number after it where another one has that name."""
    name = getattr(fn, "__name__", "")
    if not name.isidentifier():
        raise ValueError("a mask's predicate is a named function: Triton reads its source, so a lambda will not do")
    n = 1
    unique = name
    while unique in _RESERVED or _LEAVES.setdefault(unique, fn) is not fn:
        n += 1
        unique = f"{name}_{n}"
    return unique


def _compile(expression: str) -> _Predicate:
    """Make `def mask(q, k, p): return <expression>` for tensors, and for Triton where there is one.

    Triton reads a function's source through `inspect`, which finds it in `linecache`.
    """
    source = f"def mask(q, k, p):\n    return {expression}\n"
    filename = f"<mask {expression}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    code = compile(source, filename, "exec")

    def build(leaves: dict) -> Callable:
        namespace = {"__name__": __name__, "tl": tl, **leaves}
        exec(code, namespace)
        return namespace["mask"]

    names = {name for name in code.co_consts[0].co_names if name in _LEAVES}
    plain = {name: getattr(_LEAVES[name], "fn", _LEAVES[name]) for name in names}
    if triton is None:
        return _Predicate(build(plain), None)
    jitted = {name: _jitted(_LEAVES[name]) for name in names}
    return _Predicate(build(plain), triton.jit(build(jitted)))


@functools.cache
def _jitted(fn: Callable):
    if hasattr(fn, "fn"):
        return fn
    if not any(value is tl for value in fn.__globals__.values()):
        # The interpreter insists on `triton.language` among a function's globals.
        fn = types.FunctionType(fn.__code__, {**fn.__globals__, "tl": tl}, fn.__name__, fn.__defaults__, fn.__closure__)
    return triton.jit(fn)


def _simplify(bands: tuple[Band, ...]) -> tuple[Band, ...]:
    """Leave out empty bands and those that another one covers."""
    kept: list[Band] = []
    for band in bands:
        if band.is_empty() or any(other.covers(band) for other in kept):
            continue
        kept = [other for other in kept if not band.covers(other)]
        kept.append(band)
    if len(kept) > MAX_BANDS:
        return (_hull(kept),)
    return tuple(kept) or (NOTHING,)


def _hull(bands: Iterable[Band]) -> Band:
    """The smallest band around all of them."""
    least, most, k_begin, k_end, q_begin, q_end, _ = zip(*bands)
    return Band(min(least), max(most), min(k_begin), max(k_end), min(q_begin), max(q_end), exact=False)


def everything(q, k):
    return q == q


def causal(q, k):
    return q >= k


def within_window(q, k, window):
    return (q >= k) & (q - k < window)


def is_sink_token(q, k, n):
    return k < n


FULL = Mask(everything, bands=[Band(exact=True)])
"""Every query attends to every key."""

CAUSAL = Mask(causal, bands=[Band(least=0, exact=True)])
"""A query attends to its own position and those before it."""


@functools.lru_cache(maxsize=256)
def sliding_window(window: int) -> Mask:
    """The last `window` keys, the query's own position included (Longformer, https://arxiv.org/abs/2004.05150)."""
    if window < 1:
        raise ValueError(f"window {window} shows a query nothing: 1 (the query itself) is the least")
    return Mask(within_window, window, bands=[Band(least=0, most=window - 1, exact=True)])


@functools.lru_cache(maxsize=256)
def sink_tokens(n: int) -> Mask:
    """The first `n` keys, for every query, even one before them (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Meant for composition: `CAUSAL & (sliding_window(256) | sink_tokens(4))`.
    """
    if n < 0:
        raise ValueError(f"sink_tokens takes 0 or more, not {n}")
    return Mask(is_sink_token, n, bands=[Band(k_end=n, exact=True)])


def segment_ids(cu_seqlens: torch.Tensor, T: int) -> torch.Tensor:
    """Segment ids (1, T) int32 of documents packed end to end in one row.

    cu_seqlens (n + 1,): where each document begins and the last one ends, as in [0, 30, 31, 70]. What lies behind the
    last document, the padding, is a segment of its own.
    """
    positions = torch.arange(T, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    return torch.searchsorted(ends, positions, right=True).to(torch.int32)[None]

"""What a mask is: a predicate in plain operators, compiled for tensors and for Triton, and the bands that cover it.

masks.py has the masks by name, and says how one is written.
"""

import functools
import inspect
import itertools
import linecache
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from kernels.arguments import check_integer, check_switch, check_tensors, kind
from kernels.dispatch import tl, triton

# No position reaches this far, so that a bound at FAR hides nothing. Sums of two stay within int32.
FAR = 1 << 29
# The kernels unroll over bands; a mask with more of them gets lists of tiles instead.
MAX_BANDS = 6
# Python compiles no expression of 200 parentheses in one another.
MAX_DEPTH = 150


class Band(NamedTuple):
    """The set of (q, k) with least <= q - k <= most, k_begin <= k < k_end and q_begin <= q < q_end, in positions.

    `exact` says that the mask is True in all of the band, so that tiles inside it need no predicate. Each number may
    also be an int32 tensor (B,): one for each row of the batch.
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
            _larger(self.least, other.least),
            _smaller(self.most, other.most),
            _larger(self.k_begin, other.k_begin),
            _smaller(self.k_end, other.k_end),
            _larger(self.q_begin, other.q_begin),
            _smaller(self.q_end, other.q_end),
            self.exact and other.exact,
        )

    def is_fixed(self) -> bool:
        """Whether it is the same in each row of the batch."""
        return not any(isinstance(n, torch.Tensor) for n in self)

    def is_empty(self) -> bool:
        if not self.is_fixed():
            return False  # in some row, perhaps
        return self.least > self.most or self.k_begin >= self.k_end or self.q_begin >= self.q_end

    def covers(self, other: "Band") -> bool:
        """Whether `other` adds nothing: it lies within this band, and is not exact where this one is not."""
        if not (self.is_fixed() and other.is_fixed()):
            return self.is_fixed() and self[:6] == EVERYTHING[:6] and self.exact
        return (self & other)[:6] == other[:6] and (self.exact or not other.exact)


def _larger(a, b):
    """The larger of two integers, or of integers and tensors row by row."""
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, b) if isinstance(b, torch.Tensor) else a.clamp(min=b) if b > -FAR else a
    return _larger(b, a) if isinstance(b, torch.Tensor) else max(a, b)


def _smaller(a, b):
    if isinstance(a, torch.Tensor):
        return torch.minimum(a, b) if isinstance(b, torch.Tensor) else a.clamp(max=b) if b < FAR else a
    return _smaller(b, a) if isinstance(b, torch.Tensor) else min(a, b)


EVERYTHING = Band()
NOTHING = Band(k_begin=0, k_end=0)


class _Predicate(NamedTuple):
    """A predicate with all its parameters in one tuple, f(q, k, params): for tensors, and for Triton (None without)."""

    python: Callable
    triton: object | None


class Constant(int):
    """An integer written into the predicate's text: dividing by it is cheap, but each value compiles anew."""

    def __new__(cls, n: int):
        check_integer("n", n, -FAR, FAR, f"between -{FAR} and {FAR}")
        return super().__new__(cls, n)


class Table:
    """Integers for a predicate to look up: `lookup(table, i)`.

    A custom operator takes no objects: a table reaches it as its number, and is kept, once for each content, for as
    long as the process lives.
    """

    def __init__(self, values: Iterable[int]):
        values = tuple(values) if isinstance(values, Iterable) and not isinstance(values, torch.Tensor) else (values,)
        if not all(type(n) is int and -(2**31) <= n < 2**31 for n in values):
            raise TypeError(f"a Table takes values in a list, each an int of 32 bits, not {kind(values)}")
        self.number = _TABLE_NUMBERS.setdefault(values, len(_TABLE_NUMBERS))
        if self.number == len(_TABLES):
            # Its length comes first, so that both ways to look something up know where it ends.
            _TABLES.append(torch.tensor((len(values), *values), dtype=torch.int32))

    def __repr__(self) -> str:
        return f"Table {self.number}"


_TABLES: list[torch.Tensor] = []
_TABLE_NUMBERS: dict[tuple[int, ...], int] = {}


def lookup(table, i):
    """The table's value at i, 0 where it has none."""
    inside = (i >= 0) & (i < table.shape[0] - 1)
    return torch.where(inside, table[torch.where(inside, i + 1, 0)], 0)


if triton is not None:

    @triton.jit
    def _lookup_in_triton(table, i):
        return tl.load(table + 1 + i, mask=(i >= 0) & (i < tl.load(table)), other=0)


# An integer beyond FAR stands for something else: a table by its number, or, in a band, a tensor by its place.
STANDS_FOR = FAR + 1


@functools.lru_cache(maxsize=256)
def _table_on(number: int, device: torch.device) -> torch.Tensor:
    return _TABLES[number].to(device)


def with_tables(ints: Iterable[int], device: torch.device) -> tuple:
    """A mask's integers as its predicate takes them: with tables for the numbers that stand for them."""
    return tuple(_table_on(n - STANDS_FOR, device) if n > FAR else n for n in ints)


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
    params  what fn takes after q and k: Python integers, int32 tensors of shape (B,), one value for each row of the
            batch, a `Table` for fn to look things up in, or a `Constant`.
    bands   where the mask may be True: see `Band`. Tiles outside them are not visited. None: anywhere, and indexed.
    indexed which tiles to visit is found out by evaluating fn within the bands, once for each pair of lengths.

    Raises TypeError for parameters of another kind, ValueError for numbers that no position reaches.
    """

    def __init__(self, fn: Callable, *params, bands: Iterable[Band] | None = None, indexed: bool = False):
        check_switch("indexed", indexed)
        indexed = indexed or bands is None
        bands = (EVERYTHING,) if bands is None else _checked_bands(bands)
        for param in params:
            _check_param("params", param)
        slots, kept = "", []
        for param in params:
            slots += f", {param:d}" if isinstance(param, Constant) else f", {{{len(kept)}}}"
            kept += [] if isinstance(param, Constant) else [param]
        self._build(f"{_register_leaf(fn)}(q, k{slots})", tuple(kept), bands, indexed, 0)

    @classmethod
    def _combine(cls, left: "Mask", operator: str, right: "Mask") -> "Mask":
        if not isinstance(right, Mask):
            return NotImplemented
        rows = left.tensors + right.tensors
        if any((row.shape, row.device) != (rows[0].shape, rows[0].device) for row in rows):
            raise ValueError("the tensors of two masks that are joined are of one length and on one device")
        depth = 1 + max(left.depth, right.depth)
        if depth > MAX_DEPTH:
            raise ValueError(
                f"a mask of more than {MAX_DEPTH} parts joined one after another: join them in pairs, or say it as "
                "masks.global_tokens, masks.block_sparse or one predicate"
            )
        mask = cls.__new__(cls)
        bands = [a & b for a in left.bands for b in right.bands] if operator == "&" else left.bands + right.bands
        # The right side's parameters come after the left side's.
        shift = len(left.params)
        moved = right._template.format(*(f"{{{i + shift}}}" for i in range(len(right.params))))
        indexed = left.indexed or right.indexed
        template = f"({left._template} {operator} {moved})"
        mask._build(template, left.params + right.params, tuple(bands), indexed, depth)
        return mask

    def _build(self, template: str, params: tuple, bands: tuple[Band, ...], indexed: bool, depth: int) -> None:
        """template: the mask's expression with numbered holes where its parameters go; depth: of its parentheses."""
        self._template, self.depth = template, depth
        self.params = params
        bands = _simplify(bands)
        # Whether the kernels take lists of tiles, which the predicate gives, and not the bands.
        self.indexed = (indexed and not bands[0].is_empty()) or len(bands) > MAX_BANDS
        self.bands = (_hull(bands),) if len(bands) > MAX_BANDS else bands
        self.ints = tuple(p.number + STANDS_FOR if isinstance(p, Table) else p for p in params if not _is_row(p))
        rows = [p for p in params if _is_row(p)]
        numbers = [_place_among(rows, n) if _is_row(n) else int(n) for band in self.bands for n in band]
        self.tensors = tuple(rows)
        # What a custom operator gets of the mask beside its key: the bands, then the integers.
        self.operands = tuple(numbers) + self.ints
        # Every query sees the key at its own position, if there is one: a row of such a mask is never empty.
        self.shows_itself = any(
            b.is_fixed() and b.exact and b.least <= 0 <= b.most and b[2:6] == EVERYTHING[2:6] for b in self.bands
        )
        self.dense_cache: dict = {}
        # In the predicate's one tuple the integers come first, then the values of the row.
        ints, places = itertools.count(), itertools.count(len(self.ints))
        order = [next(places if _is_row(p) else ints) for p in params]
        self.key = template.format(*(f"p[{n}]" for n in order))
        if self.key not in _PREDICATES:
            _PREDICATES[self.key] = _compile(self.key)

    def __and__(self, other: "Mask") -> "Mask":
        return Mask._combine(self, "&", other)

    def __or__(self, other: "Mask") -> "Mask":
        return Mask._combine(self, "|", other)

    def __deepcopy__(self, memo) -> "Mask":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"Mask({self._template.format(*self.params)})"

    def visible(self, q, k):
        """The predicate on tensors of positions that broadcast against (B, H, Tq, Tk); a bool tensor of that kind."""
        return evaluate(self.key, q, k, self.ints, self.tensors)

    def dense(self, Tq: int, Tk: int, device="cpu") -> torch.Tensor:
        """The whole mask as a bool tensor (1 or B, 1, Tq, Tk)."""
        q = torch.arange(Tk - Tq, Tk, device=device, dtype=torch.int32)[:, None]
        k = torch.arange(Tk, device=device, dtype=torch.int32)[None, :]
        visible = self.visible(q, k)
        batch = visible.shape[0] if visible.ndim == 4 else 1
        return visible.expand(batch, 1, Tq, Tk)


def evaluate(key: str, q: torch.Tensor, k: torch.Tensor, ints: Iterable[int], rows: Iterable[torch.Tensor]):
    """The predicate of `key` on tensors of positions that broadcast against (B, H, Tq, Tk); a bool tensor alike."""
    params = with_tables(ints, q.device) + tuple(row.view(-1, 1, 1, 1) for row in rows)
    return _PREDICATES[key].python(q, k, params)


def _checked_bands(bands: Iterable[Band]) -> tuple[Band, ...]:
    if isinstance(bands, Iterable) and not isinstance(bands, torch.Tensor):
        bands = tuple(bands)
        if all(isinstance(band, Band) for band in bands):
            for band in bands:
                check_switch("exact in bands", band.exact)
                for n in band[:6]:
                    _check_param("bands", n)
            return bands
    raise TypeError(f"bands are Bands in a list, or None, not {kind(bands)}")


def _check_param(where: str, n) -> None:
    """Raise for what cannot be a number of a mask or of its bands."""
    if isinstance(n, torch.Tensor):
        check_tensors(**{where: n})
        if n.dtype != torch.int32 or n.ndim != 1:
            raise TypeError(
                f"a mask takes integers and int32 tensors of shape (B,) in its {where}, not {n.dtype} of "
                f"{tuple(n.shape)}"
            )
    elif isinstance(n, bool) or not isinstance(n, int | Table):
        raise TypeError(f"a mask takes integers and int32 tensors of shape (B,) in its {where}, not {kind(n)}")
    elif isinstance(n, int) and not -FAR <= n <= FAR:
        check_integer(where, n, -FAR, FAR, f"between -{FAR} and {FAR}")


def _is_row(x) -> bool:
    return isinstance(x, torch.Tensor)


def _place_among(rows: list[torch.Tensor], row: torch.Tensor) -> int:
    """The number that stands for a tensor in a band; it joins the mask's tensors if it is not one of them."""
    for place, other in enumerate(rows):
        if other is row:
            return place + STANDS_FOR
    rows.append(row)
    return len(rows) - 1 + STANDS_FOR


def _register_leaf(fn: Callable) -> str:
    """The name under which a predicate is known: its own, with a number after it where another one has that name."""
    if not inspect.isfunction(getattr(fn, "fn", fn)):
        raise TypeError(f"a mask's predicate fn is a function written in Python, not {kind(fn)}")
    name = fn.__name__
    if not name.isidentifier():
        raise ValueError("a mask's predicate fn is a named function: Triton reads its source, so a lambda will not do")
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

    def build(namespace: dict) -> Callable:
        exec(code, namespace)
        return namespace["mask"]

    names = {name for name in code.co_consts[0].co_names if name in _LEAVES}
    plain = {name: getattr(_LEAVES[name], "fn", _LEAVES[name]) for name in names}
    if triton is None:
        return _Predicate(build(plain), None)
    # Triton asks where a function is from. torch.compile would look for the leaves there, so it must not be told.
    jitted = {"__name__": __name__, "tl": tl} | {name: _jitted(_LEAVES[name]) for name in names}
    return _Predicate(build(plain), triton.jit(build(jitted)))


@functools.cache
def _jitted(fn: Callable):
    if hasattr(fn, "fn"):
        return fn
    own = {name: _lookup_in_triton if value is lookup else value for name, value in fn.__globals__.items()}
    if not any(value is tl for value in own.values()):
        own["tl"] = tl  # the interpreter insists on `triton.language` among a function's globals
    return triton.jit(types.FunctionType(fn.__code__, own, fn.__name__, fn.__defaults__, fn.__closure__))


def _simplify(bands: tuple[Band, ...]) -> tuple[Band, ...]:
    """Leave out empty bands and those that another one covers."""
    kept: list[Band] = []
    for band in bands:
        if band.is_empty() or any(other.covers(band) for other in kept):
            continue
        kept = [other for other in kept if not band.covers(other)]
        kept.append(band)
    return tuple(kept) or (NOTHING,)


def _hull(bands: Iterable[Band]) -> Band:
    """The smallest band around all of them; as wide as can be where they differ from row to row."""
    fixed = [band._replace(**_without_rows(band)) for band in bands]
    least, most, k_begin, k_end, q_begin, q_end, _ = zip(*fixed)
    return Band(min(least), max(most), min(k_begin), max(k_end), min(q_begin), max(q_end), exact=False)


def _without_rows(band: Band) -> dict[str, int]:
    """The fields of a band that differ from row to row, with no bound in their place."""
    return {name: getattr(EVERYTHING, name) for name, n in band._asdict().items() if _is_row(n)}

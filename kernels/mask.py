"""The Mask class: a predicate compiled for tensors and for Triton, and the bands of positions where it may be True.

masks.py has the named masks and explains how to write one.
"""

import functools
import inspect
import itertools
import linecache
import re
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from kernels.arguments import check_integer, check_switch, check_tensors, kind
from kernels.dispatch import tl, triton

# Larger than any position, so a bound at FAR hides nothing. The sum of two fits into int32.
FAR = 1 << 29
# Integers from here on are references: to table n, or in a band to the n-th tensor of the mask.
REFERENCE = FAR + 1
# The kernels unroll over bands; a mask with more bands gets lists of tiles instead.
MAX_BANDS = 6
# Python cannot compile an expression with 200 nested parentheses.
MAX_DEPTH = 150


class Band(NamedTuple):
    """The set of (q, k) with least <= q - k <= most, k_begin <= k < k_end and q_begin <= q < q_end, in positions.

    `exact`: the mask is True in the whole band, so tiles inside it need no predicate. Each number may also be an int32
    tensor (B,), with one value for each row of the batch.
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
            larger(self.least, other.least),
            smaller(self.most, other.most),
            larger(self.k_begin, other.k_begin),
            smaller(self.k_end, other.k_end),
            larger(self.q_begin, other.q_begin),
            smaller(self.q_end, other.q_end),
            self.exact and other.exact,
        )

    def is_fixed(self) -> bool:
        """Say whether the band is the same in each row of the batch."""
        return not any(isinstance(n, torch.Tensor) for n in self)

    def is_empty(self) -> bool:
        if not self.is_fixed():
            return False  # perhaps not in every row
        return self.least > self.most or self.k_begin >= self.k_end or self.q_begin >= self.q_end

    def covers(self, other: "Band") -> bool:
        """Say whether `other` adds nothing: it lies in this band, and is not exact unless this one is."""
        if not (self.is_fixed() and other.is_fixed()):
            return self.is_fixed() and self[:6] == EVERYTHING[:6] and self.exact
        return (self & other)[:6] == other[:6] and (self.exact or not other.exact)


def larger(a, b):
    """Return the larger of two integers or tensors, elementwise."""
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, b) if isinstance(b, torch.Tensor) else a.clamp(min=b) if b > -FAR else a
    return larger(b, a) if isinstance(b, torch.Tensor) else max(a, b)


def smaller(a, b):
    """Return the smaller of two integers or tensors, elementwise."""
    if isinstance(a, torch.Tensor):
        return torch.minimum(a, b) if isinstance(b, torch.Tensor) else a.clamp(max=b) if b < FAR else a
    return smaller(b, a) if isinstance(b, torch.Tensor) else min(a, b)


EVERYTHING = Band()
NOTHING = Band(k_begin=0, k_end=0)
BAND = len(Band._fields)  # the stride of a flat list of bands: numbers in each


class _Predicate(NamedTuple):
    """A compiled predicate f(q, k, params), params being one tuple: for tensors, and for Triton (None without it)."""

    python: Callable
    triton: object | None


class Constant(int):
    """An integer written into the predicate's source: division by it is cheap, but each value compiles again."""

    def __new__(cls, n: int):
        check_integer("n", n, -FAR, FAR, f"between -{FAR} and {FAR}")
        return super().__new__(cls, n)


class Table:
    """Integers that a predicate reads with `lookup(table, i)`.

    A custom operator takes no objects but the table's number, so each distinct table is kept until the process ends.
    """

    def __init__(self, values: Iterable[int]):
        values = tuple(values) if isinstance(values, Iterable) and not isinstance(values, torch.Tensor) else (values,)
        if not all(type(n) is int and -(2**31) <= n < 2**31 for n in values):
            raise TypeError(f"values of a Table must be a list of 32-bit ints, not {kind(values)}")
        self.number = _TABLE_NUMBERS.setdefault(values, len(_TABLE_NUMBERS))
        if self.number == len(_TABLES):
            # The length comes first: `lookup` needs it in Triton, where a table is a pointer.
            _TABLES.append(torch.tensor((len(values), *values), dtype=torch.int32))

    def __repr__(self) -> str:
        return f"Table {self.number}"


_TABLES: list[torch.Tensor] = []
_TABLE_NUMBERS: dict[tuple[int, ...], int] = {}


def lookup(table, i):
    """Return the table's value at i, or 0 if i is outside the table."""
    inside = (i >= 0) & (i < table.shape[0] - 1)
    return torch.where(inside, table[torch.where(inside, i + 1, 0)], 0)


if triton is not None:

    @triton.jit
    def _lookup_in_triton(table, i):
        return tl.load(table + 1 + i, mask=(i >= 0) & (i < tl.load(table)), other=0)


@functools.lru_cache(maxsize=256)
def _table_on(number: int, device: torch.device) -> torch.Tensor:
    return _TABLES[number].to(device)


def with_tables(ints: Iterable[int], device: torch.device) -> tuple:
    """Return a mask's integers as its predicate takes them: with tables in place of references."""
    return tuple(_table_on(n - REFERENCE, device) if n >= REFERENCE else n for n in ints)


def bands_of(numbers: Iterable[int], rows: Iterable[torch.Tensor]) -> tuple[Band, ...]:
    """Rebuild bands from a flat list of their numbers, with tensors in place of references."""
    numbers = [rows[n - REFERENCE] if n >= REFERENCE else n for n in numbers]
    return tuple(Band(*numbers[i : i + BAND]) for i in range(0, len(numbers), BAND))


_RESERVED = {"mask", "q", "k", "p", "tl"}  # names that the compiled function uses itself
_LEAVES: dict[str, Callable] = {}  # name -> a user's or a built-in predicate, f(q, k, *params)
_PREDICATES: dict[str, _Predicate] = {}  # a mask's key -> its compiled predicate


def predicate(key: str) -> _Predicate:
    """Return the compiled predicate of the masks with this key."""
    return _PREDICATES[key]


class Mask:
    """Which keys each query may attend to.

    fn      f(q, k, *params) -> bool, in the operators that integers, tensors and Triton share (+ - * // % & | ~ and
            comparisons), for broadcasting blocks of int32 positions. May be decorated with `triton.jit`. For negative
            numbers, Triton's // and % round towards 0, Python's round down.
    params  fn's arguments after q and k: Python integers, int32 tensors (B,) with one value for each row of the batch,
            a `Table` or a `Constant`.
    bands   where the mask may be True: see `Band`. Tiles outside are not visited. None: anywhere, and indexed.
    indexed find the tiles to visit by evaluating fn within the bands, once for each pair of lengths.

    Raises TypeError for parameters of another type, ValueError for numbers beyond any position.
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
    def from_operands(
        cls, key: str, indexed: bool, bands: Iterable[int], ints: Iterable[int], rows: Iterable[torch.Tensor]
    ) -> "Mask":
        """Rebuild a mask from its `operands`. bands: flat; ints, rows: the predicate's parameters."""
        mask = cls.__new__(cls)
        mask._build(re.sub(r"p\[(\d+)\]", r"{\1}", key), (*ints, *rows), bands_of(bands, rows), indexed, 0)
        # Unknown here: `attention` takes the path that is safe for any mask, and gives the same bits as ever.
        mask.shows_itself = False
        return mask

    def of_rows(self, begin: int, end: int) -> "Mask":
        """Return the mask of rows begin to end - 1 of the batch."""
        if not self.tensors:
            return self
        return Mask.from_operands(*self.operands[:4], [row[begin:end] for row in self.tensors])

    @classmethod
    def _combine(cls, left: "Mask", operator: str, right: "Mask") -> "Mask":
        if not isinstance(right, Mask):
            return NotImplemented
        rows = left.tensors + right.tensors
        if any((row.shape, row.device) != (rows[0].shape, rows[0].device) for row in rows):
            raise ValueError("the tensors of two combined masks must have one length and be on one device")
        depth = 1 + max(left.depth, right.depth)
        if depth > MAX_DEPTH:
            raise ValueError(
                f"a mask of more than {MAX_DEPTH} parts combined one after another: combine them in pairs, or use "
                "masks.global_tokens, masks.block_sparse or a single predicate"
            )
        bands = [a & b for a in left.bands for b in right.bands] if operator == "&" else left.bands + right.bands
        # The right side's parameters follow the left side's.
        shift = len(left.params)
        moved = right._template.format(*(f"{{{i + shift}}}" for i in range(len(right.params))))
        template = f"({left._template} {operator} {moved})"
        mask = cls.__new__(cls)
        mask._build(template, left.params + right.params, bands, left.indexed or right.indexed, depth)
        return mask

    def _build(self, template: str, params: tuple, bands: Iterable[Band], indexed: bool, depth: int) -> None:
        """Fill in a new mask. template: its expression, with {n} for parameter n; depth: of nested parentheses."""
        self._template, self.params, self.depth = template, params, depth
        bands = _simplify(bands)
        # Indexed: the kernels take lists of tiles, found with the predicate, instead of the bands.
        self.indexed = (indexed and not bands[0].is_empty()) or len(bands) > MAX_BANDS
        self.bands = (_hull(bands),) if len(bands) > MAX_BANDS else bands
        self.ints = tuple(p.number + REFERENCE if isinstance(p, Table) else p for p in params if not _is_row(p))
        numbers = [*itertools.chain(*self.bands)]
        rows = {id(n): n for n in (*params, *numbers) if _is_row(n)}
        self.tensors, places = tuple(rows.values()), {row: i for i, row in enumerate(rows)}
        # Every query sees the key at its own position, so no row of the mask is empty.
        self.shows_itself = any(
            b.is_fixed() and b.exact and b.least <= 0 <= b.most and b[2:6] == EVERYTHING[2:6] for b in self.bands
        )
        self.dense_cache: dict = {}
        # The predicate takes one tuple: the integers, then the values of the row.
        ints = itertools.count()
        order = [len(self.ints) + places[id(p)] if _is_row(p) else next(ints) for p in params]
        self.key = template.format(*(f"p[{n}]" for n in order))
        if self.key not in _PREDICATES:
            _PREDICATES[self.key] = _compile(self.key)
        # What a custom operator gets, as it takes no objects: see from_operands.
        flat = tuple(REFERENCE + places[id(n)] if _is_row(n) else int(n) for n in numbers)
        self.operands = self.key, self.indexed, flat, self.ints, self.tensors

    def __and__(self, other: "Mask") -> "Mask":
        return Mask._combine(self, "&", other)

    def __or__(self, other: "Mask") -> "Mask":
        return Mask._combine(self, "|", other)

    def __deepcopy__(self, memo) -> "Mask":
        return self  # immutable

    def __repr__(self) -> str:
        return f"Mask({self._template.format(*self.params)})"

    def visible(self, q, k):
        """Evaluate the mask on tensors of positions: see `evaluate`."""
        return evaluate(self.key, q, k, self.ints, self.tensors)

    def dense(self, Tq: int, Tk: int, device="cpu") -> torch.Tensor:
        """Return the whole mask as a bool tensor (1 or B, 1, Tq, Tk)."""
        q = torch.arange(Tk - Tq, Tk, device=device, dtype=torch.int32)[:, None]
        k = torch.arange(Tk, device=device, dtype=torch.int32)[None, :]
        visible = self.visible(q, k)
        batch = visible.shape[0] if visible.ndim == 4 else 1
        return visible.expand(batch, 1, Tq, Tk)


def evaluate(key: str, q: torch.Tensor, k: torch.Tensor, ints: Iterable[int], rows: Iterable[torch.Tensor]):
    """Evaluate the predicate of `key` on positions that broadcast against (B, H, Tq, Tk), to a bool tensor alike."""
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
    raise TypeError(f"bands must be a list of Bands or None, not {kind(bands)}")


def _check_param(where: str, n) -> None:
    """Raise unless n can be a parameter of a mask or a number of a band."""
    if isinstance(n, torch.Tensor):
        check_tensors(**{where: n})
        if n.dtype != torch.int32 or n.ndim != 1:
            raise TypeError(
                f"{where} of a mask must be integers and int32 tensors of shape (B,), not {n.dtype} of {tuple(n.shape)}"
            )
    elif isinstance(n, bool) or not isinstance(n, int | Table):
        raise TypeError(f"{where} of a mask must be integers and int32 tensors of shape (B,), not {kind(n)}")
    elif isinstance(n, int) and not -FAR <= n <= FAR:
        check_integer(where, n, -FAR, FAR, f"between -{FAR} and {FAR}")


def _is_row(x) -> bool:
    return isinstance(x, torch.Tensor)


def _register_leaf(fn: Callable) -> str:
    """Register a predicate and return its name, with a number appended if another predicate has that name."""
    if not inspect.isfunction(getattr(fn, "fn", fn)):
        raise TypeError(f"a mask's predicate fn must be a Python function, not {kind(fn)}")
    name = fn.__name__
    if not name.isidentifier():
        raise ValueError("a mask's predicate fn must be a named function, not a lambda: Triton reads its source")
    n = 1
    unique = name
    while unique in _RESERVED or _LEAVES.setdefault(unique, fn) is not fn:
        n += 1
        unique = f"{name}_{n}"
    return unique


def _compile(expression: str) -> _Predicate:
    """Compile `def mask(q, k, p): return <expression>` for tensors and, if it is installed, for Triton.

    Triton reads a function's source with `inspect`, which looks in `linecache`.
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
    # Triton needs __name__, but torch.compile would search that module for the leaves: `plain` has none.
    jitted = {"__name__": __name__, "tl": tl} | {name: _jitted(_LEAVES[name]) for name in names}
    return _Predicate(build(plain), triton.jit(build(jitted)))


@functools.cache
def _jitted(fn: Callable):
    if hasattr(fn, "fn"):
        return fn
    own = {name: _lookup_in_triton if value is lookup else value for name, value in fn.__globals__.items()}
    if not any(value is tl for value in own.values()):
        own["tl"] = tl  # the interpreter requires `triton.language` among a function's globals
    return triton.jit(types.FunctionType(fn.__code__, own, fn.__name__, fn.__defaults__, fn.__closure__))


def _simplify(bands: Iterable[Band]) -> tuple[Band, ...]:
    """Drop empty bands and bands that another one covers."""
    kept: list[Band] = []
    for band in bands:
        if band.is_empty() or any(other.covers(band) for other in kept):
            continue
        kept = [other for other in kept if not band.covers(other)]
        kept.append(band)
    return tuple(kept) or (NOTHING,)


def _hull(bands: Iterable[Band]) -> Band:
    """Return the smallest band around all bands, unbounded where a bound differs from row to row."""
    fixed = [[wide if _is_row(n) else n for n, wide in zip(band, EVERYTHING)] for band in bands]
    least, most, k_begin, k_end, q_begin, q_end, _ = zip(*fixed)
    return Band(min(least), max(most), min(k_begin), max(k_end), min(q_begin), max(q_end), exact=False)

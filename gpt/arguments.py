"""Check options and arguments against the annotations of their fields and parameters."""

import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from gpt.errors import UserError
from gpt.option import check_bounds, check_contradictions, rules_of

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
MANY = {int: "whole numbers", float: "numbers", str: "texts"}
MAX_PATH = 4096  # bytes; the highest limit of any system


class _Misfit(Exception):
    """The annotation does not allow the value."""


def check_fields(options: Any, kind: type | None = None) -> None:
    """Raise UserError unless each field of a dataclass fits its annotation and its rules.

    A path may be given as text and a tuple as a list: they are converted. kind: the class whose annotations count, if
    it is another one.
    """
    hints = _hints(kind or type(options))
    for f in fields(options):
        value = fit_argument(f.name, getattr(options, f.name), hints[f.name])
        object.__setattr__(options, f.name, value)
        rules = rules_of(f)
        limit = 1 << (63 if rules.is_wide else 31)
        if type(value) is int and abs(value) >= limit:
            raise UserError(f"{f.name} must be below {limit}, not {shown(value)}")
        if type(value) is float and not math.isfinite(value):
            raise UserError(f"{f.name} must be a finite number, not {value}")
        if value is not None:
            check_bounds(f.name, value, rules)
    check_contradictions(options)


def checked(function: Callable) -> Callable:
    """Decorate a function to raise UserError for an argument that does not fit its annotation."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # for Python's own message, which names the function
        hints = _hints(function)
        for name, value in given.arguments.items():
            given.arguments[name] = fit_argument(name, value, hints.get(name, Any))
        return function(*given.args, **given.kwargs)

    return wrapped


def shown(value: Any) -> str:
    """Write a value for a message, in a few words on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "a much longer number"  # Python refuses to print it
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:  # __repr__ is the caller's code and may raise anything
        return f"a value of type {kind}"
    is_short = len(text) <= 40 and text.isprintable() and " at 0x" not in text
    return f"the {kind} {text}" if is_short else f"a value of type {kind}"


_hints = functools.cache(get_type_hints)


def fit_argument(name: str, value: Any, hint: Any) -> Any:
    """Convert the value to its annotation. Raises UserError, starting with the name, if the annotation forbids it."""
    if isinstance(value, str | Path) and Path in (hint, *get_args(hint)):
        _check_path(name, str(value))
    try:
        return _fit(value, hint)
    except _Misfit:
        rule = _rule(hint)
        lone = ": for a single text write [text]" if isinstance(value, str) and "texts" in rule else ""
        raise UserError(f"{name} must be {rule}, not {shown(value)}{lone}") from None


def _check_path(name: str, path: str) -> None:
    if not path:
        raise UserError(f"{name} is empty: give a path")  # Path("") is the working directory
    if "\0" in path:
        raise UserError(f"{name} {shown(path)} contains a NUL, which no path can contain")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError:
        raise UserError(f"{name} {shown(path)} contains a character that no path can contain") from None
    if size >= MAX_PATH:
        raise UserError(f"{name} {shown(path)} is longer than any path can be")


def _fit(value: Any, hint: Any) -> Any:
    """Convert the value to its annotation. Raises _Misfit if the annotation does not allow it."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for one in get_args(hint):
            try:
                return _fit(value, one)
            except _Misfit:
                continue
        raise _Misfit
    if origin is Literal:
        return _if(isinstance(value, str) and value in get_args(hint), value)
    if hint is bool:
        return _if(isinstance(value, bool), value)
    if hint is str:
        return str(_if(isinstance(value, str), value))  # also converts numpy.str_
    if hint in (int, float):
        kinds = (int, np.integer) if hint is int else (int, float, np.integer, np.floating)
        _if(isinstance(value, kinds) and not isinstance(value, bool), value)
        try:
            return hint(value)
        except OverflowError:  # an integer beyond every float
            raise _Misfit from None
    if hint is Path:
        return Path(_if(isinstance(value, str | Path), value))
    if origin is not None and issubclass(origin, Mapping):
        _if(isinstance(value, Mapping), value)
        key, item = get_args(hint)
        return {_fit(k, key): _fit(v, item) for k, v in value.items()}
    if origin is tuple and get_args(hint)[-1] is not ...:
        _if(isinstance(value, list | tuple) and len(value) == len(get_args(hint)), value)
        return tuple(map(_fit, value, get_args(hint)))
    if origin is not None and issubclass(origin, Iterable):
        return _fit_items(value, origin, get_args(hint)[0])
    return _if(isinstance(getattr(value, "_orig_mod", value), hint), value)  # a compiled model wraps the original


def _fit_items(value: Any, origin: type, item: Any) -> Any:
    """Convert to a tuple of converted items. An iterator is returned as it is if the annotation is Iterable."""
    _if(not isinstance(value, str | bytes | bytearray | Mapping), value)
    try:
        items = iter(value)
    except TypeError:
        raise _Misfit from None
    if origin is Iterable and not isinstance(value, Collection):
        return value
    return tuple(_fit(each, item) for each in items)


def _if(condition: bool, value: Any) -> Any:
    if not condition:
        raise _Misfit
    return value


def _rule(hint: Any) -> str:
    """Describe what an annotation allows."""
    origin, parts = get_origin(hint), [part for part in get_args(hint) if part is not ...]
    if hint in NAMES:
        return NAMES[hint]
    if hint is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_rule, parts)))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping from {} to {}".format(*map(_rule, parts))
    if origin is tuple and get_args(hint)[-1] is not ...:
        return f"a tuple ({', '.join(map(_rule, parts))})"
    if origin is not None and issubclass(origin, Iterable):
        return f"a list of {_several(parts[0])}"
    return f"a {hint.__name__}"


def _several(hint: Any) -> str:
    """Describe several values of an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_several, get_args(hint)))
    return MANY.get(hint) or f"{_rule(hint).removeprefix('a ').replace('tuple ', 'tuples ')}"

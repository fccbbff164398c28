"""Flags into a dataclass of options: suggestions for a wrong one, help, and text in UTF-8 whatever the locale."""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import itertools
import re
import textwrap
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import tyro

from gpt.errors import UserError
from gpt.files import decoded

T = TypeVar("T")

# Options that hold a path, or a name that may be one; with `run`, the first word of gpt.evaluate.
PATHS = ("corpus", "cache_dir", "run_dir", "init_from", "resume_from")
# Options whose value may be nothing.
MAY_BE_EMPTY = ("prompt", "stop", "stop_tokens", "logit_bias", "sample_prompt")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), [k.replace("-", "_") for k in known], n=1)
    return f"; did you mean {'--' + near[0].replace('_', '-') if word.startswith('-') else near[0]!r}?" if near else ""


def flag_names(kind: type) -> list[str]:
    """Every flag of a dataclass of dataclasses, with underscores."""
    names = []
    for f in fields(kind):
        names += [inner.name for inner in fields(f.default_factory)] if is_dataclass(f.default_factory) else [f.name]
    return names


def checked_words(argv: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    """The command line with its texts in UTF-8, whatever the locale; paths stay as the system has them.

    kinds: type of each option. Raises UserError for an empty value, and for a text that is not UTF-8.
    """
    words, option = [], None
    for word in argv:
        name, is_joined, value = word.partition("=")
        if word.startswith("--"):
            option = name[2:].replace("-", "_")
            if not is_joined:
                words.append(word)
                continue
        else:
            name, value = option and "--" + option.replace("_", "-"), word
        if not value.strip() and option not in MAY_BE_EMPTY:
            raise UserError(f"{name or 'an argument'} is empty: give it a value, or leave it out")
        if option in kinds and option not in PATHS and str in _parts(kinds[option]):
            value = _text(value, name)
        words.append(f"{name}={value}" if word.startswith("--") else value)
        if option != "corpus":  # which takes several
            option = None
    return words


def _parts(kind: Any) -> set[Any]:
    """The types that a type is made of."""
    return {kind}.union(*map(_parts, typing.get_args(kind)))


def _text(word: str, name: str) -> str:
    try:
        return word if word.isascii() else decoded(word).encode().decode()
    except UnicodeError:
        raise UserError(f"{name} is not valid UTF-8: {word!a}") from None


@functools.cache
def join_help_lines(kind: type) -> None:
    """Give tyro each field's docstring as one paragraph; on its own it keeps the source's line breaks."""
    for inner in (f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)):
        join_help_lines(inner)
    for cls in filter(is_dataclass, kind.__mro__):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = " ".join(ast.literal_eval(after.value).split())
                hint = cls.__annotations__[field.target.id]
                cls.__annotations__[field.target.id] = typing.Annotated[hint, tyro.conf.arg(help=text)]


def option_kinds(kind: type) -> dict[str, Any]:
    """The type of each option of a dataclass of dataclasses."""
    kinds = {}
    for f in fields(kind):
        inner = is_dataclass(f.default_factory)
        kinds |= option_kinds(f.default_factory) if inner else {f.name: typing.get_type_hints(kind)[f.name]}
    return kinds


def parse_flags(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str) -> T:
    """tyro over a dataclass with flat names. Raises UserError for an unknown flag or a bad value."""
    known = flag_names(kind)
    for word in argv:
        name = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and name != "help" and name.removeprefix("no_") not in known:
            hint = did_you_mean(word.split("=")[0], known)
            raise UserError(f"{word.split('=')[0]} is not an option of {prog}{hint} ({prog} --help lists them)")
    argv = checked_words(argv, option_kinds(kind))
    join_help_lines(kind)
    extra = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=list(argv), prog=prog, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws its message as a box: a title, the message, a rule, help.
        lines = [line.strip(" │") for line in box.getvalue().splitlines()[1:]]
        message = " ".join(itertools.takewhile(lambda line: line.strip("─╰╯"), lines))
        message = re.sub(r"^Error parsing (?=[^-])\w+: ", "", message)  # a dataclass's own sentence needs no preface
        raise UserError(message or "the command line is wrong") from stop

"""Parse flags into a dataclass of options: help, suggestions for a misspelled flag, UTF-8 text in any locale."""

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
from gpt.option import Option, Rules, options_of

T = TypeVar("T")
POSITIONAL = Option(Any, Rules())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Write a clause that offers the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), [k.replace("-", "_") for k in known], n=1)
    return f"; did you mean {'--' + near[0].replace('_', '-') if word.startswith('-') else near[0]!r}?" if near else ""


def flag(name: str) -> str:
    """Spell an option as a flag."""
    return "--" + name.replace("_", "-")


def checked_words(argv: Sequence[str], options: dict[str, Option]) -> list[str]:
    """Decode the texts of a command line as UTF-8, whatever the locale; leave paths as the system has them.

    Raises UserError for an empty value, and for a text that is not UTF-8.
    """
    words, name = [], None
    for word in argv:
        spelled, is_joined, value = word.partition("=")
        if word.startswith("--"):
            name = spelled[2:].replace("-", "_")
            if not is_joined:
                words.append(word)
                continue
        else:
            spelled, value = name and flag(name), word
        option = options.get(name, POSITIONAL)
        if not value.strip() and not option.rules.may_be_empty:
            raise UserError(f"{spelled or 'an argument'} is empty: give it a value, or leave it out")
        if str in option.types and not option.is_path:
            value = _text(value, spelled)
        words.append(f"{spelled}={value}" if word.startswith("--") else value)
        if not (option.is_path and typing.get_origin(option.kind) is tuple):  # the next word may be another path
            name = None
    return words


def _text(word: str, name: str) -> str:
    try:
        return word if word.isascii() else decoded(word).encode().decode()
    except UnicodeError:
        raise UserError(f"{name} is not valid UTF-8: {word!a}") from None


@functools.cache
def join_help_lines(kind: type) -> None:
    """Give tyro each field's docstring as one paragraph; tyro alone would keep the line breaks of the source."""
    for inner in (f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)):
        join_help_lines(inner)
    for cls in filter(is_dataclass, kind.__mro__):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, after in itertools.pairwise(body):
            if isinstance(after, ast.Expr):
                text = " ".join(ast.literal_eval(after.value).split())
                hint = cls.__annotations__[field.target.id]
                cls.__annotations__[field.target.id] = typing.Annotated[hint, tyro.conf.arg(help=text)]


def parse_flags(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str) -> T:
    """Parse flags into a dataclass with tyro, without prefixes. Raises UserError for an unknown flag or a bad value."""
    known = options_of(kind)
    for word in argv:
        spelled = word.split("=")[0]
        name = spelled[2:].replace("-", "_")
        if word.startswith("--") and name != "help" and name.removeprefix("no_") not in known:
            hint = did_you_mean(spelled, known)
            raise UserError(f"{spelled} is not an option of {prog}{hint} ({prog} --help lists them)")
    argv = checked_words(argv, known)
    join_help_lines(kind)
    extra = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=list(argv), prog=prog, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro prints a box: title, message, rule, help.
        lines = [line.strip(" │") for line in box.getvalue().splitlines()[1:]]
        message = " ".join(itertools.takewhile(lambda line: line.strip("─╰╯"), lines))
        message = re.sub(r"^Error parsing (?=[^-])\w+: ", "", message)  # a dataclass's own message is a sentence
        raise UserError(message or "the command line is wrong") from stop

"""Options as fields of dataclasses: each field says whatever the commands must know of its option."""

import operator
import typing
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt.errors import UserError

_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Rules:
    """What the commands must know of an option beside its type, default and help."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    is_wide: bool = False
    """the whole number may have 63 bits, like a seed, instead of 31"""
    is_path: bool = False
    """the text is a path or may be one; an option of type Path needs no mark"""
    may_be_empty: bool = False
    """an empty text is a value"""
    acts_with: tuple[str, tuple[str, ...]] | None = None
    """(option, values): the flag is refused unless this option of the same table has one of these values"""
    contradicts: tuple[str, ...] = ()
    """options of the same dataclass that cannot be given together with this one"""
    per_start: bool = False
    """it concerns one start of a run only: config.toml does not keep it"""
    per_rank: bool = False
    """the ranks of one training may have different values"""
    in_recipe: bool = False
    """checkpoints keep its value, and a resumed run reports a change of it"""


class Option(NamedTuple):
    """One option: its annotation and its rules."""

    kind: Any
    rules: Rules

    @property
    def types(self) -> set[Any]:
        """The types in its annotation."""
        return _types(self.kind)

    @property
    def is_path(self) -> bool:
        return self.rules.is_path or Path in self.types


def option(default: Any, **rules: Any) -> Any:
    """A dataclass field with a default and Rules."""
    return field(default=default, metadata={"rules": Rules(**rules)})


def rules_of(f: Field) -> Rules:
    return f.metadata.get("rules", Rules())


def options_of(kind: type) -> dict[str, Option]:
    """All options of a dataclass by name, those of its dataclass fields included."""
    options, hints = {}, typing.get_type_hints(kind)
    for f in fields(kind):
        inner = is_dataclass(f.default_factory)
        options |= options_of(f.default_factory) if inner else {f.name: Option(hints[f.name], rules_of(f))}
    return options


def marked(options: Any, mark: Callable[[Rules], Any]) -> dict[str, Any]:
    """The values of a dataclass's own options whose rules the mark accepts, by name."""
    return {f.name: getattr(options, f.name) for f in fields(options) if mark(rules_of(f))}


def check_bounds(name: str, value: float, rules: Rules) -> None:
    """Raise UserError for a number outside its option's bounds."""
    bounds = {key: bound for key in _BOUNDS if (bound := getattr(rules, key)) is not None}
    if not all(_BOUNDS[key](value, bound) for key, bound in bounds.items()):
        limits = " and ".join(f"{key.replace('_', ' ')} {bound}" for key, bound in bounds.items())
        raise UserError(f"{name} must be {limits}, not {value}")


def check_contradictions(options: Any, spelled: Callable[[str], str] = str) -> None:
    """Raise UserError for two options of a dataclass that contradict each other. spelled: how to write a name."""
    for first in fields(options):
        for second in rules_of(first).contradicts:
            if all(getattr(options, name) not in (None, False) for name in (first.name, second)):
                raise UserError(f"{spelled(first.name)} and {spelled(second)} contradict each other: give one")


def _types(kind: Any) -> set[Any]:
    return {kind}.union(*map(_types, typing.get_args(kind)))

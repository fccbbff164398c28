"""Check that an option acts: an effect changes with the option, and disappears if the program ignores the option.

A Case sets one option to another value and looks at an effect. `ignore` makes a dataclass return the base's value
whenever that field is read, as a program that ignores the option would behave. A Case whose effect does not disappear
then fails.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest


@dataclass(frozen=True)
class Case:
    """Values of one option, and the effect that shows them.

    look(observation): the effect, as plain values that == compares; every part of a tuple must change.
    right(base's effect, changed effect, value): whether both are right; None requires only that they differ.
    others: options of the base and of the changed program.
    """

    name: str
    values: tuple[Any, ...]
    look: Callable[[Any], Any]
    right: Callable[..., bool] | None = None
    others: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] | None = None  # options of an earlier run in the same folder
    patch: Callable[[pytest.MonkeyPatch], None] | None = None

    def __repr__(self) -> str:
        return f"{self.name}={'|'.join(map(str, self.values))}"


def ignore(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, value: Any) -> None:
    """Make every reader of this field of a dataclass get the value, whatever was set."""
    monkeypatch.setattr(kind, name, property(lambda self: value, lambda self, given: None), raising=False)


def parts_of(look: Any) -> tuple[Any, ...]:
    return look if isinstance(look, tuple) else (look,)


def check(case: Case, base: Any, changed: list[Any], ignored: list[Any]) -> None:
    """Check the effects of a case: every value has its own, and none if the program ignores the option."""
    for value, look in zip(case.values, changed, strict=True):
        for before, after in zip(parts_of(base), parts_of(look), strict=True):
            assert before != after, f"{case.name} {value} has no effect: {after!r}"
        if case.right is not None:
            assert case.right(base, look, value), f"{case.name} {value}: {base!r} became {look!r}"
    assert all(one != other for i, one in enumerate(changed) for other in changed[:i]), f"{case.name}: {changed!r}"
    assert all(look == base for look in ignored), f"{case.name} has an effect though it is ignored: {ignored!r}"


def missing(kind: type, cases: Iterable[Case], base: dict[str, Any]) -> list[str]:
    """List fields without a case, and choices of a Literal that are neither in a case nor in the base."""
    hints, found = get_type_hints(kind), []
    for f in fields(kind):
        own = [case for case in cases if case.name == f.name]
        tried = {f.default, base.get(f.name)}.union(*((*case.values, case.others.get(f.name)) for case in own))
        found += [] if own else [f.name]
        found += [f"{f.name}={choice}" for choice in choices(hints[f.name]) if own and choice not in tried]
    return found


def choices(hint: Any) -> list[Any]:
    """List the values of a Literal, also inside a union."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in choices(part)]

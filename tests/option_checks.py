"""What shows that an option acts: an observation that changes with it, and falls back once the program is deaf to it.

A Case gives one option another value and looks at what the program did. `deaf` makes a dataclass answer with the base's
value whenever that field is read, which is what a program that ignores the option would do. So a Case whose observation
would not notice that fails itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest


@dataclass(frozen=True)
class Case:
    """One option's values beside the base's, and what of an observation shows them.

    look(observation): plain values that == compares; of a tuple every part must show the option.
    right(base's look, changed look, value): whether these are right; None where to differ is all that is asked.
    others: options of the base and of the changed program alike.
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


def deaf(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, value: Any) -> None:
    """Whoever reads this field of a dataclass gets the value, whatever the dataclass was made with."""
    monkeypatch.setattr(kind, name, property(lambda self: value, lambda self, given: None), raising=False)


def parts_of(look: Any) -> tuple[Any, ...]:
    return look if isinstance(look, tuple) else (look,)


def check(case: Case, base: Any, changed: list[Any], unheard: list[Any]) -> None:
    """The looks of a case: each value shows, each shows in its own way, and none where the program is deaf to it."""
    for value, look in zip(case.values, changed, strict=True):
        for before, after in zip(parts_of(base), parts_of(look), strict=True):
            assert before != after, f"{case.name} {value} does not show: {after!r}"
        if case.right is not None:
            assert case.right(base, look, value), f"{case.name} {value}: {base!r} became {look!r}"
    assert all(one != other for i, one in enumerate(changed) for other in changed[:i]), f"{case.name}: {changed!r}"
    assert all(look == base for look in unheard), f"{case.name} shows where the program ignores it: {unheard!r}"


def missing(kind: type, cases: Iterable[Case], base: dict[str, Any]) -> list[str]:
    """Fields of a dataclass without a case, and choices of a Literal that are neither in a case nor in the base."""
    hints, found = get_type_hints(kind), []
    for f in fields(kind):
        own = [case for case in cases if case.name == f.name]
        tried = {f.default, base.get(f.name)}.union(*((*case.values, case.others.get(f.name)) for case in own))
        found += [] if own else [f.name]
        found += [f"{f.name}={choice}" for choice in choices(hints[f.name]) if own and choice not in tried]
    return found


def choices(hint: Any) -> list[Any]:
    """The values of a Literal, also of one in a union."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in choices(part)]

"""Rules on the fields of options: bounds, contradictions, and names that must exist."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from gpt.arguments import check_fields
from gpt.config_file import TABLES
from gpt.data.inspect import Arguments as InspectArguments
from gpt.errors import UserError
from gpt.evaluation.command import Arguments as EvaluateArguments
from gpt.interop.export import Arguments as ExportArguments
from gpt.option import option, options_of, rules_of
from gpt.training.command import Arguments as TrainArguments
from sample import Arguments as SampleArguments


@dataclass(frozen=True)
class Inner:
    a: float | None = option(0.5, above=0, at_most=1)
    b: int = option(3, at_least=2, below=9, is_wide=True)
    c: bool = option(False, contradicts=("path",))
    path: str | None = option(None, is_path=True)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    folder: Path | None = None
    plain: str = ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 0}, "a must be above 0 and at most 1, not 0"),
        ({"a": 1.5}, "a must be above 0 and at most 1, not 1.5"),
        ({"b": 1}, "b must be at least 2 and below 9, not 1"),
        ({"b": 9}, "b must be at least 2 and below 9, not 9"),
        ({"b": 1 << 63}, f"b must be below {1 << 63}, not {1 << 63}"),
        ({"c": True, "path": "x"}, "c and path contradict each other: give one"),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Inner(**given)


@pytest.mark.parametrize("given", [{"a": 1}, {"a": None}, {"b": 2}, {"b": 8}, {"c": True}, {"path": "x"}])
def test_a_value_within_the_rules_is_accepted(given):
    (name, value), made = *given.items(), Inner(**given)
    assert getattr(made, name) == value


def test_options_are_listed_with_their_kinds_and_rules():
    options = options_of(Outer)
    assert list(options) == ["a", "b", "c", "path", "folder", "plain"]
    assert [name for name, each in options.items() if each.is_path] == ["path", "folder"]
    assert options["b"].kind is int and options["b"].rules.below == 9
    assert options["plain"].rules == rules_of(fields(Outer)[2])


def test_an_unknown_rule_is_an_error():
    with pytest.raises(TypeError, match="atleast"):
        option(1, atleast=1)


@pytest.mark.parametrize("kind", [*TABLES.values(), SampleArguments], ids=lambda kind: kind.__name__)
def test_rules_name_options_of_the_same_dataclass(kind):
    own = {f.name for f in fields(kind)}
    for f in fields(kind):
        others = {*rules_of(f).contradicts, *(rules_of(f).acts_with or ())[:1]}
        assert others <= own - {f.name}


@pytest.mark.parametrize(
    "kind", [TrainArguments, SampleArguments, EvaluateArguments, InspectArguments, ExportArguments]
)
def test_seeds_and_counts_of_bytes_and_tokens_may_have_63_bits(kind):
    large = ("seed", "split_seed", "max_corpus_bytes", "max_download_bytes", "eval_tokens")
    options = options_of(kind)
    assert {name for name in large if name in options} == {name for name in options if options[name].rules.is_wide}

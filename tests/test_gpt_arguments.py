"""gpt/arguments.py: the values that each annotation allows, and the message for others."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import gpt
from gpt.arguments import check_fields, checked
from gpt.option import option


@dataclasses.dataclass
class Sample:
    """A field of every kind of annotation."""

    flag: bool = False
    count: int = 1
    seed: int = option(1, is_wide=True)
    number: float | None = None
    word: str = "a"
    place: Path | None = None
    kind: Literal["x", "y"] | None = None
    words: tuple[str, ...] = ()
    numbers: Sequence[float] = ()
    tokens: Sequence[int | str] = ()
    pairs: Collection[tuple[int, str]] = ()
    weights: Mapping[int | str, float] = dataclasses.field(default_factory=dict)
    model: gpt.GPT | None = None
    models: Sequence[gpt.GPT] = ()
    whatever: Any = None


class Nameless:
    """Raises in __repr__, as a caller's class may."""

    def __repr__(self) -> str:
        raise RuntimeError


SENTENCES = [
    ({"flag": 1}, "flag must be true or false, not 1"),
    ({"count": True}, "count must be a whole number, not True"),
    ({"count": 2.0}, "count must be a whole number, not 2.0"),
    ({"count": 1 << 31}, "count must be below 2147483648, not 2147483648"),
    ({"count": -(1 << 31)}, "count must be below 2147483648, not -2147483648"),
    ({"seed": 1 << 63}, "seed must be below 9223372036854775808, not 9223372036854775808"),
    ({"seed": 1 << 255}, f"seed must be below 9223372036854775808, not {str(1 << 255)[:57]}..."),
    ({"seed": 1 << 256}, "seed must be below 9223372036854775808, not a much longer number"),
    ({"number": "1"}, "number must be a number or None, not '1'"),
    ({"number": math.inf}, "number must be a finite number, not inf"),
    ({"word": b"a"}, "word must be text, not b'a'"),
    ({"word": ["a"]}, "word must be text, not the list ['a']"),
    ({"place": 1}, "place must be a path or None, not 1"),
    ({"place": ""}, "place is empty: give a path"),
    ({"place": "a\0b"}, r"place 'a\x00b' contains a NUL, which no path can contain"),
    ({"place": "x" * 4096}, f"place '{'x' * 56}... is longer than any path can be"),
    ({"kind": "z"}, "kind must be one of x, y or None, not 'z'"),
    ({"kind": ["x"]}, "kind must be one of x, y or None, not the list ['x']"),
    ({"words": "a"}, "words must be a list of texts, not 'a': for a single text write [text]"),
    ({"words": 1}, "words must be a list of texts, not 1"),
    ({"numbers": [1, None]}, "numbers must be a list of numbers, not the list [1, None]"),
    ({"numbers": "a"}, "numbers must be a list of numbers, not 'a'"),
    ({"number": 10**400}, "number must be a number or None, not a much longer number"),
    ({"numbers": {1: 2}}, "numbers must be a list of numbers, not the dict {1: 2}"),
    ({"tokens": [1.5]}, "tokens must be a list of whole numbers or texts, not the list [1.5]"),
    ({"pairs": [(1, "a", "b")]}, "pairs must be a list of tuples (a whole number, text), not the list [(1, 'a', 'b')]"),
    ({"pairs": [1]}, "pairs must be a list of tuples (a whole number, text), not the list [1]"),
    ({"weights": [1]}, "weights must be a mapping from a whole number or text to a number, not the list [1]"),
    ({"weights": {1: "a"}}, "weights must be a mapping from a whole number or text to a number, not the dict {1: 'a'}"),
    ({"model": int}, "model must be a GPT or None, not the type <class 'int'>"),
    ({"model": object()}, "model must be a GPT or None, not a value of type object"),
    ({"model": Nameless()}, "model must be a GPT or None, not a value of type Nameless"),
    ({"model": list(range(40))}, "model must be a GPT or None, not a value of type list"),
    ({"models": [1]}, "models must be a list of GPT, not the list [1]"),
]


@pytest.mark.parametrize(("options", "sentence"), SENTENCES, ids=[next(iter(options)) for options, _ in SENTENCES])
def test_a_wrong_argument_is_one_sentence(options, sentence):
    with pytest.raises(gpt.UserError) as info:
        check_fields(Sample(**options))
    assert str(info.value) == sentence


def test_values_are_converted_to_their_annotations():
    model = gpt.GPT(gpt.ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, seq_len=8))
    compiled = torch.compile(model, backend="eager")
    given = {
        "flag": True,
        "count": np.int16(2**15 - 1),
        "seed": (1 << 63) - 1,
        "number": np.float64(0.5),
        "word": np.str_("b"),
        "place": "x" * 4095,
        "kind": "y",
        "words": ["a", "b"],
        "numbers": range(3),
        "tokens": (n for n in (1, "b")),
        "pairs": {(1, "a")},
        "weights": {"a": np.int64(1), np.int32(2): 0.5},
        "model": compiled,
        "models": [model],
        "whatever": object,
    }
    wanted = given | {"count": 2**15 - 1, "number": 0.5, "word": "b", "place": Path("x" * 4095), "words": ("a", "b")}
    wanted |= {"numbers": (0, 1, 2), "tokens": (1, "b"), "pairs": ((1, "a"),), "weights": {"a": 1, 2: 0.5}}
    options = Sample(**given)
    check_fields(options)
    assert vars(options) == wanted | {"models": (model,)}
    assert [type(x) for x in (options.count, options.number, options.word)] == [int, float, str]
    assert all(type(x) is float for x in (*options.numbers, *options.weights.values()))
    check_fields(Sample(count=(1 << 31) - 1, seed=1 - (1 << 63), number=2**31 - 1))


def test_an_iterator_is_not_consumed():
    """An Iterable that is not a collection is passed through unchanged."""
    texts = iter(["a"])
    assert checked(texts_of)(texts) is texts
    assert checked(texts_of)(["a"]) == ("a",)
    with pytest.raises(gpt.UserError, match="texts must be a list of texts, not the list"):
        checked(texts_of)([1])


def texts_of(texts: Iterable[str]) -> Any:
    return texts


@pytest.mark.parametrize("table", [f.name for f in dataclasses.fields(gpt.Config)])
def test_a_table_of_a_config_must_be_its_dataclass(table):
    with pytest.raises(gpt.UserError, match=f"{table} must be .*Config, not "):
        gpt.Config(**{table: {"n_layer": 2}})

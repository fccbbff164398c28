"""Call the Python interface with arguments of every wrong kind: each must be accepted as documented or refused clearly.

Each documented function is called with correct arguments, each replaced in turn by each of VALUES. A value that the
parameter accepts must pass. Any other must raise one of ERRORS from the project's own code, with one sentence that
names the parameter.
"""

import dataclasses
import inspect
import linecache
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import gpt
from gpt import config
from gpt.data.tokenizers import ByteTokenizer, StreamDecoder, Tokenizer, load_tokenizer
from gpt.evaluation import lm_eval, scoring
from gpt.inference.sampling import sample_seed
from gpt.interop.export import export

ROOT = Path(gpt.__file__).parents[1]
ERRORS = (gpt.UserError, TypeError, ValueError)
VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "minus one": lambda: -1,
    "zero": lambda: 0,
    "two": lambda: 2,
    "numpy's two": lambda: np.int64(2),
    "2**63": lambda: 2**63,
    "10**5000": lambda: 10**5000,
    "half": lambda: 0.5,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "complex": lambda: 1j,
    "text": lambda: "banana",
    "no text": lambda: "",
    "NUL": lambda: "a\0b",
    "surrogate": lambda: "a\udcff",
    "half a character": lambda: "a\ud800",
    "long text": lambda: "x" * 5000,
    "bytes": lambda: b"x",
    "path": lambda: Path("banana"),
    "list": list,
    "texts": lambda: ["x"],
    "integers": lambda: [1],
    "floats": lambda: [0.5],
    "nested": lambda: [[1]],
    "dict": dict,
    "set": lambda: {1},
    "object": object,
    "class": lambda: int,
    "function": lambda: len,
    "scalar tensor": lambda: torch.tensor(1),
    "integer tensor": lambda: torch.ones(2, 3, dtype=torch.int64),
    "int32 tensor": lambda: torch.ones(2, 3, dtype=torch.int32),
    "longer tensor": lambda: torch.ones(2, 4, dtype=torch.int64),
    "flat tensor": lambda: torch.ones(3, dtype=torch.int64),
    "tensor of ids beyond": lambda: torch.full((2, 3), 1 << 40),
    "negative tensor": lambda: torch.full((2, 3), -1),
    "float tensor": lambda: torch.ones(2, 3),
    "bool tensor": lambda: torch.ones(2, 3, dtype=torch.bool),
    "meta tensor": lambda: torch.ones(2, 3, dtype=torch.int64, device="meta"),
    "float meta tensor": lambda: torch.ones(2, 32, device="meta"),
    "wide tensor": lambda: torch.ones(2, 32, dtype=torch.float64),
    "complex tensor": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "sparse tensor": lambda: torch.ones(2, 3).to_sparse(),
    "array": lambda: np.ones(3),
    "array of texts": lambda: np.array(["x"]),
    "dtype": lambda: torch.float32,
    "integer dtype": lambda: torch.int64,
    "device": lambda: torch.device("cpu"),
}


@dataclasses.dataclass
class Call:
    """A function, its arguments, and the VALUES that each of its parameters accepts; None: any."""

    function: Callable
    arguments: dict[str, Any]
    takes: dict[str, str | None]
    words: dict[str, str] = dataclasses.field(default_factory=dict)  # another word for a parameter in messages

    def run(self, **changes: Any) -> Any:
        found = self.function(**(self.arguments | changes))
        return list(found) if isinstance(found, Iterator) else found


FLAG, COUNT, NUMBER, DEVICE = "true", "two, numpy's two", "zero, two, numpy's two, half, 2**63", "device"
ROWS = f"{COUNT}, 2**63, 10**5000"
TOKENS = {"idx": "integer tensor, int32 tensor", "positions": "none, integer tensor, int32 tensor, flat tensor"}
TOKENS |= {"segment_ids": "none, int32 tensor"}
HIDDEN = TOKENS | {"idx": "integer tensor, int32 tensor, longer tensor"}


@pytest.fixture(scope="module")
def calls(tiny_run, tmp_path_factory) -> dict[str, Call]:
    folder = tmp_path_factory.mktemp("interface")
    model, tokenizer = gpt.load(tiny_run, "cpu")
    byte = ByteTokenizer()
    byte.save(folder / "tokenizer.json")
    export(model, tokenizer, folder / "hf")
    tokens = torch.ones(2, 3, dtype=torch.int64)
    both = {"model": model, "tokenizer": tokenizer}
    neither = {"model": "", "tokenizer": ""}
    inputs = {"idx": tokens, "positions": None, "segment_ids": None}
    small = gpt.ModelConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, seq_len=8)
    return {
        "load": Call(
            gpt.load,
            {"run_dir": tiny_run, "device": "cpu", "which": "newest"},
            {"run_dir": "", "device": DEVICE, "which": ""},
            {"run_dir": "run directory", "which": "checkpoint"},
        ),
        "from_hf": Call(
            gpt.from_hf,
            {"source": folder / "hf", "seq_len": 8, "device": "cpu"},
            {"source": "", "seq_len": f"none, {COUNT}", "device": DEVICE},
            {"source": "directory"},
        ),
        "tokenizer_from_hf": Call(
            gpt.tokenizer_from_hf, {"source": folder / "hf"}, {"source": ""}, {"source": "directory"}
        ),
        "generate": Call(
            gpt.generate,
            both | {"prompts": ["a"], "config": gpt.SamplingConfig(max_new_tokens=2), "draft": None, "done": ()},
            neither | {"prompts": "list, texts, array of texts", "config": "none", "draft": "none", "done": "list"},
        ),
        "sample_seed": Call(
            sample_seed,
            {"seed": 1, "prompt": 1, "sample": 1},
            {"seed": f"zero, {COUNT}", "prompt": f"zero, {COUNT}", "sample": f"zero, {COUNT}"},
        ),
        "GPT": Call(gpt.GPT, {"config": small}, {"config": ""}),
        "forward": Call(
            model.forward,
            inputs,
            HIDDEN,
        ),
        "hidden": Call(model.hidden, inputs, HIDDEN),
        "loss": Call(
            model.loss,
            inputs | {"targets": tokens, "reduction": "mean", "z_loss": 0.0, "label_smoothing": 0.0},
            TOKENS | {"targets": "integer tensor", "reduction": "", "z_loss": NUMBER, "label_smoothing": "zero, half"},
        ),
        "logits": Call(model.logits, {"hidden": torch.ones(3, 32)}, {"hidden": ""}),
        "num_parameters": Call(model.num_parameters, {"embeddings": False}, {"embeddings": FLAG}),
        "checkpoint_activations": Call(model.checkpoint_activations, {"on": False}, {"on": FLAG}),
        "flops_per_token": Call(
            model.flops_per_token, {"seq_len": 9, "training": False}, {"seq_len": f"none, {COUNT}", "training": FLAG}
        ),
        **calls_of_tokenizers(tokenizer, folder),
        **calls_of_scores(both, neither, folder),
    }


def calls_of_tokenizers(tokenizer: Tokenizer, folder: Path) -> dict[str, Call]:
    return {
        "encode": Call(
            tokenizer.encode,
            {"text": "abc", "allow_special": False},
            {"text": "text, no text, NUL, long text", "allow_special": FLAG},
        ),
        "encode_to_array": Call(tokenizer.encode_to_array, {"text": "abc"}, {"text": "text, no text, NUL, long text"}),
        "decode": Call(tokenizer.decode, {"ids": [1, 2]}, {"ids": "list, integers, set, flat tensor"}),
        "decode_bytes": Call(tokenizer.decode_bytes, {"ids": [1, 2]}, {"ids": "list, integers, set, flat tensor"}),
        "push": Call(
            StreamDecoder(tokenizer).push, {"token": 1}, {"token": f"zero, {COUNT}, scalar tensor"}, {"token": "ids"}
        ),
        "save": Call(tokenizer.save, {"path": folder / "saved.json"}, {"path": "text, path, surrogate"}),
        "load_tokenizer": Call(
            load_tokenizer, {"path": folder / "tokenizer.json"}, {"path": ""}, {"path": "tokenizer"}
        ),
    }


def calls_of_scores(both: dict, neither: dict, folder: Path) -> dict[str, Call]:
    question, other = scoring.Question("a", ("b", "c"), 0), scoring.Question("x", ("y", "z"), 1)
    return {
        "score_texts": Call(
            scoring.score_texts,
            both | {"texts": ["abc"], "stride": 4, "batch_size": 2},
            neither | {"texts": "texts, array of texts", "stride": f"none, {COUNT}", "batch_size": ROWS},
            {"texts": "text"},
        ),
        "multiple_choice": Call(
            scoring.multiple_choice,
            both | {"questions": [question], "contexts": ["a"], "batch_size": 2},
            neither | {"questions": "", "contexts": "texts, array of texts", "batch_size": ROWS},
        ),
        "with_shots": Call(
            scoring.with_shots,
            {
                "questions": [question],
                "shots": [question, other, other],
                "k": 1,
                "seed": 1,
            },
            {"questions": "list", "shots": "", "k": f"zero, {COUNT}", "seed": f"zero, {COUNT}, minus one"},
        ),
        "Question": Call(
            scoring.Question,
            {"context": "a", "endings": ("b", "c"), "label": 0},
            {"context": "text, no text, NUL, surrogate, half a character, long text", "endings": "", "label": "zero"},
        ),
        "export": Call(
            export,
            both | {"directory": folder / "exported", "dtype": "float32"},
            neither | {"directory": "text, path, surrogate", "dtype": ""},
        ),
        "harness_model": Call(lm_eval.harness_model, both | {"batch_size": 2}, neither | {"batch_size": ROWS}),
    }


CALLS = """load from_hf tokenizer_from_hf generate sample_seed GPT forward hidden loss logits num_parameters
checkpoint_activations flops_per_token encode encode_to_array decode decode_bytes push save load_tokenizer
score_texts multiple_choice with_shots Question export harness_model"""


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Run in a new folder, without downloads."""
    import huggingface_hub

    def offline(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].LM = object
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CALLS.split())
def test_wrong_arguments_are_refused_clearly(calls, apart, name):
    call = calls[name]
    assert set(inspect.signature(call.function).parameters) == set(call.arguments) == set(call.takes)
    call.run()
    faults = []
    for parameter, taken in call.takes.items():
        taken = [word.strip() for word in taken.split(",") if word]
        assert set(taken) <= set(VALUES)
        for kind, make in VALUES.items():
            try:
                call.run(**{parameter: make()})
                fault = None if kind in taken else "is accepted"
            except Exception as error:
                words = (parameter, call.words.get(parameter, parameter))
                fault = why_unclear(error, words) if kind not in taken else f"is refused: {error!r}"
            if fault:
                faults.append(f"{parameter} = {kind} {fault}")
    assert not faults, "\n".join(faults)


def why_unclear(error: Exception, words: tuple[str, ...]) -> str | None:
    """Say why an error is unclear to a user; None if it is clear."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line, text = linecache.getline(frame.filename, frame.lineno).strip(), str(error)
    if not isinstance(error, ERRORS) or isinstance(error, UnicodeError):
        return f"ends in {error!r}, at {frame.filename}:{frame.lineno}"
    if not frame.filename.startswith((f"{ROOT}/gpt/", f"{ROOT}/kernels/")) or not line.startswith("raise "):
        return f"ends in {error!r}, which no raise statement raised, at {frame.filename}:{frame.lineno}"
    if not any(word in text for word in words) or "\n" in text or len(text) > 400 or " at 0x" in text:
        return f"ends in an unclear sentence: {text[:500]!r}"
    return None


# Options.


def fits(value: Any, hint: Any) -> bool:
    """Whether a value matches its annotation."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (bool, int, str):
        return type(value) is hint
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin is not None:
        return isinstance(value, tuple) and all(fits(each, parts[0]) for each in value)
    return isinstance(value, hint)


OPTIONS = [gpt.SamplingConfig, gpt.Config, gpt.ModelConfig, config.DataConfig, config.TokenizerConfig]
OPTIONS += [config.OptimConfig, config.TrainConfig, config.LogConfig]


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_wrong_option_values_are_refused_clearly(kind):
    """Either the option matches its annotation, or UserError names it."""
    faults, hints = [], get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for name, make in VALUES.items():
            try:
                value = getattr(kind(**{field.name: make()}), field.name)
                fault = None if fits(value, hints[field.name]) else f"is {value!r:.80}"
            except gpt.UserError as error:
                fault = why_unclear(error, (field.name,))
            except Exception as error:
                fault = f"ends in {error!r:.200}"
            if fault:
                faults.append(f"{field.name} = {name} {fault}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_options_accept_equivalent_types(kind):
    """numpy numbers for numbers, text for a path, lists for tuples; the field holds the plain value."""
    other = {int: np.int64, float: np.float32, tuple: list}
    for field in dataclasses.fields(kind):
        value = field.default if field.default is not dataclasses.MISSING else None
        if type(value) in other and value not in ((), math.inf):
            found = getattr(kind(**{field.name: other[type(value)](value)}), field.name)
            assert type(found) is type(value) and found == pytest.approx(value, rel=1e-6)
    assert config.TrainConfig(run_dir="runs/x").run_dir == Path("runs/x")
    assert config.DataConfig(corpus=["a", "b"]).corpus == ("a", "b")


@pytest.mark.parametrize(
    "options",
    [
        {"stop_tokens": [10**5000]},
        {"stop_tokens": [-1, 2**63]},
        {"stop_tokens": [10**5000, 0.5]},
        {"stop_tokens": ["x" * 5000]},
        {"logit_bias": {10**5000: 1.0}},
        {"logit_bias": {"a": 10**400}},
        {"logit_bias": {"a": -(10**5000)}},
        {"logit_bias": {"a": math.nan}},
        {"logit_bias": ["1" * 5000 + "=1"]},
        {"logit_bias": ["a=1e999"]},
        {"stop": ["\udcff"]},
        {"stop": ["a", ""]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_wrong_element_of_an_option_is_refused(calls, options):
    """Either the option refuses it or generate, which knows the tokens, before it yields anything."""
    call, (name,) = calls["generate"], options
    with pytest.raises(gpt.UserError) as info:
        call.run(config=gpt.SamplingConfig(**options))
    assert why_unclear(info.value, (name,)) is None


def test_missing_and_unknown_arguments_get_pythons_message():
    for arguments, message in (({}, r"load\(\) missing 1 required"), ({"run_dir": "x", "what": 1}, r"load\(\) got an")):
        with pytest.raises(TypeError, match=message):
            gpt.load(**arguments)

"""Every option of the other commands changes their work, each in its own way."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gpt.data.inspect
import gpt.evaluation.command
import gpt.inference.decoder
import gpt.interop.export
import sample
from gpt.command_line import parse_flags
from gpt.errors import UserError
from gpt.model import GPT
from gpt.training.command import load_config
from tests.commands import MAINS
from tests.option_checks import Case, check, ignore, missing
from tests.train_checks import TEXT
from tests.train_observer import network, words
from train import main as train

# Positional arguments, options of every case, and dataclasses of each command.
PROGRAMS: dict[str, tuple[tuple[str, ...], dict[str, Any], tuple[type, ...]]] = {
    "sample": (
        ("run",),
        {"run": "run", "max_new_tokens": 12, "jsonl": True, "device": "cpu"},
        (sample.Arguments, sample.Sampling),
    ),
    "evaluate": (
        ("run",),
        {"run": "run", "corpus": "text.txt", "json": True, "device": "cpu"},
        (gpt.evaluation.command.Arguments,),
    ),
    "export": (
        ("run", "directory"),
        {"run": "run", "directory": "export"},
        (gpt.interop.export.Arguments,),
    ),
    "inspect": (
        ("command", "path"),
        {"command": "inspect", "path": "ids.bin"},
        (gpt.data.inspect.Arguments,),
    ),
}


def argv_of(program: str, options: dict[str, Any]) -> list[str]:
    """Build a command line from these options over those of every case."""
    positional, base, _ = PROGRAMS[program]
    options = {**base, **options}
    return [str(options.pop(name)) for name in positional] + words(options)


class Ran:
    """The effects of a command in a folder: files, output, decoders, and the rows given to a model."""

    def __init__(self, program: str, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.error, self.status = folder, "", None
        self.decoders: list[gpt.inference.decoder.Decoder] = []
        self.rows: list[list[list[int]]] = []
        self.precisions: list[str] = []
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            self._spy(patch)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    self.status = MAINS[program](argv_of(program, options))
                except UserError as error:
                    self.error = str(error)
            out.flush()
            self.out, self.err = out.buffer.getvalue().decode(), err.getvalue()
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        self.files = sorted(path.as_posix() for path in found)

    def _spy(self, patch: pytest.MonkeyPatch) -> None:
        forward, ran = GPT.forward, self

        class Decoder(gpt.inference.decoder.Decoder):
            def __init__(self, model: GPT, rows: int, capacity: int, **options: Any) -> None:
                super().__init__(model, rows, capacity, **options)
                self.rows = rows
                ran.decoders.append(self)

        def seen_forward(model: GPT, idx: torch.Tensor, **options: Any) -> torch.Tensor:
            self.rows.append(idx.tolist())
            is_low = torch.is_autocast_enabled("cpu")
            self.precisions.append(str(torch.get_autocast_dtype("cpu")).removeprefix("torch.") if is_low else "float32")
            return forward(model, idx, **options)

        patch.setattr(GPT, "forward", seen_forward)
        patch.setattr(sys.modules["gpt.inference.generation"], "Decoder", Decoder)  # gpt.generate is the function
        patch.setattr("sys.stdin", io.StringIO("all\nwork\n"))
        patch.setenv("XDG_CACHE_HOME", str(self.folder / "usual"))

    @property
    def records(self) -> list[dict[str, Any]]:
        """Parse stdout as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def tokens(self) -> list[list[int]]:
        return [record["tokens"] for record in self.records]

    @property
    def decoder(self) -> gpt.inference.decoder.Decoder:
        return self.decoders[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Make two runs, texts, questions, and two token files of another program."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT[:300])
    (folder / "other.txt").write_text(TEXT[300:400])
    model = {"tokenizer": "byte", "n_layer": 1, "n_head": 2, "n_embd": 32, "seq_len": 32, "init": "xavier"}
    rest = {"max_steps": 1, "sample_tokens": 0, "device": "cpu", "dtype": "float32", "cache_dir": "cache"}
    with contextlib.chdir(folder):
        for name, seed in (("run", 1), ("other", 2)):
            assert (
                train(load_config(words({"corpus": "text.txt", "run_dir": name, "seed": seed, **model, **rest}))) == 0
            )
    (folder / "prompts.txt").write_text("one\ntwo\n")
    (folder / "latin.txt").write_bytes("Straße ".encode("latin-1") * 20)
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "{"a" * i}", "body": "b"}}\n' for i in range(1, 20)))
    for name, letters in (("questions", "abcdef"), ("more", "uvwxyz")):
        rows = [{"ctx": x, "endings": [x * 2, x * 3], "label": 0} for x in letters]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.frombuffer(TEXT.encode(), np.uint8).astype("<u2").tofile(folder / "ids.bin")
    np.arange(50).astype("<u2").tofile(folder / "more.bin")
    return folder


def likeliest(ran: Ran) -> int:
    """Count the tokens of a sample that the model finds likeliest."""
    model, tokenizer = gpt.load(ran.folder / "run", "cpu")
    (tokens,) = ran.tokens
    with torch.no_grad():
        best = model(torch.tensor([[tokenizer.start_token, *tokens]]))[0].argmax(-1).tolist()
    return sum(one == other for one, other in zip(tokens, best))


def recording(patch: pytest.MonkeyPatch) -> None:
    """Let the decoder take the CPU for a device on which steps are recorded."""
    patch.setattr(gpt.inference.decoder, "can_record", lambda device: True)
    patch.setattr(gpt.inference.decoder, "decode_impl", lambda device: "torch")

    class Graphs:
        def __init__(self, run: Callable) -> None:
            self.step = lambda tokens, where: run(tokens, torch.tensor(where))

        def clear(self) -> None: ...

    patch.setattr(gpt.inference.decoder, "StepGraphs", Graphs)


def ended(ran: Ran) -> tuple[str, int]:
    return ran.records[0]["finish_reason"], len(ran.tokens[0])


def precision(ran: Ran) -> str:
    return str(ran.decoder.dtype).removeprefix("torch.")


ONLY_A = {"logit_bias": "97=100"}  # every token is an a
QUESTIONS = {"corpus": None, "multiple_choice": "questions.jsonl"}
SHOTS = QUESTIONS | {"few_shot": 2}
WRITES = {"jsonl": False, "output": "out.jsonl"}

SAMPLE = [
    Case("run", ("other",), lambda r: r.tokens),
    Case("prompt", ("all work",), lambda r: r.records[0]["prompt"], lambda b, s, v: (b, s) == ("", v)),
    Case("prompt", ("all work",), lambda r: r.out.startswith("all work"), others={"jsonl": False}),
    Case(
        "prompt_file",
        ("prompts.txt",),
        lambda r: [record["prompt"] for record in r.records],
        lambda b, s, v: (b, s) == ([""], ["one", "two"]),
    ),
    Case(
        "output",
        ("out.jsonl",),
        lambda r: (r.out, "out.jsonl" in r.files),
        lambda b, s, v: s == ("", True),
        {"jsonl": False},
    ),
    Case(
        "resume", (True,), lambda r: r.error[:17], lambda b, s, v: (b, s) == ("out.jsonl exists:", ""), WRITES, WRITES
    ),
    Case(
        "overwrite",
        (True,),
        lambda r: r.error[:17],
        lambda b, s, v: (b, s) == ("out.jsonl exists:", ""),
        WRITES,
        WRITES,
    ),
    Case("jsonl", (True,), lambda r: r.out.startswith('{"prompt"'), others={"jsonl": False}),
    Case("interactive", (True,), lambda r: r.err.startswith("Each line is a prompt"), others={"jsonl": False}),
    Case("draft", ("other",), lambda r: (len(r.decoders), "proposed tokens" in r.err), lambda b, s, v: s == (2, True)),
    Case("device", ("meta",), lambda r: r.error, lambda b, s, v: b == "" and "device 'meta' cannot be used here" in s),
    Case("max_new_tokens", (5, 20), lambda r: len(r.tokens[0]), lambda b, s, v: (b, s) == (12, v)),
    Case("temperature", (0.0,), likeliest, lambda b, s, v: b < s == 12),
    Case("temperature", (2.0, 1e9), lambda r: r.tokens),
    Case("top_k", (1,), likeliest, lambda b, s, v: b < s == 12),
    Case("top_p", (1e-6,), likeliest, lambda b, s, v: b < s == 12),
    Case("min_p", (1.0,), likeliest, lambda b, s, v: b < s == 12),
    Case(
        "repetition_penalty",
        (1e9,),
        lambda r: len({*r.tokens[0]}),
        lambda b, s, v: b < s == 30,
        {"temperature": 0, "max_new_tokens": 30},
    ),
    Case("logit_bias", ("97=100",), lambda r: r.records[0]["text"], lambda b, s, v: s == 12 * "a"),
    Case("logit_bias", ("a=100",), lambda r: r.records[0]["text"], lambda b, s, v: s == 12 * "a"),
    Case(
        "stop",
        ("aaa",),
        lambda r: (len(r.tokens[0]), r.records[0]["text"], r.records[0]["finish_reason"]),
        lambda b, s, v: (b[2], s) == ("length", (3, "", "stop")),
        ONLY_A,
    ),
    Case("stop_tokens", ("97",), ended, lambda b, s, v: (b, s) == (("length", 12), ("stop", 0)), ONLY_A),
    Case("stop_tokens", ("a",), ended, lambda b, s, v: (b, s) == (("length", 12), ("stop", 0)), ONLY_A),
    Case("num_samples", (3,), lambda r: len(r.records), lambda b, s, v: (b, s) == (1, v)),
    Case("seed", (5,), lambda r: (r.tokens, r.records[0]["seed"])),
    Case(
        "rolling",
        (True,),
        lambda r: r.error or len(r.tokens[0]),
        lambda b, s, v: "more than the model's context" in b and s == 40,
        {"max_new_tokens": 40, "logit_bias": "256=-100"},
    ),
    Case("batch_size", (1, 2), lambda r: r.decoder.rows, lambda b, s, v: (b, s) == (3, v), {"num_samples": 3}),
    Case("batch_invariant", (True,), lambda r: r.decoder._tile, lambda b, s, v: b == 0 < s),
    Case("cuda_graphs", (False,), lambda r: r.decoder._graphs is None, lambda b, s, v: s, patch=recording),
    Case("dtype", ("bfloat16", "float16"), precision, lambda b, s, v: (b, s) == ("float32", v)),
    Case("dtype", ("float32", "float16"), precision, lambda b, s, v: (b, s) == ("bfloat16", v), {"quantize": "int8"}),
    Case("quantize", ("int8",), lambda r: (r.err[:12], type(r.decoder._model.head).__name__)),
    Case("speculate", ("ngram",), lambda r: r.err, lambda b, s, v: b == "" and "proposed tokens" in s, ONLY_A),
    Case(
        "draft_tokens",
        (1, 7),
        lambda r: r.decoder.limit,
        lambda b, s, v: s - b == v - 4,
        {"speculate": "ngram"},
    ),
]

EVALUATE = [
    Case("run", ("other",), lambda r: r.records[0]["loss"]),
    Case("corpus", ("other.txt",), lambda r: r.records[0]["bytes"], lambda b, s, v: (b, s) == (300, 100)),
    Case("text_field", ("body",), lambda r: r.records[0]["bytes"], lambda b, s, v: s == 19, {"corpus": "rows.jsonl"}),
    Case(
        "encoding_errors",
        ("replace",),
        lambda r: r.error or r.records[0]["bytes"],
        lambda b, s, v: "not valid UTF-8" in b and s == 9 * 20,
        {"corpus": "latin.txt", "encoding_errors": "strict"},
    ),
    Case("max_corpus_bytes", (100,), lambda r: r.records[0]["bytes"], lambda b, s, v: (b, s) == (300, v)),
    Case(
        "max_download_bytes",
        (1000,),
        lambda r: r.error,
        lambda b, s, v: b == "" and "has more than 1000 bytes" in s,
        {"corpus": "http://host/text"},
        patch=network,
    ),
    Case(
        "cache_dir",
        ("elsewhere",),
        lambda r: [name.split("/")[0] for name in r.files if name.endswith("/content")],
        lambda b, s, v: (b, s) == (["usual"], [v]),
        {"corpus": "http://host/text"},
        patch=network,
    ),
    Case(
        "stride",
        (4, 32),
        lambda r: (r.records[0]["stride"], r.records[0]["loss"]),
        lambda b, s, v: (b[0], s[0]) == (16, v),
    ),
    Case("multiple_choice", ("more.jsonl",), lambda r: r.rows, others=QUESTIONS),
    Case(
        "few_shot",
        (1, 2),
        lambda r: (r.records[0]["few_shot"], r.rows),
        lambda b, s, v: s[0] == v,
        QUESTIONS,
    ),
    Case("shots", ("more.jsonl",), lambda r: r.rows, others=SHOTS),
    Case("seed", (1, 2), lambda r: r.rows, others=SHOTS),
    Case("batch_size", (1, 3), lambda r: max(map(len, r.rows)), lambda b, s, v: (b, s) == (8, v)),
    Case("device", ("meta",), lambda r: r.error, lambda b, s, v: b == "" and "device 'meta' cannot be used here" in s),
    Case("dtype", ("bfloat16", "float16"), lambda r: r.precisions, lambda b, s, v: {*s} == {v}),
    Case(
        "dtype",
        ("auto",),
        lambda r: r.precisions,
        lambda b, s, v: {*s} == {"bfloat16"},
        patch=lambda patch: patch.setattr("gpt.device.multiplies_bfloat16", lambda device: True),
    ),
    Case("json", (True,), lambda r: r.out.startswith("{"), lambda b, s, v: s, {"json": False}),
]


def weight_of(ran: Ran) -> torch.Tensor:
    return load_file(ran.folder / "export/model.safetensors")["model.embed_tokens.weight"]


EXPORT = [
    Case("run", ("other",), lambda r: weight_of(r).tolist()),
    Case("directory", ("x/y",), lambda r: [name for name in r.files if name.endswith("config.json")]),
    Case(
        "dtype",
        ("bfloat16", "float16"),
        lambda r: (str(weight_of(r).dtype), json.loads((r.folder / "export/config.json").read_text())["dtype"]),
        lambda b, s, v: s == (f"torch.{v}", v),
    ),
    Case(
        "overwrite", (True,), lambda r: r.error[:20], lambda b, s, v: (b, s) == ("export is not empty:", ""), before={}
    ),
]

INSPECT = [
    Case("command", ("look",), lambda r: r.error, lambda b, s, v: b == "" and "unknown command 'look'" in s),
    Case("path", ("more.bin",), lambda r: r.out, lambda b, s, v: "more.bin: 50 tokens" in s),
    Case("tokenizer", ("byte",), lambda r: r.out, lambda b, s, v: "read with a byte tokenizer" in s),
    Case("sample_tokens", (3,), lambda r: r.out, lambda b, s, v: "begins: 74 32 97\n" in s),
    Case(
        "sample_tokens",
        (3,),
        lambda r: r.out,
        lambda b, s, v: f"\n  | {TEXT[:3]}\n" in s,
        {"tokenizer": "byte"},
    ),
]

CASES = [
    (program, case)
    for program, cases in (("sample", SAMPLE), ("evaluate", EVALUATE), ("export", EXPORT), ("inspect", INSPECT))
    for case in cases
]


def given(program: str, case: Case) -> tuple[type, str, Any]:
    """Return the dataclass of a case's option, its name, and the base's value."""
    kinds = PROGRAMS[program][2]
    arguments = parse_flags(kinds[0], argv_of(program, case.others), prog=program)
    for kind, values in zip(kinds, (arguments, getattr(arguments, "sampling", None))):
        if case.name in {f.name for f in fields(kind)}:
            return kind, case.name, getattr(values, case.name)
    raise KeyError(case.name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_option_of_a_command_has_a_case(program):
    _, base, kinds = PROGRAMS[program]
    own = [case for name, case in CASES if name == program]
    assert [name for kind in kinds for name in missing(kind, own, base)] in ([], ["sampling"])


@pytest.mark.parametrize(("program", "case"), CASES, ids=[f"{program}-{case}" for program, case in CASES])
def test_an_option_of_a_command_acts(program, case, made, tmp_path, monkeypatch):
    def observe(options: dict[str, Any]) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(made, folder)
        if case.before is not None:
            assert Ran(program, folder, case.before).status == 0
        with pytest.MonkeyPatch.context() as patch:
            if case.patch is not None:
                case.patch(patch)
            if ignored:
                ignore(patch, *ignored[0])
            return case.look(Ran(program, folder, options))

    ignored = []
    base = observe(case.others)
    changed = [observe(case.others | {case.name: value}) for value in case.values]
    ignored.append(given(program, case))
    check(case, base, changed, [observe(case.others | {case.name: case.values[0]})])

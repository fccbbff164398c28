"""Observe a run of train.py from within: rows, losses, weights after each step, files and output."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import train
from gpt.config import Config
from gpt.data.tokenizers import load_tokenizer
from gpt.errors import UserError
from gpt.model import GPT, Block
from gpt.run.metrics import read_metrics
from gpt.training import start, step, validation
from gpt.training.command import load_config
from tests.train_checks import TEXT

OTHER = "".join(f"{a}{b}{c}; " for a in "PQRS" for b in "0123456789" for c in "!?*+=&%")
BASE = {
    "corpus": ("text.txt",),
    "run_dir": "run",
    "cache_dir": "cache",
    "device": "cpu",
    "dtype": "float32",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "seq_len": 16,
    "batch_size": 2,
    "max_steps": 3,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "log_interval": 1,
    "eval_interval": 100,
    "checkpoint_interval": 100,
    "sample_tokens": 0,
}


def words(options: dict[str, Any]) -> list[str]:
    """Turn options into flags; None is left out."""
    found = []
    for name, value in options.items():
        flag = "--no-" * (value is False) or "--"
        given = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
        found += [] if value is None else [flag + name.replace("_", "-"), *map(str, given)]
    return found


def prepare(folder: Path, before: dict[str, Any] | None = None) -> Path:
    """Write texts to train on and, if `before` is given, an earlier run with these options over BASE."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(OTHER)
    (folder / "latin.txt").write_bytes("Straße, größer; ".encode("latin-1") * 40)
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "{"a" * i}", "body": "{"b" * i}"}}\n' for i in range(40)))
    (folder / "docs").mkdir()
    for i in range(12):
        (folder / f"docs/{i:02}.txt").write_text(f"{chr(65 + i)}{chr(97 + i)}" * (9 + 4 * i))
    if before is not None:
        Observed(folder, before)
    return folder


def network(patch: pytest.MonkeyPatch) -> None:
    """Make every URL return TEXT."""
    answer = lambda: io.BytesIO(TEXT.encode())

    def urlopen(*args: Any, **options: Any) -> Any:
        response = answer()
        response.headers = {"Content-Length": str(len(TEXT))}
        return response

    patch.setattr("urllib.request.urlopen", urlopen)


class Observed:
    """A run of train.py in this working directory, with these options over BASE."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        # For each training loss: rows, positions and segments, precision, dropout's seed.
        self.rows: list[torch.Tensor] = []
        self.places: list[dict[str, Any]] = []
        self.precisions: list[str] = []
        self.seeds: list[int] = []
        # For evaluations: rows, precisions, and the number of targets.
        self.eval_rows: list[torch.Tensor] = []
        self.eval_precisions: list[str] = []
        self.targets = 0
        # Weights and states before the first step and after each; parameter groups at each step.
        self.weights: list[dict[str, torch.Tensor]] = []
        self.states: list[dict[str, torch.Tensor]] = []
        self.groups: list[list[dict[str, Any]]] = []
        self.blocks = 0  # number of block evaluations in training
        self.compiled: list[Any] = []
        self.profiled: list[int] = []
        self.samplings: list[Any] = []
        self.wandb: list[dict[str, Any]] = []
        self.error, self.status = "", None
        self.folder, self.config, out = folder, Config(), io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            self._spy(patch)
            try:
                self.config = load_config(words(BASE | options))
                self.status = train.main(self.config)
            except UserError as error:
                self.error = str(error)
            self.files = sorted(str(path) for path in Path().rglob("*") if path.is_file())
        self.said = out.getvalue()
        self.run_dir = folder / (self.config.train.run_dir or "run")
        self.metrics = read_metrics(self.run_dir / "metrics.jsonl")
        record = self.run_dir / "corpus.json"
        self.corpus = json.loads(record.read_text()) if record.exists() else {}
        self.tokenizer = load_tokenizer(self.run_dir / "tokenizer.json") if record.exists() else None

    def _spy(self, patch: pytest.MonkeyPatch) -> None:
        loss, body, build, take = GPT.loss, Block.body, start.build_optimizers, step.take_step

        def seen_loss(model: GPT, x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
            precision = "float32"
            if torch.is_autocast_enabled("cpu"):
                precision = str(torch.get_autocast_dtype("cpu")).removeprefix("torch.")
            if model.training:
                self.rows.append(x.clone())
                self.places.append(options)
                self.precisions.append(precision)
                self.seeds.append(torch.initial_seed())
            else:
                self.eval_rows.append(x.clone())
                self.eval_precisions.append(precision)
                self.targets += int((y >= 0).sum())
            return loss(model, x, y, **options)

        def seen_body(block: Block, *args: Any) -> torch.Tensor:
            self.blocks += block.training
            return body(block, *args)

        def seen_build(model: GPT, *args: Any) -> list[torch.optim.Optimizer]:
            self.model, self.optimizers = model, build(model, *args)
            self._keep()
            return self.optimizers

        def seen_take(optimizer: torch.optim.Optimizer, *args: Any) -> None:
            if optimizer is self.optimizers[0]:
                self.groups.append([])
            kind = type(optimizer).__name__
            self.groups[-1] += [
                {"kind": kind, **group, "params": len(group["params"])} for group in optimizer.param_groups
            ]
            take(optimizer, *args)
            if optimizer is self.optimizers[-1]:
                self._keep()

        def compiled(function: Callable, **options: Any) -> Callable:
            self.compiled.append(function)
            return function

        def generate(model: GPT, tokenizer: Any, prompts: Any, config: Any, **options: Any) -> Any:
            self.samplings.append(config)
            return true_generate(model, tokenizer, prompts, config, **options)

        true_generate, profiler = validation.generate, start.Profiler
        patch.setattr(validation, "generate", generate)
        patch.setattr(GPT, "loss", seen_loss)
        patch.setattr(Block, "body", seen_body)
        patch.setattr(start, "build_optimizers", seen_build)
        patch.setattr(step, "take_step", seen_take)
        patch.setattr(start, "require_compiler", lambda device: None)
        patch.setattr(torch, "compile", compiled)
        patch.setattr(
            start, "Profiler", lambda folder, steps, say: self.profiled.append(steps) or profiler(folder, 0, say)
        )
        patch.setattr("os.fsync", lambda fd: None)  # tests/test_durability.py tests it
        patch.setattr("gpt.training.monitor.plot_losses", lambda losses, path, title: path.write_bytes(b"\x89PNG"))
        patch.setitem(sys.modules, "wandb", self._fake_wandb())
        patch.setenv("XDG_CACHE_HOME", os.path.abspath("usual"))

    def _keep(self) -> None:
        names = {p: name for name, p in self.model.named_parameters()}
        self.weights.append({name: p.detach().clone() for p, name in names.items()})
        states = [(p, key, x) for o in self.optimizers for p, state in o.state.items() for key, x in state.items()]
        self.states.append({f"{names[p]}.{key}": x.detach().clone() for p, key, x in states})

    def _fake_wandb(self) -> ModuleType:
        module = ModuleType("wandb")
        module.Error = RuntimeError
        module.Settings = lambda **options: options
        run = SimpleNamespace(id="1", log=lambda *args, **options: None, finish=lambda: None)
        module.init = lambda **options: self.wandb.append(options) or run
        return module

    # Properties for the cases.

    @property
    def text(self) -> list[str]:
        """Text of every training row."""
        return [self.tokenizer.decode(row.tolist()) for rows in self.rows for row in rows]

    @property
    def eval_text(self) -> str:
        return "".join(self.tokenizer.decode(row.tolist()) for rows in self.eval_rows for row in rows)

    @property
    def last(self) -> dict[str, list[float]]:
        """Final weights."""
        return {name: weight.tolist() for name, weight in self.weights[-1].items()}

    def column(self, key: str) -> list[Any]:
        """Values of a key in the metrics."""
        return [record[key] for record in self.metrics if key in record]

    def steps(self, key: str) -> list[int]:
        return [record["step"] for record in self.metrics if key in record]

    def move(self, name: str) -> float:
        """Largest change of a number of the weight in the first step."""
        return (self.weights[1][name] - self.weights[0][name]).abs().max().item()

    def checkpoints(self, kind: str = "step") -> list[int]:
        found = (self.run_dir / "checkpoints").glob(f"{kind}_*")
        return sorted(int(path.name[-8:]) for path in found)

"""Flags and TOML keys set every option, every options class has a table of cases, and defaults are pinned."""

import importlib
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from gpt.config import PRESETS, Config
from gpt.config_file import TABLES, config_from_toml, convert
from gpt.model import ModelConfig
from gpt.training.command import Arguments, load_config
from tests import test_options_commands, test_options_model, test_options_train
from tests.option_checks import Case
from tests.train_observer import BASE, words

ROOT = Path(__file__).parents[1]
CASES = [*test_options_model.CASES, *test_options_train.CASES]


def classes_of(kind: type) -> set[type]:
    """Return a dataclass and the dataclasses of its fields."""
    inner = (f.default_factory for f in fields(kind) if is_dataclass(f.default_factory))
    return {kind}.union(*map(classes_of, inner))


def test_each_dataclass_of_options_is_in_a_table():
    """Finds commands by their call of parse_flags."""
    sources = [ROOT / "sample.py", *(ROOT / "gpt").glob("**/*.py")]
    modules = [path for path in sources if "parse_flags(" in path.read_text()]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    names.remove("gpt.command_line")  # defines parse_flags
    found = set().union(*(classes_of(importlib.import_module(name).Arguments) for name in names))
    tested = {Arguments, *TABLES.values()}.union(*(kinds for _, _, kinds in test_options_commands.PROGRAMS.values()))
    assert found == tested
    assert {*test_options_train.KINDS.values(), ModelConfig} == {*TABLES.values()}
    own = {f.name for f in fields(Arguments)} - {f.name for f in fields(Config)}
    assert own == {"config_file", "preset"}, "the flags outside the tables are tested below"


def table_of(name: str) -> str:
    return next(table for table, kind in TABLES.items() if name in {f.name for f in fields(kind)})


def base_of(case: Case) -> dict[str, Any]:
    """Return the options of a case's base, without the case's own option."""
    own = test_options_model.SIZES if case in test_options_model.CASES else BASE
    given = {**own, **case.others}.items()
    return {name: value for name, value in given if name != case.name and value is not None}


def tables_of(options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arrange options as the tables of a TOML file."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        tables.setdefault(table_of(name), {})[name] = list(value) if isinstance(value, tuple) else value
    return tables


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_file_sets_an_option(case, tmp_path):
    """The model's flags are tested below, all others by the cases themselves."""
    path, table = tmp_path / "recipe.toml", table_of(case.name)
    hint = typing.get_type_hints(TABLES[table])[case.name]
    for value in case.values:
        tables = tables_of({**base_of(case), case.name: value})
        path.write_text(tomli_w.dumps(tables))
        expected = convert(tables[table][case.name], hint, case.name)
        assert getattr(getattr(config_from_toml(path), table), case.name) == expected


@pytest.mark.parametrize("case", test_options_model.CASES, ids=repr)
def test_a_flag_sets_an_option_of_the_model(case, tmp_path):
    for value in case.values[:1]:
        model = load_config(words({**base_of(case), case.name: value})).model
        assert getattr(model, case.name) == value


def test_the_flags_outside_the_tables(tmp_path):
    (tmp_path / "recipe.toml").write_text("[model]\nn_layer = 3\n")
    config = load_config([str(tmp_path / "recipe.toml")])
    assert (config.model.n_layer, config.train.run_dir) == (3, Path("runs/recipe"))
    for name, options in PRESETS.items():
        model = load_config(["--preset", name]).model
        assert model == ModelConfig(**options), name


# Users see a changed default.
DEFAULTS = {
    "data": {"val_fraction": 0.1, "split_seed": 0, "encoding_errors": "strict", "text_field": "text"}
    | {"max_download_bytes": 16 << 30, "packing": "stream"},
    "tokenizer": {"tokenizer": "char", "bpe_vocab_size": 4096},
    "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "seq_len": 256, "position": "rotary", "rope_theta": 10000.0}
    | {"norm": "rmsnorm", "norm_eps": 1e-6, "norm_order": "pre", "activation": "swiglu", "bias": False}
    | {"qk_norm": True, "value_embeds": 0, "tied_embeddings": False, "dropout": 0.0, "init": "scaled"},
    "optim": {"optimizer": "adamw", "learning_rate": 1e-3, "embedding_lr": 0.05, "head_lr": 0.01, "min_lr": 0.0}
    | {"schedule": "cosine", "warmup_steps": 100, "decay_fraction": 0.4, "weight_decay": 0.1, "beta1": 0.9}
    | {"beta2": 0.95, "muon_momentum": 0.95, "muon_ns_steps": 5, "grad_clip": 1.0, "ema_decay": 0.0, "z_loss": 0.0}
    | {"label_smoothing": 0.0},
    "train": {"batch_size": 16, "grad_accum_steps": 1, "max_steps": 2000, "seed": 1337, "device": "auto"}
    | {"dtype": "auto", "parallel": "auto", "eval_interval": 250, "checkpoint_interval": 500, "keep_checkpoints": 2}
    | {"max_skipped_steps": 10, "max_rollbacks": 3, "spike_threshold": 0.0, "patience": 0, "max_minutes": 0.0}
    | {"profile_steps": 0}
    | dict.fromkeys(("activation_checkpointing", "compile", "resume", "overwrite", "eval_only", "dry_run"), False),
    "log": {"log_interval": 10, "sample_tokens": 200, "sample_prompt": "", "wandb": "off", "wandb_project": "gpt"},
}


def test_the_defaults_are_pinned():
    for table, values in asdict(Config()).items():
        assert {key: value for key, value in values.items() if value not in (None, ())} == DEFAULTS[table]

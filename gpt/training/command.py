"""Build train.py's Config from defaults, a preset, the config file and the flags; later ones win.

An error message names the file or the flag that holds the wrong value.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from gpt.command_line import checked_words, flag, parse_flags
from gpt.config import PRESETS, Config, ModelConfig
from gpt.config_file import TABLES, config_from_toml, read_toml, with_changes
from gpt.errors import UserError
from gpt.interop.initial import has_tokenizer, initial_config
from gpt.option import options_of, rules_of
from gpt.run.layout import CONFIG


@dataclass(frozen=True)
class Arguments(Config):
    """Train a GPT on a text corpus. Every key of the TOML file is also a flag, and the flag wins."""

    config_file: tyro.conf.Positional[Path | None] = None
    """TOML file with the tables [data] [tokenizer] [model] [optim] [train] [log]."""
    preset: Literal[tuple(PRESETS)] | None = None
    """Model options to start from: modern (Qwen3's block), gpt2, or transformer (the original of 2017)."""


def _given(argv: Sequence[str], name: str) -> str | None:
    """Find a flag's value before tyro parses the command line. The last one counts, as it does for tyro."""
    found = None
    for i, word in enumerate(argv):
        spelled, _, value = word.partition("=")
        if spelled.replace("_", "-") == name:
            found = value or next(iter(argv[i + 1 : i + 2]), None)
    return found


def _check_acting(argv: Sequence[str], config: Config) -> None:
    """Raise UserError for a flag that would be ignored. A file may set such options: it serves several commands."""
    for part in (getattr(config, table) for table in TABLES):
        for f in fields(part):
            key, values = rules_of(f).acts_with or (f.name, ())
            value = getattr(part, key)
            if values and value not in values and _given(argv, flag(f.name)) is not None:
                raise UserError(f"{flag(f.name)} does nothing with {key} {value}: it goes with {' or '.join(values)}")


def _source_options(argv: Sequence[str], source: str, preset: str | None) -> dict[str, Any]:
    """Return the source's model options. Raises UserError for a preset, or for a tokenizer that the source has, too."""
    named = _given(argv, "--tokenizer")
    if preset:
        raise UserError(f"preset {preset} and init_from {source} contradict each other: give one")
    if named and has_tokenizer(source):
        raise UserError(f"tokenizer {named} and init_from {source}, which has its own, contradict each other: give one")
    return asdict(initial_config(source))


def _preset(name: str | None) -> dict[str, Any]:
    """Return a preset's model options: all options that any preset sets. Raises UserError for an unknown preset."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose {', '.join(list(PRESETS)[:-1])} or {list(PRESETS)[-1]}")
    defaults = asdict(ModelConfig())
    return {key: defaults[key] for preset in PRESETS.values() for key in preset} | PRESETS[name]


def _begun_run(argv: Sequence[str], path: Path | None, tables: dict[str, dict[str, Any]]) -> Path | None:
    """Return config.toml of the run being resumed, if it exists: init_from is then ignored."""
    train = tables.get("train", {})
    run_dir = _given(argv, "--run-dir") or train.get("run_dir") or _run_dir(path)
    saved = Path(run_dir) / CONFIG
    return saved if ("--resume" in argv or train.get("resume")) and saved.exists() else None


def _run_dir(path: Path | None) -> Path:
    """Return the default run directory, named after the config file."""
    return Path("runs") / (path.stem if path else "gpt")


def load_config(argv: Sequence[str], prog: str = "train.py") -> Config:
    """Build the Config for a command line. Raises UserError.

    With init_from the source's model options take the place of a preset; when an existing run is resumed, the run's
    model options do. With --resume or --eval-only and a run directory but no file, the run's config.toml is the file; a
    preset given beside it is compared with the run, as flags are.
    """
    argv = checked_words(argv, options_of(Arguments))
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    run_dir, saved = _given(argv, "--run-dir"), None
    if path is None and run_dir and {"--resume", "--eval-only", "--eval_only"} & set(argv):
        saved = Path(run_dir) / CONFIG
        path = saved if saved.exists() else None
    tables = read_toml(path) if path else {}
    model = dict(tables.get("model", {}))
    preset = _given(argv, "--preset") or model.pop("preset", None)
    model.pop("preset", None)
    source = _given(argv, "--init-from") or tables.get("train", {}).get("init_from")
    if path is not None and path == saved:  # it holds all model options; the run is compared with the preset
        tables["model"] = model | _preset(preset)
    elif source and (begun := _begun_run(argv, path, tables)):
        tables["model"] = asdict(config_from_toml(begun).model) | _preset(preset) | model
    elif source:
        tables["model"] = _source_options(argv, source, preset) | model
    else:
        tables["model"] = _preset(preset) | model
    try:
        base = {name: cls(**tables.get(name, {})) for name, cls in TABLES.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error
    arguments = parse_flags(Arguments, argv, default=Arguments(**base), prog=prog)
    config = Config(**{name: getattr(arguments, name) for name in TABLES})
    _check_acting(argv, config)
    if config.train.run_dir is None:
        config = with_changes(config, "train", run_dir=_run_dir(path))
    return config

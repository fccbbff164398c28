"""Read and write a Config as TOML. An error message names the file and the key."""

import tomllib
import types
import typing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from gpt.arguments import fit_argument
from gpt.command_line import did_you_mean
from gpt.config import PRESETS, Config
from gpt.errors import UserError
from gpt.files import path_from_text, path_to_text, write_whole
from gpt.option import options_of, rules_of

TABLES = {f.name: f.default_factory for f in fields(Config)}
_OPTIONS = options_of(Config)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert a TOML value to an annotated type. Raises UserError, starting with `where`, if it does not fit."""
    if value in ("none", "None") and types.NoneType in typing.get_args(kind):
        return None
    if isinstance(value, str) and kind == tuple[str, ...]:
        value = [value]
    return fit_argument(where, value, kind)


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """Read a config file, checking every key and the type of every value; [model] may name a preset."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    checked: dict[str, dict[str, Any]] = {}
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            raise UserError(f"{path}: [{table}] is not a table of a config{did_you_mean(table, TABLES)}")
        kinds = typing.get_type_hints(TABLES[table]) | ({"preset": Literal[tuple(PRESETS)]} if table == "model" else {})
        checked[table] = {}
        for key, value in values.items():
            if key not in kinds:
                home = next((t for t, cls in TABLES.items() if key in {f.name for f in fields(cls)}), None)
                hint = f"; it belongs in [{home}]" if home else did_you_mean(key, kinds)
                raise UserError(f"{path}: {key!r} is not a key of [{table}]{hint}")
            where = f"{path}: {key}"
            if key in _OPTIONS and _OPTIONS[key].is_path:
                value = _paths_in(value, where)
            checked[table][key] = convert(value, kinds[key], where)
    return checked


def _paths_in(value: Any, where: str) -> Any:
    """Decode a path, or a list of paths, written by write_toml."""
    if isinstance(value, list):
        return [_paths_in(each, where) for each in value]
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{where} is empty: give a path, or leave it out")
    try:
        return path_from_text(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def with_changes(config: Config, table: str, **changes: Any) -> Config:
    """Copy the config with some keys of one table changed."""
    return replace(config, **{table: replace(getattr(config, table), **changes)})


def write_toml(config: Config, path: Path) -> None:
    """Write the resolved config as TOML for read_toml, without keys that are None.

    Options that concern only this start, such as resume, are written as their defaults: the file is the run's recipe.
    """
    import tomli_w

    per_start = {f.name: f.default for f in fields(config.train) if rules_of(f).per_start}
    config = with_changes(config, "train", **per_start)

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(key, each) for each in value]
        return path_to_text(value) if _OPTIONS[key].is_path else value

    tables = {
        table: {key: plain(key, value) for key, value in values.items() if value is not None}
        for table, values in asdict(config).items()
    }
    write_whole(path, tomli_w.dumps(tables).encode())


def config_from_toml(path: Path) -> Config:
    """Read a run's config.toml."""
    tables = read_toml(path)
    return Config(**{name: cls(**tables.get(name, {})) for name, cls in TABLES.items()})

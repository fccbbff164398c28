"""A TOML file and the command line into a Config: defaults, then a preset, then the file, then the flags.

A wrong key or value is one sentence that names the file or the flag, whichever it came from.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import io
import itertools
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from gpt.config import PRESETS, Config, ModelConfig
from gpt.errors import UserError
from gpt.files import decoded, path_from_text, path_to_text, write_whole

T = TypeVar("T")


@dataclass(frozen=True)
class Arguments(Config):
    """Train a GPT on a text corpus. Every key of the TOML file is also a flag here, and a flag wins."""

    config_file: tyro.conf.Positional[Path | None] = None
    """TOML file with the tables [data] [tokenizer] [model] [optim] [train] [log]."""
    preset: Literal[tuple(PRESETS)] | None = None
    """Model options to start from: modern (Qwen3's block), gpt2, or transformer (2017)."""


TABLES = {f.name: f.default_factory for f in fields(Config)}
# Options that hold a path, or a name that may be one; with `run`, the first word of gpt.evaluate.
PATHS = ("corpus", "cache_dir", "run_dir", "init_from", "resume_from")
# Options whose value may be nothing.
MAY_BE_EMPTY = ("prompt", "stop", "stop_tokens", "logit_bias", "sample_prompt")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), [k.replace("-", "_") for k in known], n=1)
    return f"; did you mean {'--' + near[0].replace('_', '-') if word.startswith('-') else near[0]!r}?" if near else ""


def flag_names(kind: type) -> list[str]:
    """Every flag of a dataclass of dataclasses, with underscores."""
    names = []
    for f in fields(kind):
        names += [inner.name for inner in fields(f.default_factory)] if is_dataclass(f.default_factory) else [f.name]
    return names


def checked_words(argv: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    """The command line with its texts in UTF-8, whatever the locale; paths stay as the system has them.

    kinds: type of each option. Raises UserError for an empty value, and for a text that is not UTF-8.
    """
    words, option = [], None
    for word in argv:
        name, is_joined, value = word.partition("=")
        if word.startswith("--"):
            option = name[2:].replace("-", "_")
            if not is_joined:
                words.append(word)
                continue
        else:
            name, value = option and "--" + option.replace("_", "-"), word
        if not value.strip() and option not in MAY_BE_EMPTY:
            raise UserError(f"{name or 'an argument'} is empty: give it a value, or leave it out")
        if option in kinds and option not in PATHS and str in _parts(kinds[option]):
            value = _text(value, name)
        words.append(f"{name}={value}" if word.startswith("--") else value)
        if option != "corpus":  # which takes several
            option = None
    return words


def _parts(kind: Any) -> set[Any]:
    """The types that a type is made of."""
    return {kind}.union(*map(_parts, typing.get_args(kind)))


def _text(word: str, name: str) -> str:
    try:
        return word if word.isascii() else decoded(word).encode().decode()
    except UnicodeError:
        raise UserError(f"{name} is not valid UTF-8: {word!a}") from None


@functools.cache
def join_help_lines(kind: type) -> None:
    """Give tyro each field's docstring as one paragraph; on its own it keeps the source's line breaks."""
    for inner in (f.default_factory for f in fields(kind) if is_dataclass(f.default_factory)):
        join_help_lines(inner)
    for cls in filter(is_dataclass, kind.__mro__):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = " ".join(ast.literal_eval(after.value).split())
                hint = cls.__annotations__[field.target.id]
                cls.__annotations__[field.target.id] = typing.Annotated[hint, tyro.conf.arg(help=text)]


def option_kinds(kind: type) -> dict[str, Any]:
    """The type of each option of a dataclass of dataclasses."""
    kinds = {}
    for f in fields(kind):
        inner = is_dataclass(f.default_factory)
        kinds |= option_kinds(f.default_factory) if inner else {f.name: typing.get_type_hints(kind)[f.name]}
    return kinds


def parse_flags(kind: type[T], argv: Sequence[str], *, default: T | None = None, prog: str) -> T:
    """tyro over a dataclass with flat names. Raises UserError for an unknown flag or a bad value."""
    known = flag_names(kind)
    for word in argv:
        name = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and name != "help" and name.removeprefix("no_") not in known:
            hint = did_you_mean(word.split("=")[0], known)
            raise UserError(f"{word.split('=')[0]} is not an option of {prog}{hint} ({prog} --help lists them)")
    argv = checked_words(argv, option_kinds(kind))
    join_help_lines(kind)
    extra = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=list(argv), prog=prog, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws its message as a box: a title, the message, a rule, help.
        lines = [line.strip(" │") for line in box.getvalue().splitlines()[1:]]
        message = " ".join(itertools.takewhile(lambda line: line.strip("─╰╯"), lines))
        message = re.sub(r"^Error parsing (?=[^-])\w+: ", "", message)  # a dataclass's own sentence needs no preface
        raise UserError(message or "the command line is wrong") from stop


def convert(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as the annotated type; UserError that begins with `where` if it does not fit."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value in ("none", "None"):
            return None
        return convert(value, next(o for o in options if o is not types.NoneType), where)
    if typing.get_origin(kind) is Literal:
        if value in options:
            return value
        raise UserError(f"{where} must be one of {', '.join(map(str, options))}, not {value!r}")
    if typing.get_origin(kind) is tuple:
        if options[0] is float:
            if isinstance(value, list) and all(type(v) in (int, float) for v in value):
                return tuple(map(float, value))
            raise UserError(f"{where} must be a list of numbers, not {value!r}")
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(v, str) for v in values):
            return tuple(values)
        raise UserError(f"{where} must be a string or a list of strings, not {value!r}")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind:
        return value
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}[kind]
    raise UserError(f"{where} must be {name}, not {value!r}")


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a config file, every key known and every value of its type; [model] may name a preset."""
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
            checked[table][key] = convert(_paths_in(value, where) if key in PATHS else value, kinds[key], where)
    return checked


def _paths_in(value: Any, where: str) -> Any:
    """A path, or a list of them, as write_toml has written it."""
    if isinstance(value, list):
        return [_paths_in(each, where) for each in value]
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{where} is empty: give a path, or leave it out")
    try:
        return path_from_text(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _given(argv: Sequence[str], flag: str) -> str | None:
    """What a flag is set to, before tyro has read the line; given twice, the last one counts, as there."""
    found = None
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value or next(iter(argv[i + 1 : i + 2]), None)
    return found


# Flags that do nothing unless another option has one of these values. A file may hold both: it serves several commands.
ACTS_WITH: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "bpe_vocab_size": ("tokenizer", "tokenizer", ("bpe",)),
    "rope_theta": ("model", "position", ("rotary",)),
    "embedding_lr": ("optim", "optimizer", ("muon",)),
    "head_lr": ("optim", "optimizer", ("muon",)),
    "muon_momentum": ("optim", "optimizer", ("muon",)),
    "muon_ns_steps": ("optim", "optimizer", ("muon",)),
    "min_lr": ("optim", "schedule", ("cosine", "linear", "wsd")),
    "decay_fraction": ("optim", "schedule", ("wsd",)),
    "wandb_project": ("log", "wandb", ("offline", "online")),
}


def _check_acting(argv: Sequence[str], config: Config) -> None:
    """UserError for a flag that would be ignored."""
    for name, (table, key, values) in ACTS_WITH.items():
        value = getattr(getattr(config, table), key)
        flag = "--" + name.replace("_", "-")
        if value not in values and _given(argv, flag) is not None:
            raise UserError(f"{flag} does nothing with {key} {value}: it goes with {' or '.join(values)}")


def _check_source(argv: Sequence[str], source: str, preset: str | None) -> None:
    """UserError where what init_from brings is asked for beside it."""
    from gpt.initial import has_tokenizer

    named = _given(argv, "--tokenizer")
    if preset:
        raise UserError(f"preset {preset} and init_from {source} contradict each other: give one")
    if named and has_tokenizer(source):
        raise UserError(f"tokenizer {named} and init_from {source}, which has its own, contradict each other: give one")


def _preset(name: str | None) -> dict[str, Any]:
    """What a preset says of the model: each option that any preset sets. UserError for an unknown preset."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: {', '.join(PRESETS)} are")
    defaults = asdict(ModelConfig())
    return {key: defaults[key] for preset in PRESETS.values() for key in preset} | PRESETS[name]


def _begun_run(argv: Sequence[str], path: Path | None, tables: dict[str, dict[str, Any]]) -> Path | None:
    """The config.toml of the run being resumed, if it exists: init_from has then done its part."""
    train = tables.get("train", {})
    run_dir = _given(argv, "--run-dir") or train.get("run_dir") or _run_dir(path)
    saved = Path(run_dir) / "config.toml"
    return saved if ("--resume" in argv or train.get("resume")) and saved.exists() else None


def _run_dir(path: Path | None) -> Path:
    """Where a run is kept that does not say: by the name of its config file."""
    return Path("runs") / (path.stem if path else "gpt")


def load_config(argv: Sequence[str], prog: str = "train.py") -> Config:
    """The Config that a command line asks for. Raises UserError.

    With init_from the model's options begin as the source's, in a preset's place. Over a run's own file a preset is as
    the flags are: what it says is asked of the run.
    With --resume or --eval-only and a run directory but no file, the run's own config.toml is the file.
    With --resume and an existing run, its model's options replace the source's.
    """
    argv = checked_words(argv, option_kinds(Arguments))
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    run_dir, saved = _given(argv, "--run-dir"), None
    if path is None and run_dir and {"--resume", "--eval-only", "--eval_only"} & set(argv):
        saved = Path(run_dir) / "config.toml"
        path = saved if saved.exists() else None
    tables = read_toml(path) if path else {}
    model = dict(tables.get("model", {}))
    preset = _given(argv, "--preset") or model.pop("preset", None)
    model.pop("preset", None)
    source = _given(argv, "--init-from") or tables.get("train", {}).get("init_from")
    if path is not None and path == saved:  # it has every option of the model; the run is checked against a preset
        tables["model"] = model | _preset(preset)
    elif source and (begun := _begun_run(argv, path, tables)):
        tables["model"] = asdict(config_from_toml(begun).model) | _preset(preset) | model
    elif source:
        from gpt.initial import initial_config

        _check_source(argv, source, preset)
        tables["model"] = asdict(initial_config(source)) | model
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


def with_changes(config: Config, table: str, **changes: Any) -> Config:
    """A copy of the config with some keys of one table changed."""
    return replace(config, **{table: replace(getattr(config, table), **changes)})


def write_toml(config: Config, path: Path) -> None:
    """The resolved config as TOML that read_toml takes back; keys that are None are left out.

    What was asked of this one start (resume, overwrite, parallel, ...) is left out too: the file is the run's recipe.
    """
    import tomli_w

    this_start = {"resume": False, "resume_from": None, "overwrite": False, "eval_only": False, "parallel": "auto"}
    config = with_changes(config, "train", **this_start)

    def plain(key: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(key, each) for each in value]
        return path_to_text(value) if key in PATHS else value

    tables = {
        table: {key: plain(key, value) for key, value in values.items() if value is not None}
        for table, values in asdict(config).items()
    }
    write_whole(path, tomli_w.dumps(tables).encode())


def config_from_toml(path: Path) -> Config:
    """The Config that a run's config.toml holds."""
    tables = read_toml(path)
    return Config(**{name: cls(**tables.get(name, {})) for name, cls in TABLES.items()})

"""Defaults, preset, file and flags override each other in this order; configs survive writing; all recipes load."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from gpt.config import PRESETS, Config, ModelConfig
from gpt.config_file import TABLES, config_from_toml, write_toml
from gpt.errors import UserError
from gpt.training.command import load_config

ROOT = Path(__file__).parent.parent


def test_the_command_line_wins_over_the_file_over_the_preset(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[model]\npreset = "gpt2"\nn_layer = 3\nn_head = 4\nnorm_eps = 1e-3\n')
    model = load_config([str(file), "--n-head", "8"]).model
    assert (model.position, model.norm_eps, model.n_layer, model.n_head) == ("learned", 1e-3, 3, 8)
    assert load_config([str(file), "--preset", "transformer"]).model.position == "sinusoidal"
    assert load_config([str(file), "--preset=transformer"]).model.norm_eps == 1e-3


def test_dashes_and_underscores_are_equal(tmp_path):
    assert load_config(["--n_layer", "2", "--n-head", "3"]).model.n_layer == 2


def test_the_run_directory_is_named_after_the_recipe(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("")
    assert load_config([str(file)]).train.run_dir == Path("runs/recipe")
    assert load_config([str(file), "--run-dir", "x/y"]).train.run_dir == Path("x/y")
    assert load_config([]).train.run_dir == Path("runs/gpt")


def test_no_two_tables_share_a_name():
    names = [f.name for cls in TABLES.values() for f in fields(cls)]
    assert len(names) == len(set(names))


def test_every_value_has_a_description():
    """--help shows each field's docstring; tyro reads them from the source."""
    import ast

    trees = [ast.parse(path.read_text()) for path in (ROOT / "gpt").glob("**/config.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(classes) == len(TABLES) + 1
    for cls in [node for node in classes if node.name != "Config"]:
        for item, after in zip(cls.body, cls.body[1:]):
            if isinstance(item, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{cls.name}.{item.target.id} has no docstring"


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for cls in TABLES.values():
        for f in fields(cls):
            assert "--" + f.name.replace("_", "-") in text


def test_a_resolved_config_reads_back(tmp_path):
    config = load_config(
        ["--corpus", "a b.txt", "c", "--window", "7", "--run-dir", "x", "--resume", "--dropout", "0.25"]
    )
    write_toml(config, tmp_path / "config.toml")
    back = config_from_toml(tmp_path / "config.toml")
    assert (back.data, back.tokenizer, back.model, back.optim, back.log) == (
        config.data,
        config.tokenizer,
        config.model,
        config.optim,
        config.log,
    )
    assert not back.train.resume, "what was asked of one start is not part of the recipe"


def test_resume_without_a_file_takes_the_runs_own(tmp_path):
    write_toml(load_config(["--n-layer", "2"]), tmp_path / "config.toml")
    assert load_config(["--run-dir", str(tmp_path), "--resume"]).model.n_layer == 2
    assert load_config(["--run-dir", str(tmp_path)]).model.n_layer == Config().model.n_layer


def test_a_preset_is_compared_with_the_resumed_run(tmp_path):
    write_toml(load_config(["--preset", "gpt2", "--n-layer", "2"]), tmp_path / "config.toml")
    again = ["--run-dir", str(tmp_path), "--resume"]
    saved = config_from_toml(tmp_path / "config.toml").model
    assert load_config([*again, "--preset", "gpt2"]).model == saved
    assert load_config([*again, "--preset", "transformer"]).model == replace(saved, **PRESETS["transformer"])
    assert load_config([*again, "--preset", "modern"]).model == ModelConfig(n_layer=2)


def test_the_last_of_two_equal_flags_counts(tmp_path):
    for name, layers in (("a", "2"), ("b", "3")):
        (tmp_path / name).mkdir()
        write_toml(load_config(["--n-layer", layers]), tmp_path / name / "config.toml")
    config = load_config(["--run-dir", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b"), "--resume"])
    assert (config.train.run_dir, config.model.n_layer) == (tmp_path / "b", 3)


@pytest.mark.parametrize(
    ("flag", "value", "without", "with_"),
    [
        ("--bpe-vocab-size", "300", [], ["--tokenizer", "bpe"]),
        ("--rope-theta", "500", ["--preset", "gpt2"], []),
        ("--embedding-lr", "0.1", [], ["--optimizer", "muon"]),
        ("--head-lr", "0.1", [], ["--optimizer", "muon"]),
        ("--muon-momentum", "0.9", [], ["--optimizer", "muon"]),
        ("--muon-ns-steps", "4", [], ["--optimizer", "muon"]),
        ("--min-lr", "1e-5", ["--schedule", "constant"], ["--schedule", "linear"]),
        ("--decay-fraction", "0.1", [], ["--schedule", "wsd"]),
        ("--wandb-project", "x", [], ["--wandb", "offline"]),
    ],
    ids=lambda value: value.strip("-") if isinstance(value, str) and value.startswith("--") else "",
)
def test_a_flag_without_effect_is_refused(flag, value, without, with_):
    with pytest.raises(UserError, match=f"{flag} does nothing with "):
        load_config([*without, flag, value])
    load_config([*with_, flag, value])


def test_numbers_are_finite():
    kinds = get_type_hints(Config)
    hints = {table: get_type_hints(kind) for table, kind in kinds.items()}
    names = [(table, name) for table, of in hints.items() for name, hint in of.items() if hint is float]
    assert len(names) > 15
    for table, name in names:
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(UserError, match=name):
                kinds[table](**{name: value})


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path, request):
    # A recipe that begins with weights from the network begins with a small run's here.
    begins = "init_from" in path.read_text()
    load_config([str(path), *(["--init-from", str(request.getfixturevalue("tiny_run"))] if begins else [])])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nn_layer = 1", r"\[modle\] is not a table of a config; did you mean 'model'\?"),
        ("n_layer = 1", r"\[n_layer\] is not a table"),
        ("[model]\nn_layer = true", "n_layer must be a whole number, not True"),
        ("[model]\nn_layer = 1.5", "n_layer must be a whole number, not 1.5"),
        ("[data]\ncorpus = 3", "corpus must be a list of texts, not 3"),
        ("[data]\ncorpus_weights = 3", "corpus_weights must be a list of numbers, not 3"),
        ("[data]\ncorpus_weights = [1, 'a']", r"corpus_weights must be a list of numbers, not the list \[1, 'a'\]"),
        ("[data]\ncorpus_weights = [1, 0]", "corpus_weights must be positive"),
        ("[data]\ncorpus_weights = [1, inf]", "corpus_weights must be positive and finite"),
        ("[data]\ncorpus = ['a', 'b']\ncorpus_weights = [1]", "corpus_weights has 1 numbers for 2 entries of corpus"),
        ("[data]\ncorpus_weights = 'a'", "corpus_weights must be a list of numbers, not 'a'$"),
        (f"[optim]\nlearning_rate = 1{'0' * 400}", "learning_rate must be a number, not a much longer number"),
        ("[train]\nrun_dir = 3", "run_dir must be a path or None, not 3"),
        ("[train]\nresume = 'yes'", "resume must be true or false, not 'yes'"),
        ('[model]\npreset = "gpt9"', "preset must be one of modern, gpt2, transformer"),
    ],
    ids=lambda value: value.replace("\n", " ")[:60] if "=" in value and "[" in value else "",
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"bad.toml: {message}"):
        load_config([str(file)])


def test_text_is_utf8_whatever_the_locale():
    """An ASCII locale hands bytes over as surrogates (PEP 383)."""
    assert load_config(["--sample-prompt", "\udcc3\udca9"]).log.sample_prompt == "é"
    assert load_config(["--sample-prompt=\udcc3\udca9"]).log.sample_prompt == "é"
    for words in (["--sample-prompt", "\udcff"], ["--sample-prompt=\udcff"]):
        with pytest.raises(UserError, match=r"--sample-prompt is not valid UTF-8: '\\udcff'"):
            load_config(words)
    assert load_config(["--run-dir", "a\udcff"]).train.run_dir == Path("a\udcff")


def test_an_unknown_preset_is_refused_before_a_config_is_built():
    with pytest.raises(UserError, match="unknown preset 'x': choose modern, gpt2 or transformer"):
        load_config(["--preset", "x"])

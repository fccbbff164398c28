"""The benchmarks refuse wrong flags before they measure anything."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attention --rounds 0", "argument --rounds: invalid positive value: '0'"),
        ("attention --lengths 1024 -1", "argument --lengths: invalid positive value: '-1'"),
        ("compile_report --processes 0", "argument --processes: invalid positive value: '0'"),
        ("compile_report --write x --json", "--write fixes the cases and the format"),
        ('compile_report --cases [{"head":1}]', "--cases is not a JSON list of cases: "),
        ("decode --rounds 0", "argument --rounds: invalid positive value: '0'"),
        ("decode --results x", "--results does nothing without --write: add --write"),
        ("loss --tokens 0", "argument --tokens: invalid positive value: '0'"),
        ("sample --rounds 0", "argument --rounds: invalid positive value: '0'"),
        ("sample --quick --new 0", "argument --new: invalid positive value: '0'"),
        ("sample --quick --full", "--quick and --full contradict each other"),
        ("sample --quick --only 124M", "leave nothing to measure: choose among 6 x 384 with 1 rows"),
        ("sample --quick --device tpu9", "device 'tpu9' cannot be used here"),
        ("sample --quick --json nowhere/x.json", "the folder nowhere does not exist: create it"),
        ("tokenize --rounds 0", "argument --rounds: invalid positive value: '0'"),
        ("tokenize README.md --megabytes 3", "leave them out when a corpus is given"),
        ("tokenize --tokenizer gpt2 --vocab-size 300", "add --tokenizer bpe"),
        ("train --corpus nowhere.txt", "nowhere.txt is not a file"),
        ("train --corpus README.md --peer --n-layer 3", "--peer does not accept train.py's flags: leave out --n-layer"),
        ("train --corpus README.md --json nowhere/x.json", "the folder nowhere does not exist: create it"),
        ("tune_attention --length 0", "argument --length: invalid positive value: '0'"),
    ],
    ids=lambda value: value.split(" --")[0] if value.split(" ")[0].isidentifier() else "",
)
def test_a_wrong_flag_is_refused(capsys, monkeypatch, line, message):
    name, *words = line.split()
    command = importlib.import_module(f"benchmarks.{name}")  # first, because masks built at import are cached
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit) as stop:
        command.main(*([] if name == "compile_report" else [words]))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert f"benchmarks.{name}: error: " in error

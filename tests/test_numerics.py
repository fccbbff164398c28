"""tests/numerics.py: the environment of each setting, the numeric tests, and the table from pytest's output."""

from pathlib import Path
from types import SimpleNamespace

from tests import numerics
from tests.conftest import is_numeric


def test_a_setting_replaces_the_callers_environment(monkeypatch):
    for name in numerics.UNSET:
        monkeypatch.setenv(name, "7")
    assert not set(numerics.environment({}, 1)) & set(numerics.UNSET)
    for changes in numerics.SETTINGS.values():
        found = numerics.environment(changes, 1)
        assert {name: found[name] for name in numerics.UNSET if name in found} == changes
    assert numerics.environment({}, 2)["OMP_NUM_THREADS"] == "1"
    assert {tuple(changes.values()) for changes in numerics.SETTINGS.values()} == {
        (), ("Haswell",), ("SkylakeX",), ("Zen",), ("Prescott",), ("default",), ("avx2",), ("1",), ("2",), ("4",),
    }  # fmt: skip


def test_test_files_that_compare_numbers_are_numeric(request):
    here = Path(__file__).parent
    for name, expected in (("attention", True), ("optim", True), ("attention_fuzz", True), ("lock", False)):
        assert is_numeric(here / f"test_{name}.py") == expected
    assert request.node.get_closest_marker("numeric") is None


def test_the_table_counts_passed_and_failed_tests(monkeypatch, capsys, tmp_path):
    commands = []

    def pytest(command, env, **options):
        commands.append(command)
        if env.get("OPENBLAS_CORETYPE") != "Zen":
            return SimpleNamespace(stdout="........\n8 passed, 3 deselected in 1.2s\n", returncode=0)
        lines = (
            "FAILED tests/test_a.py::test_b[1-x y] - AssertionError: 1\nERROR tests/test_c.py\n1 failed, 7 passed in 2s"
        )
        return SimpleNamespace(stdout=lines, returncode=1)

    monkeypatch.setattr(numerics, "ROOT", tmp_path)
    monkeypatch.setattr(numerics.subprocess, "run", pytest)
    assert numerics.main(["--workers", "3", "tests/test_a.py"]) == 1
    output = capsys.readouterr().out
    assert "| OPENBLAS_CORETYPE=Zen | 7 | 2 |" in output and "| 4 threads | 8 | 0 |" in output
    assert "OPENBLAS_CORETYPE=Zen: tests/test_a.py::test_b[1-x y]\n" in output
    assert len(commands) == 10 and all("tests/test_a.py" in command for command in commands)
    assert [command[-2:] == ["-n", "3"] for command in commands] == [True] * 7 + [False] * 3
    assert (tmp_path / "build/numerics/OPENBLAS_CORETYPE_Zen.log").read_text().startswith("FAILED")
    assert numerics.main(["--only", "avx2"]) == 0
    assert numerics.main(["--only", "no such setting"]) == 1

"""The runner of mutants makes the right changes, and finds those that no test notices."""

import ast
import contextlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import mutate
from tests.mutants import all_mutants, sample
from tests.mutate_coverage import Gather

ROOT = Path(__file__).parents[1]
SOURCES = ["gpt/files.py", "gpt/data/tokenizers.py", "kernels/tiles.py"]


def changes(code: str) -> set[str]:
    """Return the changed lines of a function with this body."""
    source = f"def f(a, b, *rest):\n{textwrap.indent(textwrap.dedent(code), '    ')}\n"
    valid = [mutant for mutant in all_mutants("toy.py", source) if mutant.is_valid(source)]
    return {mutant.difference(source)[1] for mutant in valid}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("c = a + b", {"c = a - b"}),
        ("c = a < b", {"c = a <= b", "c = a > b"}),
        ("c = a  is  not  b", {"c = a  is  b"}),
        ("c = (a) in (b)", {"c = (a) not in (b)"}),
        ("c = a and b", {"c = a or b", "c = ((a))", "c = ((b))"}),
        ("c = not a", {"c = (a)"}),
        ("c = -a", {"c = (a)"}),
        ("c = 5", {"c = 6", "c = 4"}),
        ("c = 200", {"c = 201", "c = 199", "c = 202"}),
        ("c = 0.5", {"c = 0.505"}),
        ("c = True", {"c = False"}),
        ("c = 'key'", {"c = 'keyX'"}),
        ("c = 'words for people'", set()),
        ("c = f'{a + 1}'", set()),
        ("c: int | 3 = a", set()),
        ("c: T = Literal[3]", set()),
        ("a = b", {"pass"}),
        ("a.c = b", {"pass"}),
        ("a += b", {"a -= b", "pass"}),
        ("a(b)", {"pass"}),
        ("c = a(b, rest)", {"c = a(rest, b)"}),
        ("c = a(b, key=rest)", {"c = a(b)"}),
        ("c = max(a, b)", {"c = min(a, b)"}),
        ("print(1, 'key')", {"pass"}),
        ("raise ValueError(a + 1)", {"pass"}),
        ("return a", {"return None"}),
        ("if a: a(1)", {"if (not (a)): a(1)", "if a: a(2)", "if a: a(0)", "if a: pass"}),
        ("while a:\n    continue", {"while (not (a)):", "pass"}),
        ("c = [a for a in b if a]", {"c = [a for a in b if (not (a))]"}),
        ("'''A docstring of 3.'''", set()),
        ("import os", set()),
    ],
)
def test_changes_of_one_line(line, expected):
    assert changes(line) == expected


def test_defaults_are_changed_and_annotations_are_not():
    source = "__all__ = ['a']\n\n\ndef f(a: 'int' = 1, *, b: Literal[2] = True) -> Literal[3]:\n    'Docstring.'\n"
    defaults = {mutant.text for mutant in all_mutants("toy.py", source)}
    assert defaults == {"2", "0", "False"}


@pytest.mark.parametrize("module", SOURCES)
def test_a_valid_mutant_changes_one_place_and_compiles(module):
    source = (ROOT / module).read_text()
    chosen = [mutant for mutant in sample(all_mutants(module, source), seed=1)[:20] if mutant.is_valid(source)]
    assert len(chosen) > 10
    for mutant in chosen:
        changed = mutant.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
        assert changed.startswith(source[: len(source.encode()[: mutant.start].decode())])
        assert changed.encode().endswith(source.encode()[mutant.end :])


def test_a_sample_spreads_over_lines_and_is_stable_under_edits_elsewhere():
    source = (ROOT / "gpt/data/tokenizers.py").read_text()
    first = sample(all_mutants("gpt/data/tokenizers.py", source), seed=3)
    lines = [source.encode()[: mutant.start].count(b"\n") for mutant in first]
    assert len(set(lines[:100])) == 100
    edited = sample(all_mutants("gpt/data/tokenizers.py", "import this\n\n\n" + source), seed=3)
    assert [mutant.id for mutant in edited] == [mutant.id for mutant in first]
    assert [mutant.id for mutant in sample(all_mutants("gpt/data/tokenizers.py", source), seed=4)] != [
        m.id for m in first
    ]


# A project of two modules, and its tests.
TOY = {
    "gpt/tested.py": """
        def add(a, b):
            return a + b

        def least(n):
            return n if n > 0 else 0

        def wait(n):
            while n < 3:
                n += 1

        def distance(a):
            return abs(a - 7)

        LIMIT = 50
        """,
    "gpt/__init__.py": "",
    "gpt/alone.py": "def twice(a):\n    return 2 * a\n\n\ndef same(a):\n    return a * 1\n",
    "tests/test_tested.py": """
        import subprocess, sys
        import pytest
        from gpt.tested import LIMIT, distance, least, wait

        FAR = distance(17)

        @pytest.fixture(scope="module")
        def answer():
            return subprocess.run([sys.executable, "-c", ""], check=True)

        @pytest.mark.parametrize("n", [0, 1])
        def test_shared(answer, n):
            assert answer.returncode == 0 <= least(n)

        def test_least():
            assert [least(n) for n in (-3, 0, 3)] == [0, 0, 3]

        def test_wait():
            wait(2)

        def test_what_was_made_when_the_file_was_imported():
            assert FAR == 10

        def test_limit():
            assert LIMIT == 50

        def test_add_in_another_process():
            code = "from gpt.tested import add; assert add(2, 3) == 5"
            subprocess.run([sys.executable, "-c", code], check=True)
        """,
    "tests/equivalent_mutants.toml": """
        [[mutant]]
        module = "gpt/alone.py"
        line = "return a * 1"
        becomes = "return a / 1"
        reason = "a float instead of an int, which nothing distinguishes"
        """,
    "pyproject.toml": "",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[str, dict[str, dict], dict[str, dict]]:
    """Run the program on a project of two modules; its output, verdicts by changed line, and recorded lines."""
    project = tmp_path_factory.mktemp("toy")
    for name, text in TOY.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(textwrap.dedent(text))
    command = [
        sys.executable,
        "-m",
        "tests.mutate",
        "--project",
        project,
        "--mutants",
        "100",
        "--slack",
        "4",
        "--preload",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (project / "build/mutants/verdicts.jsonl").read_text().splitlines()
    assert (project / "gpt/tested.py").read_text() == textwrap.dedent(TOY["gpt/tested.py"])
    (gathered,) = (project / "build/mutants/coverage").glob("*.json")
    return (
        done.stdout,
        {record["new"]: record for record in map(json.loads, lines)},
        json.loads(gathered.read_text()),
    )


def test_a_test_that_runs_the_mutant_in_another_process_kills_it(toy):
    assert toy[1]["return a - b"]["result"] == "killed"
    assert toy[1]["return a - b"]["by"] == "tests/test_tested.py::test_add_in_another_process"


def test_a_mutant_that_runs_while_tests_are_imported_is_killed(toy):
    record = toy[1]["return abs(a + 7)"]
    assert record["result"] == "killed"
    assert record["by"] == "tests/test_tested.py::test_what_was_made_when_the_file_was_imported"


def test_a_mutant_of_a_constant_is_killed_by_a_test_that_runs_no_function(toy):
    assert toy[1]["LIMIT = 51"]["by"] == "tests/test_tested.py::test_limit"


def test_a_shared_fixture_costs_every_test_that_uses_it(tmp_path):
    gather = Gather(tmp_path, tmp_path / "coverage.json")
    gather.setup = {"server": 30.0, "text": 2.0}
    gather.fixtures = {"first": ["server", "text"], "second": ["server", "text"], "third": ["text"], "fourth": []}
    gather.seconds = {"first": 33.0, "second": 0.5, "third": 4.0, "fourth": 0.25}
    assert [gather.cost(name) for name in gather.seconds] == [33.0, 32.0, 4.0, 0.25]


def test_a_shared_fixture_is_timed(toy):
    tests, setup = toy[2]["tests"], toy[2]["setup"]
    assert tests["tests/test_tested.py::test_shared[1]"]["seconds"] >= setup["answer"] > 0


def test_an_uncovered_mutant_is_reported(toy):
    said, records, _ = toy
    assert records["return 3 * a"]["result"] == "not covered"
    assert "+ return 3 * a" in said
    assert "gpt/alone.py" in said.splitlines()[-3]


def test_an_equivalent_mutant_is_skipped(toy):
    assert "return a * 1" not in toy[1]
    assert "return a / 1" not in toy[1]


def test_every_listed_equivalent_is_a_mutant_of_the_program():
    listed = mutate.load_equivalent(SimpleNamespace(folder=ROOT))
    made = set()
    for module in {module for module, *_ in listed}:
        source = (ROOT / module).read_text(encoding="utf-8")
        made |= {(module, *mutant.difference(source)) for mutant in all_mutants(module, source)}
    assert listed <= made


def test_an_unnoticed_mutant_survives(toy):
    assert toy[1]["return n if n >= 0 else 0"]["result"] == "survived"


def test_a_hanging_mutant_is_killed(toy):
    assert toy[1]["n += 0"]["result"] == "timeout"


def test_orphans_of_a_mutant_are_killed():
    """Includes other sessions and grandchildren, each of which would keep the pipe open."""
    code = """
        import subprocess
        from tests.mutate import adopt_orphans, end_children

        adopt_orphans()
        subprocess.run(["sh", "-c", "setsid sh -c 'sleep 90 & sleep 90' &"], check=True)
        end_children()
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, check=True, timeout=60)


class Unchanged:
    """A tree that writes nothing; is_changed is True inside `changed`."""

    is_changed = False

    def source(self, module: str) -> str:
        return "n = 1\n"

    @contextlib.contextmanager
    def changed(self, module: str, source: str):
        self.is_changed = True
        yield
        self.is_changed = False


@pytest.mark.parametrize(
    ("with_mutant", "without", "verdict"),
    [
        ([("timeout", "a"), ("passed", "")], [("timeout", "a")], ("survived", "")),  # slow without the mutant too
        ([("timeout", "a"), ("passed", ""), ("passed", "")], [("passed", "")], ("survived", "")),  # slow by chance
        ([("timeout", "a"), ("timeout", "a")], [("passed", "")], ("timeout", "a")),
        ([("timeout", "a"), ("killed", "a")], [("passed", "")], ("killed", "a")),
        ([("timeout", "a"), ("killed", "b")], [("killed", "a")], ("killed", "b")),
        ([("timeout", ""), ("timeout", "")], [("passed", "")], ("timeout", "")),  # no test to name
    ],
)
def test_a_timeout_counts_only_if_the_mutant_causes_it(with_mutant, without, verdict, monkeypatch):
    tree, results, tried = Unchanged(), {True: [*with_mutant], False: [*without]}, []

    def attempt(tree, tests, slack):
        tried.append([name for name, _ in tests])
        return results[tree.is_changed].pop(0)

    monkeypatch.setattr(mutate, "attempt", attempt)
    mutant = next(mutant for mutant in all_mutants("toy.py", "n = 1\n"))
    assert mutate.judge(tree, mutant, [("a", 1.0), ("b", 1.0)], 5.0) == verdict
    assert results == {True: [], False: []} and tried[0] == ["a", "b"]
    assert tried[1] == (["a", "b"] if with_mutant[0][1] == "" else ["a"])
    assert verdict[1] != "b" or tried[-1] == ["b"]

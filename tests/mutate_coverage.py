"""Record which tests run which lines, once for each test file; map the records to later versions of the sources."""

import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from tests.mutants import Mutant

EVERY_TIME = (
    "[run]\nparallel = true\ndata_file = {data}\ncontext = ${{PYTEST_CURRENT_TEST-}}\ninclude =\n    {include}\n"
)


class Gather:
    """A pytest plugin that records the seconds and the lines, by module, of each passing test.

    The lines and seconds of a shared fixture count for every test that uses it, because each test may run alone.
    Functions that ran while the file was imported, such as those that make the parameters of its tests, are recorded
    under "imported". Processes that a test starts are recorded too, unless they are killed.
    """

    def __init__(self, folder: Path, target: Path):
        self.folder, self.target = folder, target
        self.fixtures: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}
        self.setup: dict[str, float] = {}  # seconds of each shared fixture
        self.failed: set[str] = set()

    def pytest_configure(self):
        import coverage

        self.others = self.target.with_suffix(".processes")
        shutil.rmtree(self.others, ignore_errors=True)
        self.others.mkdir(parents=True)
        include = [f"{self.folder}/{part}" for part in ("gpt/*", "kernels/*", "train.py", "sample.py")]
        words = EVERY_TIME.format(data=self.others / "data", include="\n    ".join(include))
        (self.others / "config").write_text(words)
        os.environ["COVERAGE_PROCESS_START"] = str(self.others / "config")
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=include, messages=False)
        self.coverage.start()
        self.context = ""

    def _switch(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        known = item._fixtureinfo.name2fixturedefs
        self.fixtures[item.nodeid] = [n for n in item.fixturenames if n in known and known[n][-1].scope != "function"]
        before = self._switch(item.nodeid)
        try:
            return (yield)
        finally:
            self._switch(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        shared = fixturedef.scope != "function"
        before = self._switch(f"fixture {fixturedef.argname}") if shared else ""
        began = time.monotonic()
        try:
            return (yield)
        finally:
            if shared:
                self._switch(before)
                name, took = fixturedef.argname, time.monotonic() - began
                self.setup[name] = max(took, self.setup.get(name, 0.0))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def cost(self, name: str) -> float:
        """Seconds of a test that runs alone; the first user of a shared fixture already includes its setup."""
        return max(self.seconds[name], sum(self.setup.get(fixture, 0.0) for fixture in self.fixtures[name]))

    def pytest_sessionfinish(self):
        from coverage import CoverageData

        self.coverage.stop()
        lines: dict[str, dict[str, int]] = {}  # context -> module -> a bit for each line
        data = [self.coverage.get_data()]
        for path in self.others.glob("data.*"):
            data.append(CoverageData(str(path)))
            data[-1].read()
        for part in data:
            for file in part.measured_files():
                module = Path(file).relative_to(self.folder).as_posix()
                for line, contexts in part.contexts_by_lineno(file).items():
                    for context in contexts:
                        own = lines.setdefault(context.rsplit(" (", 1)[0], {})
                        own[module] = own.get(module, 0) | 1 << line
        tests = {}
        for name in self.seconds.keys() - self.failed:
            total = dict(lines.get(name, {}))
            for fixture in self.fixtures[name]:
                for module, mask in lines.get(f"fixture {fixture}", {}).items():
                    total[module] = total.get(module, 0) | mask
            tests[name] = {"seconds": self.cost(name), "lines": {m: f"{mask:x}" for m, mask in total.items()}}
        modules = {module for own in lines.values() for module in own}
        texts = {module: (self.folder / module).read_text() for module in modules}
        sources = {module: _keep(text, self.target.parent) for module, text in texts.items()}
        imported = {m: f"{mask & _bits(_function_lines(texts[m])):x}" for m, mask in lines.get("", {}).items()}
        record = {"sources": sources, "tests": tests, "imported": imported, "failed": sorted(self.failed)}
        record["setup"] = self.setup
        part = self.target.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(record))
        part.replace(self.target)
        shutil.rmtree(self.others)


def _keep(source: str, folder: Path) -> str:
    """Store a source under its digest; return the digest."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    if not (folder / f"{digest}.py").exists():
        (folder / f"{digest}.py").write_text(source)
    return digest


class Coverage:
    """The recorded lines of all tests; chooses the tests of a mutant."""

    def __init__(self, tree, folder: Path):
        self.tree, self.folder = tree, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, dict] = {}

    def target(self, name: str) -> Path:
        return self.folder / f"{Path(name).stem}-{self.tree.digest(name)}.json"

    def missing(self, patterns: list[str]) -> list[str]:
        """List the test files that are new or changed."""
        return [name for name in self.tree.test_files(patterns) if not self.target(name).exists()]

    def gather(self, run, names: list[str]) -> None:
        """Record these test files; run(file, plugin) runs one in a process."""
        for name in names:
            if not self.target(name).exists():
                print(f"recording the lines that {name} runs", flush=True)
                run(name, Gather(self.tree.folder, self.target(name)))

    def load(self, patterns: list[str]) -> None:
        for name in self.tree.test_files(patterns):
            target = self.target(name)
            if target.exists():
                record = json.loads(target.read_text())
                for test in record["tests"].values():
                    test["lines"] = {module: int(mask, 16) for module, mask in test["lines"].items()}
                record["imported"] = {module: int(mask, 16) for module, mask in record["imported"].items()}
                self.records[name] = record
                for test in record["failed"]:
                    print(f"{test} fails and is left out")
            if not target.exists() or not record["tests"]:
                print(f"{name} has no passing test")

    def tests(self, mutant: Mutant) -> list[tuple[str, float]]:
        """List the tests that run a mutant's lines, with seconds: the module's test file first, then the fastest.

        Tests of files that ran the lines only while they were imported come last, as do those that may use a constant:
        of files that import its module.
        """
        found = []
        for name, record in self.records.items():
            digest = record["sources"].get(mutant.module)
            wanted = digest and self._wanted(mutant.module, digest, mutant.lines)
            imported = wanted and record["imported"].get(mutant.module, 0) & wanted
            imported = bool(imported or (not mutant.lines and _imports(self.tree.source(name), mutant.module)))
            for test, entry in record["tests"].items():
                runs = bool(wanted and entry["lines"].get(mutant.module, 0) & wanted)
                if runs or imported:
                    found.append((not runs, Path(mutant.module).stem not in name, entry["seconds"], test))
        if not found and not mutant.lines:
            every = (item for record in self.records.values() for item in record["tests"].items())
            found = [(False, True, entry["seconds"], test) for test, entry in every]
        return [(test, seconds) for *_, seconds, test in sorted(found)]

    @cache  # noqa: B019 - lives as long as the program
    def _wanted(self, module: str, digest: str, lines: range) -> int:
        """Map lines to a bit mask of their numbers in an earlier source; a new line counts as all functions."""
        places = self._places(module, digest)
        old = [places[line] for line in lines if line in places]
        if not old:
            old = [places[line] for line in _function_lines(self.tree.source(module)) if line in places]
        return _bits(old)

    @cache  # noqa: B019
    def _places(self, module: str, digest: str) -> dict[int, int]:
        """Map line numbers of the present source to those of an earlier one."""
        now = self.tree.source(module).split("\n")
        before = (self.folder / f"{digest}.py").read_text().split("\n")
        places = {}
        for a, b, size in difflib.SequenceMatcher(None, now, before, autojunk=False).get_matching_blocks():
            places |= {a + i + 1: b + i + 1 for i in range(size)}
        return places


def _imports(source: str, module: str) -> bool:
    """Whether a file of tests imports a module of the project by its name."""
    package, _, name = module.removesuffix(".py").replace("/", ".").rpartition(".")
    return bool(re.search(rf"^from {re.escape(package)}(\.{name} import| import .*\b{name}\b)", source, re.MULTILINE))


def _bits(lines: Iterable[int]) -> int:
    """A bit for each line."""
    return sum(1 << line for line in set(lines))


def _function_lines(source: str) -> set[int]:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {line for node in functions for line in range(node.body[0].lineno, node.end_lineno + 1)}

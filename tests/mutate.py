"""Make small changes (mutants) to the program, one at a time, and report those that no test notices.

python -m tests.mutate [--module gpt.training.guard] [--mutants 300] [--seed 0]

docs/testing.md explains the report.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis

from tests.mutants import Mutant, all_mutants, sample
from tests.mutate_coverage import Coverage

ROOT = Path(__file__).parents[1]
OURS = ("gpt", "kernels", "tests", "benchmarks", "train", "sample")
PRELOAD = "torch torch._dynamo numpy triton.language transformers tokenizers safetensors.torch tyro rich.progress "
PRELOAD += "matplotlib.pyplot pytest_timeout coverage"
NOT_COPIED = (".git", ".venv*", "build", "dist", "runs", "wandb", "__pycache__", ".*_cache", ".hypothesis")
FIRST = 8.0  # seconds of tests in a mutant's first process; the remaining tests run in a second one
LOAD = 6  # a test that runs this many times longer than measured counts as hanging


class Tree:
    """A copy of the project, where mutants are made and tested."""

    def __init__(self, folder: Path, project: Path):
        self.folder, self.project = folder, project.resolve()
        shutil.copytree(project, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))

    def modules(self) -> list[str]:
        found = [*self.folder.glob("*.py"), *self.folder.glob("gpt/**/*.py"), *self.folder.glob("kernels/**/*.py")]
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    @cache  # noqa: B019 - a tree lives as long as the program
    def source(self, module: str) -> str:
        return (self.folder / module).read_text(encoding="utf-8")

    def test_files(self, patterns: list[str]) -> list[str]:
        found = {path for pattern in patterns or ["*"] for path in self.folder.glob(f"tests/test_{pattern}.py")}
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def digest(self, name: str) -> str:
        return hashlib.sha256((self.folder / name).read_bytes()).hexdigest()[:16]

    @contextlib.contextmanager
    def changed(self, module: str, source: str):
        """Replace the module's source for the processes started inside the block."""
        path, was = self.folder / module, (self.folder / module).stat()
        path.write_text(source, encoding="utf-8")
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 10**12))  # no cached bytecode matches this time
        yield
        path.write_text(self.source(module), encoding="utf-8")
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def preload(modules: list[str]) -> None:
    """Import the tests' libraries, but not the project, once for all processes forked from this one."""
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[threads] = "1"  # forking is safe only before libraries start threads
    os.environ["TRITON_INTERPRET"] = "1"
    for name in modules:
        importlib.import_module(name)
    if "transformers" in modules:
        for name in ("AutoTokenizer", "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
            getattr(sys.modules["transformers"], name)
    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")


def run_tests(tree: Tree, files: list[str], plugin: object, limits: tuple[float, float], log: Path, *words: str) -> int:
    """Run test files in a new process; return pytest's status, -1 if it was killed. limits: seconds per test, total."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(out, 2)
            os.chdir(tree.folder)
            sys.path[:] = [str(tree.folder)] + [p for p in sys.path if Path(p or ".").resolve() != tree.project]
            os.environ["PYTHONPATH"] = str(tree.folder)
            if "-x" in words:  # a mutant
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
                sys.dont_write_bytecode = True
            for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
                del sys.modules[name]
            import pytest

            options = ["-q", "--timeout", str(limits[0]), "--basetemp", str(tree.folder.with_suffix(".tmp"))]
            options += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
            status = int(pytest.main([*options, *words, *files], plugins=[plugin]))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return _wait(pid, limits[1])


def _wait(pid: int, seconds: float) -> int:
    """Wait for a child; return its exit status, -1 after a signal or a timeout. Kills every process it started."""
    deadline = time.monotonic() + seconds
    wait, status = 0.005, -1
    while time.monotonic() < deadline:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(wait)
        wait = min(0.1, wait * 1.5)
    end_children()
    return max(status, -1)


def end_children() -> None:
    """Kill every child, then the processes it leaves behind, which become children of this one: see adopt_orphans."""
    while True:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


class Chosen:
    """A pytest plugin that runs only the named tests, in order, and writes a failing one's name to a file."""

    def __init__(self, names: list[str], failed: Path):
        self.order = {name: i for i, name in enumerate(names)}
        self.failed = failed

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.write_text(report.nodeid)


class Verdicts:
    """The verdicts on mutants, kept in a file for later runs."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.known: dict[str, dict] = {}
        if path.exists() and not fresh:
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.known[record["id"]] = record

    def of(self, mutant: Mutant, tests: str) -> dict | None:
        """Return a verdict that still holds: killed, or survived these very tests."""
        record = self.known.get(mutant.id)
        return record if record and (record["result"] in ("killed", "timeout") or record["tests"] == tests) else None

    def add(self, record: dict) -> None:
        self.known[record["id"]] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


Tests = list[tuple[str, float]]  # names and measured seconds


def judge(tree: Tree, mutant: Mutant, tests: Tests, slack: float) -> tuple[str, str]:
    """Try a mutant; return (killed, timeout, survived or not covered; the failing test).

    A timeout counts only if the test passes without the mutant and fails again with it: the machine may be busy.
    """
    spent, count = 0.0, 0
    while count < len(tests) and spent < FIRST:
        spent, count = spent + tests[count][1], count + 1
    source = mutant.apply(tree.source(mutant.module))
    for part in (tests[:count], tests[count:]):
        while part:
            with tree.changed(mutant.module, source):
                result, name = attempt(tree, part, slack)
            if result == "killed":
                return result, name
            if result == "passed":
                break
            slow = [test for test in part if test[0] == name] or part
            if attempt(tree, slow, slack)[0] == "passed":
                with tree.changed(mutant.module, source):
                    result, name = attempt(tree, slow, slack)
                if result != "passed":
                    return result, name
            part = [test for test in part if test not in slow]
    return ("survived" if tests else "not covered"), ""


def attempt(tree: Tree, tests: Tests, slack: float) -> tuple[str, str]:
    """Run tests in the tree as it is now; return (passed, killed or timeout; the first failing test)."""
    log, failed = tree.folder.with_suffix(".log"), tree.folder.with_suffix(".failed")
    failed.unlink(missing_ok=True)
    names = [name for name, _ in tests]
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    longest = slack + LOAD * max(seconds for _, seconds in tests)
    whole = 2 * slack + len(files) + LOAD * sum(seconds for _, seconds in tests)
    status = run_tests(tree, files, Chosen(names, failed), (longest, whole), log, "-x")
    if status in (0, 5):
        return "passed", ""
    name = failed.read_text() if failed.exists() else ""
    hung = (status == -1 and not name) or "Timeout (>" in log.read_text(errors="replace")
    return ("timeout" if hung else "killed"), name


def load_equivalent(tree: Tree) -> set[tuple[str, str, str]]:
    """Read the (module, line, changed line) of mutants that no test can notice."""
    path = tree.folder / "tests" / "equivalent_mutants.toml"
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []) if path.exists() else []
    return {(entry["module"], entry["line"], entry["becomes"]) for entry in entries if entry["reason"]}


def choose(tree: Tree, modules: list[str], number: int, seed: int, equivalent: set) -> dict[str, list[Mutant]]:
    """Sample valid mutants that are not known to be equivalent, in proportion to each module's lines."""
    lists = {module: sample(all_mutants(module, tree.source(module)), seed) for module in modules}
    lists = {module: mutants for module, mutants in lists.items() if mutants}
    sizes = {module: len({mutant.lines for mutant in mutants}) for module, mutants in lists.items()}
    chosen = {}
    for module, mutants in lists.items():
        source = tree.source(module)
        share = max(3, round(number * sizes[module] / sum(sizes.values())))
        fits = lambda m, source=source: (m.module, *m.difference(source)) not in equivalent and m.is_valid(source)
        chosen[module] = []
        for mutant in mutants:
            if len(chosen[module]) < share and fits(mutant):
                chosen[module].append(mutant)
    return chosen


def report(chosen: dict[str, list[Mutant]], verdicts: Verdicts) -> list[str]:
    """Format the survivors, then a table of the modules."""
    lines, totals = [], Counter()
    table = [f"{'module':40} killed  survived"]
    for module, mutants in sorted(chosen.items()):
        records = [verdicts.known[mutant.id] for mutant in mutants if mutant.id in verdicts.known]
        alive = [record for record in records if record["result"] in ("survived", "not covered")]
        for record in alive:
            lines += [f"{record['result']} ({record['ran']} of {record['of']} tests)  {module}:{record['line']}"]
            lines += [f"    - {record['old']}", f"    + {record['new']}"]
        totals += Counter(killed=len(records) - len(alive), survived=len(alive))
        table.append(f"{module:40} {len(records) - len(alive):6}  {len(alive):8}")
    share = totals["survived"] / max(1, totals.total())
    return [*lines, "", *table, f"{'all':40} {totals['killed']:6}  {totals['survived']:8}  ({share:.1%} survived)"]


def try_all(
    tree: Tree, mutants: list[Mutant], coverage: Coverage, verdicts: Verdicts, budget: float, slack: float
) -> None:
    """Judge the mutants that have no verdict yet."""
    for mutant in mutants:
        known = coverage.tests(mutant)
        tests, spent = [], 0.0
        for name, seconds in known:
            if not tests or spent + seconds <= budget:
                tests.append((name, seconds))
                spent += seconds
        words = [f"{name} {tree.digest(name.partition('::')[0])}" for name, _ in tests]
        digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        if verdicts.of(mutant, digest):
            continue
        began = time.monotonic()
        result, test = judge(tree, mutant, tests, slack)
        source = tree.source(mutant.module)
        old, new = mutant.difference(source)
        record = {"id": mutant.id, "module": mutant.module, "line": source.encode()[: mutant.start].count(b"\n") + 1}
        record |= {"kind": mutant.kind, "old": old, "new": new, "result": result, "by": test, "tests": digest}
        record |= {"ran": len(tests), "of": len(known), "seconds": round(time.monotonic() - began, 1)}
        verdicts.add(record)
        print(f"{result:9} {record['seconds']:6.1f} s  {mutant.module}:{record['line']}  {old}  ->  {new}", flush=True)


def adopt_orphans() -> None:
    """Make this process the parent of its children's orphans (Linux), so that end_children finds them."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def in_processes(trees: list[Tree], work: Callable[[Tree, int], None]) -> None:
    """Run work(tree, number) for each tree, each in its own process."""
    workers = []
    for i, tree in enumerate(trees):
        workers.append(os.fork())
        if workers[-1] == 0:
            try:
                adopt_orphans()
                work(tree, i)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    for pid in workers:
        os.waitpid(pid, 0)


def main(arguments: argparse.Namespace) -> int:
    folder = (arguments.folder or arguments.project / "build" / "mutants").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutate") as place:
        trees = [Tree(Path(place, f"tree{i}"), arguments.project) for i in range(arguments.workers)]
        names = [name.removesuffix(".py").replace(".", "/") for name in arguments.module]
        modules = [m for m in trees[0].modules() if not names or any(f"{m[:-3]}/".startswith(f"{n}/") for n in names)]
        if not modules:
            print(
                f"no module is called {' or '.join(arguments.module)}: give one like gpt.training.guard",
                file=sys.stderr,
            )
            return 2
        chosen = choose(trees[0], modules, arguments.mutants, arguments.seed, load_equivalent(trees[0]))
        order = [mutant for mutants in chosen.values() for mutant in mutants]
        if arguments.list:
            for mutant in order:
                print(mutant.module, mutant.kind, *mutant.difference(trees[0].source(mutant.module)), sep="\n    ")
            return 0
        preload(arguments.preload)
        coverage = Coverage(trees[0], folder / "coverage")
        missing = coverage.missing(arguments.tests)

        def gather(tree: Tree, i: int) -> None:
            run = lambda name, plugin: run_tests(tree, [name], plugin, (900, 3600), tree.folder.with_suffix(".log"))
            Coverage(tree, coverage.folder).gather(run, missing[i :: len(trees)])

        in_processes(trees, gather)
        coverage.load(arguments.tests)
        verdicts = Verdicts(folder / "verdicts.jsonl", arguments.fresh)
        random.Random(arguments.seed).shuffle(order)

        def try_share(tree: Tree, i: int) -> None:
            log = tree.folder.with_suffix(".log")
            run_tests(tree, ["tests"], Chosen([], log), (60, 600), log)  # compiles the tree's files
            try_all(tree, order[i :: len(trees)], coverage, verdicts, arguments.budget, arguments.slack)

        in_processes(trees, try_share)
    print(*report(chosen, Verdicts(verdicts.path, False)), sep="\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=300, help="number of mutants, over all modules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", default=[], help="only this module or package; repeatable")
    parser.add_argument("--budget", type=float, default=60.0, help="measured seconds of tests per mutant")
    parser.add_argument("--slack", type=float, default=30.0, help="extra seconds before a test counts as hanging")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tests", action="append", default=[], help="only tests/test_TESTS.py; repeatable")
    parser.add_argument("--folder", type=Path, help="where to keep coverage and verdicts (build/mutants)")
    parser.add_argument("--preload", nargs="*", default=PRELOAD.split(), help=argparse.SUPPRESS)
    parser.add_argument("--project", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--fresh", action="store_true", help="also try mutants that have a verdict")
    parser.add_argument("--list", action="store_true", help="show the mutants without trying them")
    sys.exit(main(parser.parse_args()))

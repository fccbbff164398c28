"""The directions of imports between rooms, circles, and the lengths of files and functions."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("gpt/**/*.py"), *ROOT.glob("kernels/**/*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

# What each room may import beside itself. "options" are the rooms' config.py, which gpt/config.py composes.
ALLOWED = {
    "kernels": set(),
    "ground": set(),
    "options": {"ground"},
    "config": {"ground", "options"},
    "model": {"ground", "options", "kernels"},
    "data": {"ground", "options", "config"},
    "inference": {"ground", "options", "model", "data"},
    "run": {"ground", "options", "config", "model", "data"},
    "interop": {"ground", "options", "config", "model", "data", "run"},
    "evaluation": {"ground", "options", "model", "data", "inference", "run", "interop"},
    "training": {"ground", "options", "config", "model", "data", "inference", "run", "interop"},
    "front": {"ground", "config", "model", "inference", "run", "interop", "data", "evaluation"},
    "scripts": {"ground", "config", "model", "data", "inference", "run", "interop", "evaluation", "training", "front"},
}
CONFIG = {"gpt.config", "gpt.config_file"}
FRONT = {"gpt", "gpt.corpus", "gpt.evaluate", "gpt.export"}  # the public names of `import gpt`, and the commands
ATTENDS = "gpt.inference.attend"  # the one module of its room that imports kernels


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "gpt":
        return "kernels" if parts[0] == "kernels" else "scripts"
    if module in FRONT:
        return "front"
    if module in CONFIG:
        return "config"
    if len(parts) > 2 and parts[2] == "config":
        return "options"
    return parts[1] if parts[1] in ALLOWED else "ground"


def imported(path: Path) -> set[str]:
    """List the modules that a file imports, anywhere in it, and `module.name` for each imported name.

    `from room import module` counts as the module alone, because the room's __init__ runs first in any case.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names | ({node.module} if names - MODULES.keys() else set())
    return found


def ours(module: str) -> set[str]:
    """List the project's modules that a module imports. A name that a room re-exports counts as the room."""
    return imported(MODULES[module]) & MODULES.keys() - {module}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_below(module):
    room = room_of(module)
    allowed = ALLOWED[room] | {room} | ({"kernels"} if module == ATTENDS else set())
    wrong = {name: room_of(name) for name in ours(module) if room_of(name) not in allowed}
    assert not wrong, f"{module} is in {room}, which may import {', '.join(sorted(allowed))}"


def test_no_circles():
    try:
        TopologicalSorter({module: ours(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) == "kernels"])
def test_kernels_import_torch_and_triton_only(module):
    packages = {name.split(".")[0] for name in imported(MODULES[module])}
    assert packages <= {"kernels", "torch", "triton"} | sys.stdlib_module_names


def test_files_and_functions_stay_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}
    assert lengths[ROOT / "train.py"] < 200
    functions = [
        (f"{path}:{node.name}", node.end_lineno - node.lineno + 1)
        for path in [*FILES, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {name: n for name, n in functions if n > 80} == {}


def test_every_room_has_a_docstring():
    rooms = list(ROOT.glob("gpt/*/__init__.py"))
    assert len(rooms) == 7
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in rooms)


def test_imports_are_found():
    """Guards against tests that pass because they find nothing."""
    assert {"kernels.masks", "torch"} <= imported(ROOT / "gpt" / "model" / "attention.py")
    assert "kernels.tiles.dot" in imported(ROOT / "kernels" / "attention_forward.py")
    assert "gpt.training.job" in ours("train")
    rooms = set(map(room_of, MODULES))
    assert rooms == ALLOWED.keys()

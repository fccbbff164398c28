"""Who may import whom: train.py, sample.py -> gpt -> kernels -> torch, triton. Never upward."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("gpt/**/*.py"), *ROOT.glob("kernels/**/*.py")]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as `package.module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[0]
            module = node.module or "" if node.level == 0 else ".".join(filter(None, [package, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    if room == "kernels":
        allowed = {"kernels", "torch", "triton"} | sys.stdlib_module_names
        assert packages(path) <= allowed, f"kernels takes torch and triton only, not {packages(path) - allowed}"
    elif room == "gpt":
        assert not packages(path) & {"train", "sample", "benchmarks", "tests"}
        if path.name not in ("model.py", "model_inputs.py", "span.py", "plan.py"):
            assert "kernels" not in packages(path), "only the model, gpt/span.py and gpt/plan.py import kernels"
    else:
        assert not packages(path) & {"kernels", "benchmarks", "tests"}


def test_the_walk_sees_imports():
    """It would pass everything if it saw nothing."""
    assert {"kernels", "torch"} <= packages(ROOT / "gpt" / "model.py")
    assert "kernels.tiles.dot" in imported(ROOT / "kernels" / "attention_forward.py")

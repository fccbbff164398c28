"""Shared fixtures. Kernels run on a GPU if Triton supports it, else on the CPU in Triton's interpreter."""

import contextlib
import functools
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

# `benchmarks` and `tests` are not installed; `gpt` and `kernels` need not be.
sys.path.insert(0, str(Path(__file__).parents[1]))

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
WHY_NO_GPU = "no GPU from sm_80 up: tests marked gpu were deselected, kernels ran in Triton's interpreter"

if not HAS_GPU:
    # Triton reads this when a kernel is defined, so it must be set before the import.
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    assert interprets or "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // workers) if hasattr(os, "sched_getaffinity") else 1
        )


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"kernels ran on {torch.cuda.get_device_name()}" if HAS_GPU else WHY_NO_GPU)


# Marks of test files that compare computed numbers, which make numerics runs.
NUMERIC = re.compile(
    r"assert_close|allclose|approx\(|finfo|gradcheck|\.abs\(\)|torch\.equal\(|(attention|decode|loss)_checks|fuzz_attention"
)


@functools.cache
def is_numeric(path: Path) -> bool:
    return NUMERIC.search(path.read_text(encoding="utf-8")) is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark numeric tests. With a GPU, mark every test that uses `device` as gpu too; without one, drop gpu tests."""
    for item in items:
        if is_numeric(item.path):
            item.add_marker("numeric")
    if HAS_GPU:
        for item in items:
            if "device" in item.fixturenames:
                item.add_marker("gpu")
        return
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


@pytest.fixture(scope="session")
def device() -> str:
    """The device that kernels run on here."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def make(tmp_path):
    """make(corpus, tokenizer, key=value ...) prepares a corpus in the test's own cache."""
    from gpt.data.config import DataConfig, TokenizerConfig
    from gpt.data.corpus import prepare

    def make(corpus: object, tokenizer: str = "char", *, fixed=None, progress=None, size=300, **data):
        names = corpus if isinstance(corpus, tuple) else (corpus,)
        config = DataConfig(tuple(map(str, names)), tmp_path / "cache", **data)
        return prepare(config, TokenizerConfig(tokenizer, size), fixed_tokenizer=fixed, progress=progress)

    return make


@pytest.fixture
def named(monkeypatch):
    """A small encoding that tiktoken offers under the name gpt2."""
    import tiktoken

    from gpt.data.build_tokenizer import build_tokenizer
    from gpt.data.config import TokenizerConfig
    from tests.tokenizer_checks import make_named

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: make_named())
    return build_tokenizer(TokenizerConfig("gpt2"), list)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A user's run directory: byte tokenizer, one layer of Qwen3, three steps."""
    from gpt.training.command import load_config
    from train import main

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text("all work and no play makes jack a dull boy\n" * 20)
    words = ["--corpus", folder / "text.txt", "--run-dir", folder / "run", "--cache-dir", folder / "cache"]
    words += ["--tokenizer", "byte", "--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--seq-len", 32]
    words += ["--max-steps", 3, "--sample-tokens", 0, "--device", "cpu", "--dtype", "float32"]
    assert main(load_config(list(map(str, words)))) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def made_run(tmp_path_factory) -> Path:
    """A folder with text.txt and a run of four steps, shared by all tests."""
    from tests.run_checks import make_run

    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        make_run(folder)
    return folder


@pytest.fixture
def run(made_run, tmp_path, monkeypatch, capsys) -> Path:
    """A copy of the run of four steps, in the working directory."""
    shutil.copytree(made_run, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    capsys.readouterr()
    return tmp_path / "copy" / "run"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A new working directory with a corpus of 2,736 characters, text.txt, and its own cache."""
    from tests.train_checks import TEXT

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path

"""gpt/device.py and the threads of this process."""

import importlib
import os
import shutil

import pytest
import torch

import gpt
from gpt.device import require_compiler
from gpt.errors import UserError


def test_waiting_threads_spin_briefly_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    importlib.reload(gpt)
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    importlib.reload(gpt)
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_compiling_on_a_cpu_needs_a_compiler(monkeypatch):
    installed = set()
    monkeypatch.setattr(shutil, "which", lambda name: name if name in installed else None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="--compile needs a C"):
        require_compiler(torch.device("cpu"))
    require_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", "my-c++")
    for name in ("c++", "g++", "clang++", "my-c++"):
        installed.clear()
        installed.add(name)
        require_compiler(torch.device("cpu"))

"""How long threads that wait for each other spin."""

import importlib
import os

import gpt


def test_waiting_threads_spin_briefly_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    importlib.reload(gpt)
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    importlib.reload(gpt)
    assert os.environ["GOMP_SPINCOUNT"] == "7"

"""How many threads tokenize a corpus, and how long threads spin."""

import importlib
import os

import pytest

import gpt
from gpt.data.tokenize_corpus import cores as available


@pytest.mark.parametrize(("allowed", "count", "cores"), [({1, 5, 7}, 64, 3), (None, 6, 6), (None, None, 1)])
def test_cores_that_may_be_used_else_that_are_there_else_one(allowed, count, cores, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    if allowed is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed if process == 0 else {0, 1}, raising=False)
    assert available() == cores


def test_waiting_threads_spin_briefly_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    importlib.reload(gpt)
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    importlib.reload(gpt)
    assert os.environ["GOMP_SPINCOUNT"] == "7"

"""Tokenizing on several threads: how many there are, and how much they hold."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from types import SimpleNamespace

import pytest

from gpt.data import tokenize_corpus
from gpt.data.tokenize_corpus import cores as available
from tests.corpus_checks import POEM, write


@pytest.mark.parametrize(("allowed", "count", "cores"), [({1, 5, 7}, 64, 3), (None, 6, 6), (None, None, 1)])
def test_cores_counts_those_allowed_else_all_else_one(allowed, count, cores, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    if allowed is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: allowed if process == 0 else {0, 1}, raising=False)
    assert available() == cores


class Ahead(ThreadPoolExecutor):
    """Threads that have finished whenever the reader looks."""

    def submit(self, function, *arguments):
        future = super().submit(function, *arguments)
        wait([future])
        return future


class Behind(ThreadPoolExecutor):
    """Threads that begin when the reader waits for them."""

    def submit(self, function, *arguments):
        return SimpleNamespace(result=partial(function, *arguments))


@pytest.mark.parametrize("threads", [ThreadPoolExecutor, Ahead, Behind])
def test_memory_stays_bounded(tmp_path, make, monkeypatch, threads):
    """30 MB of text pass in chunks: however threads are scheduled, Python holds about half of it at most."""
    line = b"It was the best of times, it was the worst of times,\n"
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        for _ in range(300):
            file.write(line * 2000)
    monkeypatch.setattr(tokenize_corpus, "ThreadPoolExecutor", threads)
    make(write(tmp_path / "warm.txt", POEM), "byte")
    tracemalloc.start()
    try:
        make(path, "byte")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert peak < 16e6

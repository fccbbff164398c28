"""Traced steps, written files and messages of the profiler."""

import gzip
import json

import pytest
import torch

from gpt.training.profile import Profiler


def trace(folder, steps: int, taken: int) -> tuple[list[str], list[int]]:
    """Profile a run of `taken` steps; return the messages and the traced steps, from 0."""
    said: list[str] = []
    profiler = Profiler(folder, steps, said.append)
    for n in range(taken):
        torch.zeros(n + 1).exp()
        profiler.step()
    profiler.close()
    profiler.close()  # a second time does nothing
    file = folder / "trace.json.gz"
    if not file.exists():
        return said, []
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    return said, sorted(int(name.partition("#")[2]) for name in names)


@pytest.mark.parametrize(("steps", "taken", "traced"), [(1, 9, [3]), (2, 9, [3, 4]), (3, 5, [3, 4, 5])])
def test_the_steps_after_the_first_three_are_traced(tmp_path, steps, taken, traced):
    said, found = trace(tmp_path, steps, taken)
    assert found == traced
    table = (tmp_path / "profile.txt").read_text()
    assert table.endswith("\n") and not table.endswith("\n\n\n")
    assert said == [table[:-1], f"trace: {tmp_path}/trace.json.gz, table: {tmp_path}/profile.txt"]


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_run_that_ends_before_the_trace_says_so(tmp_path, taken):
    assert trace(tmp_path, 2, taken) == (["no step was traced: the first 3 steps never are"], [])
    assert list(tmp_path.iterdir()) == []


def test_without_profile_steps_nothing_happens(tmp_path):
    assert trace(tmp_path, 0, 5) == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_costliest_operations_first(tmp_path):
    said: list[str] = []
    profiler = Profiler(tmp_path, 1, said.append)
    x = torch.randn(300, 300)
    for _ in range(4):
        for name in ("exp", "sin", "cos", "tanh", "sqrt", "abs", "neg", "floor", "ceil", "sign", "relu", "sigmoid"):
            getattr(x[:1], name)()
            for wrapped in (torch.logsumexp, torch.softmax, torch.cumsum, torch.amax, torch.argmax):
                wrapped(x[:1], 1)
        _ = x @ x
        profiler.step()
    profiler.close()
    lines = said[0].splitlines()
    rule = [i for i, line in enumerate(lines) if line.startswith("---")]
    rows = lines[rule[1] + 1 : rule[2]]
    assert len(rows) == 15
    shares = [float(row.split()[1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)

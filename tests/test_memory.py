"""Memory of a plan beside the model's tensors: the loss, the process and the heap."""

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gpt.config import PRESETS, Config, ModelConfig
from gpt.training.config import TrainConfig
from gpt.training.plan import memory_of, process_bytes
from kernels import linear_cross_entropy
from kernels.linear_cross_entropy import MOST_LOGITS, workspace_bytes
from tests.run_checks import TEXT, status_of

CPU = torch.device("cpu")
reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells in /proc what a process takes")


def held_while(call) -> int:
    """Measure the peak of allocated bytes during call(), without those of its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    return max(itertools.accumulate(sizes)) - sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "V", "C"), [(350, 50304, 8), (1000, 20001, 8), (72, 300_000, 64)], ids=str)
def test_the_workspace_of_the_loss(N, V, C, dtype):
    """Several chunks, one chunk, and a product as large as the weight that exceeds the chunk's copies."""
    x, weight = (torch.randn(rows, C, requires_grad=True) for rows in (N, V))
    targets = torch.randint(V, (N,))

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return linear_cross_entropy(x, weight, targets)

    small = 10 * 4 * N + N * C * 4  # losses, lse, masks and targets without a value, and x in 16 bits
    counted = workspace_bytes(N, V, C, dtype, "cpu")
    assert N * V > MOST_LOGITS and counted <= held_while(loss) <= counted + small


def test_few_logits_are_kept_and_on_a_gpu_a_chunk_is_held_without_copies():
    assert workspace_bytes(MOST_LOGITS // 64, 64, 8, torch.float32, "cpu") == 0
    assert workspace_bytes(MOST_LOGITS // 64 + 1, 64, 8, torch.float32, "cpu") > 0
    assert workspace_bytes(1024, 64, 8, torch.float32, "cuda") == 1024 * 64 * 4
    assert workspace_bytes(1024, 64, 8, torch.bfloat16, "cuda") == 1024 * 64 * 2 + 64 * 8 * 2


def test_a_plan_has_the_loss_of_its_micro_batch_in_its_dtype():
    model = ModelConfig(**PRESETS["gpt2"], n_layer=1, n_head=2, n_embd=16, seq_len=50, vocab_size=70_000)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        config = Config(model=model, train=TrainConfig(batch_size=6, dtype=name))
        memory = memory_of(config, CPU)
        assert memory.loss == workspace_bytes(300, 70_000, 16, dtype, "cpu") > 0 == memory.process
        assert memory.total == memory_of(config, CPU, 2).total == replace(memory, loss=0).total + memory.loss


@reads_proc
def test_process_memory_counts_on_a_cpu():
    before = process_bytes(CPU)
    block = torch.ones(16 << 20)
    assert 60 << 20 < process_bytes(CPU) - before < 70 << 20 < before
    assert process_bytes(torch.device("meta")) == 0 and block.all()


HEAP = """
import sys, torch
from gpt.device import give_back_freed_memory
from gpt.training.plan import process_bytes
if sys.argv[1] == "give back":
    give_back_freed_memory()
torch.empty(20 << 20, dtype=torch.uint8)  # glibc keeps pieces of this size from here on
pieces = [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(32)]
before = process_bytes(torch.device("cpu"))
del pieces[:-1]
print(before - process_bytes(torch.device("cpu")))
"""


@reads_proc
@pytest.mark.parametrize(("mode", "MiB"), [("give back", 124), ("keep", 0)])
def test_freed_memory_is_returned_to_the_system(mode, MiB):
    """Without the call the memory stays, so the test can fail."""
    done = subprocess.run([sys.executable, "-c", HEAP, mode], capture_output=True, text=True, check=True)
    assert abs((int(done.stdout) >> 20) - MiB) < 10


@pytest.mark.parametrize("recompute", [True, False])
def test_activation_checkpointing_on_a_cpu_returns_freed_memory(recompute, tmp_path, monkeypatch):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.training.start.give_back_freed_memory", lambda: calls.append(1))
    (tmp_path / "text.txt").write_text(TEXT)
    assert status_of("--max-steps", "1", *["--activation-checkpointing"] * recompute) == 0
    assert len(calls) == recompute


def test_a_dry_run_on_a_cpu_shows_the_process_and_adds_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpt.training.plan.process_bytes", lambda device: 300 << 20)
    (tmp_path / "text.txt").write_text(TEXT)
    assert status_of("--dry-run") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert line.endswith(", process 300.0 MiB") and line.split()[1].startswith("30") and line.split()[2] == "MiB"

"""Two processes under torchrun equal one process with the whole batch: DDP and FSDP2, with gloo on the CPU."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import gpt.training.muon
from gpt.config import ModelConfig
from gpt.distributed import World, _device_of, full
from gpt.model import GPT
from gpt.run.checkpoint import verify
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from gpt.training.parallel import Parallel
from tests.optimizer_checks import use_optimizer
from train import main

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"{a} and {b} went up the hill, said {c}.\n" for a in "JKLM" for b in "abcdef" for c in "xyz")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def flags(run_dir: str, batch_size: int, *more: str) -> list[str]:
    """A small model with weights whose rows do not divide by two processes."""
    words = f"--corpus text.txt --cache-dir cache --run-dir {run_dir} --device cpu --dtype float32 --n-layer 2"
    words += f" --n-head 3 --n-embd 24 --mlp-dim 21 --seq-len 16 --batch-size {batch_size} --grad-accum-steps 2"
    words += (
        " --warmup-steps 2 --max-steps 6 --eval-interval 3 --eval-tokens 200 --checkpoint-interval 3 --log-interval 1"
    )
    return [*words.split(), "--sample-tokens", "5", *more]


RECIPES = {
    "adamw": shlex.split("--preset gpt2 --window 9 --grad-clip 0.5 --ema-decay 0.5 --corpus docs --packing best_fit"),
    "muon": shlex.split(
        "--optimizer muon --learning-rate 0.02 --n-kv-head 1 --value-embeds 1 --activation-checkpointing "
        "--corpus docs text.txt --corpus-weights 0.6 0.4 --packing documents"
    ),
}


# Optimizers that gpt.training lacks: with numbers for a weight, and with each rank's rows in plain tensors.
OTHERS = ("nadam", "local-momentum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train each recipe with one process and with two, and resume each from the other's checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(gpt.training.muon, "multiplies_bfloat16", lambda device: False)  # as in the worker
        (folder / "text.txt").write_text(TEXT)
        (folder / "docs").mkdir()
        for i in range(12):
            (folder / f"docs/{i}.txt").write_text(TEXT[95 * i :][: 40 + 30 * i])
        for name, recipe in RECIPES.items():
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert main(load_config(flags(f"{name}-one", 8, *recipe))) == 0
            (folder / f"{name}-one/printed").write_text(printed.getvalue())
        together = []
        for name, recipe in RECIPES.items():
            for mode in ("ddp", "fsdp"):
                half = ["--resume-from", f"{name}-{mode}/checkpoints/step_00000003"]
                other = ["--resume-from", f"{name}-one/checkpoints/step_00000003"]
                together += [
                    flags(f"{name}-{mode}", 4, *recipe, "--parallel", mode),
                    flags(f"{name}-{mode}-again", 4, *recipe, "--parallel", mode, *half),
                    flags(f"{name}-one-{mode}", 4, *recipe, "--parallel", mode, *other),
                ]
        for name in OTHERS:
            with patch.context() as other:
                use_optimizer(other, name)
                assert main(load_config(flags(f"{name}-one", 8))) == 0
            for mode in ("ddp", "fsdp"):
                half = ["--resume-from", f"{name}-{mode}/checkpoints/step_00000003"]
                together.append([*flags(f"{name}-{mode}", 4, "--parallel", mode), {"optimizer": name}])
                together.append([*flags(f"{name}-{mode}-again", 4, "--parallel", mode, *half), {"optimizer": name}])
        together.append([*flags("small-ddp", 4, *RECIPES["adamw"], "--parallel", "ddp"), 1])
        printed = launch(folder, together).split("written:")
        for words, text in zip(together, printed, strict=False):
            (folder / words[words.index("--run-dir") + 1] / "printed").write_text(text)
        for name, recipe in RECIPES.items():
            for mode in ("ddp", "fsdp"):
                half = ["--resume-from", f"{name}-{mode}/checkpoints/step_00000003"]
                assert main(load_config(flags(f"{name}-{mode}-one", 8, *recipe, *half))) == 0
    torch.set_num_threads(threads)
    return folder


def launch(folder: Path, command_lines: list[list[str]]) -> str:
    (folder / "configs.json").write_text(json.dumps(command_lines))
    command = [*LAUNCH, str(ROOT / "tests/distributed_worker.py"), "configs.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def lasting(run_dir: Path, since: int = 0) -> list[dict]:
    """Read the metrics after a step, without values that depend on the clock."""
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["step"] > since]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def samples(printed: Path) -> list[str]:
    """Read the sample of each evaluation."""
    return re.findall(r"(?m)^step \d+: validation.*\n((?:  \| .*\n)+)", printed.read_text())


def checkpoint(run_dir: Path) -> dict[str, torch.Tensor]:
    files = (run_dir / "checkpoints/step_00000006").glob("*.safetensors")
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", RECIPES)
class TestTwoProcesses:
    def test_losses_equal_those_of_one_process(self, folder, recipe, mode):
        one, two = lasting(folder / f"{recipe}-one"), lasting(folder / f"{recipe}-{mode}")
        assert len(one) == len(two) == 8
        for a, b in zip(one, two):
            assert a == pytest.approx(b, rel=1e-6)

    def test_write_the_same_samples(self, folder, recipe, mode):
        one, two = (samples(folder / f"{recipe}-{who}/printed") for who in ("one", mode))
        assert len(one) == 2 and one == two

    def test_checkpoints_equal_those_of_one_process(self, folder, recipe, mode):
        """To what sums in another order lose.

        Muon's Newton-Schulz steps stretch small singular values, and their rounding, by 3.4445 each, five times in each
        of six updates of learning_rate: 4e-6, of weights that go 30,000 times as far.
        """
        one, two = checkpoint(folder / f"{recipe}-one"), checkpoint(folder / f"{recipe}-{mode}")
        assert one.keys() == two.keys()
        atol = {"adamw": 1e-6, "muon": 6 * 0.02 * gpt.training.muon.NEWTON_SCHULZ[0] ** 5 * 2.0**-24}[recipe]
        torch.testing.assert_close(one, two, rtol=1e-5, atol=atol)

    def test_two_processes_resume_exactly(self, folder, recipe, mode):
        whole, again = folder / f"{recipe}-{mode}", folder / f"{recipe}-{mode}-again"
        assert lasting(whole, since=3) == lasting(again)
        one, two = checkpoint(whole), checkpoint(again)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    def test_one_and_two_processes_resume_each_others_runs(self, folder, recipe, mode):
        expected = lasting(folder / f"{recipe}-one", since=3)
        for name in (f"{recipe}-one-{mode}", f"{recipe}-{mode}-one"):
            for a, b in zip(expected, lasting(folder / name), strict=True):
                assert a == pytest.approx(b, rel=1e-6)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_in_two_processes(folder, name, mode):
    """It equals one process, and resumes bit for bit."""
    one, two, again = (checkpoint(folder / f"{name}-{kind}") for kind in ("one", mode, f"{mode}-again"))
    assert one.keys() == two.keys() == again.keys()
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(two[key], again[key]) for key in two)


def test_all_ranks_halve_their_micro_batches_if_one_is_out_of_memory(folder):
    """The last rank has memory for one row, not for four; the step equals that of the whole batch."""
    printed = (folder / "small-ddp/printed").read_text()
    assert re.findall(r"out of memory: .*", printed) == [
        f"out of memory: micro-batches have {rows} rows from now on instead of {2 * rows}" for rows in (2, 1)
    ]
    for a, b in zip(lasting(folder / "adamw-one"), lasting(folder / "small-ddp"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    torch.testing.assert_close(checkpoint(folder / "adamw-one"), checkpoint(folder / "small-ddp"), rtol=1e-5, atol=1e-6)


@pytest.fixture
def world():
    """Make a process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(torch.device("cpu"), joined=True)
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_are_reduced_once_a_step(world, mode):
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, seq_len=8, vocab_size=11))
    parallel = Parallel(model, world, mode)
    reductions = []
    if mode == "ddp":
        parallel.loss.register_comm_hook(None, lambda _, bucket: reductions.append(1) or allreduce_hook(None, bucket))
    idx = torch.arange(8).view(1, 8)
    for step in range(2):
        for reduced in (False, False, True):
            with parallel.gradients(reduced=reduced):
                parallel.loss(idx, idx).backward()
            if mode == "ddp":
                assert len(reductions) == step + reduced
            else:  # what is not reduced has not reached the shards
                assert all((p.grad is not None) == reduced for p in model.parameters())
        for p in model.parameters():
            p.grad = None


@pytest.mark.parametrize("compiled", [False, True])
def test_each_block_is_a_unit_of_fsdp(compiled, world):
    """Each block is sharded, gathered and compiled by itself; the root unit holds the weights outside the blocks."""
    from torch.distributed.fsdp import FSDPModule

    model = GPT(ModelConfig(n_layer=3, n_head=2, n_embd=16, seq_len=8, vocab_size=11))
    parallel = Parallel(model, world, "fsdp", compiled=compiled)
    assert [block._compiled_call_impl is not None for block in model.blocks] == [compiled] * 3
    units = [module for module in parallel.loss.modules() if isinstance(module, FSDPModule)]
    assert units == [parallel.loss, *model.blocks]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_micro_batch_without_targets_adds_zero(world, mode):
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, seq_len=8, vocab_size=11, init="gpt2"))
    parallel = Parallel(model, world, mode)
    idx, gradients = torch.arange(8).view(1, 8), []
    for batches in ([idx], [torch.full_like(idx, -100), idx, torch.full_like(idx, -100)], [torch.full_like(idx, -100)]):
        shares = world.shares(torch.tensor([float((y >= 0).sum()) for y in batches]))
        for n, (y, share) in enumerate(zip(batches, shares, strict=True), start=1):
            with parallel.gradients(reduced=n == len(batches)):
                (parallel.loss(idx, y) * share).backward()
        gradients.append([full(p.grad).clone() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    some, among_empty, empty = gradients
    torch.testing.assert_close(among_empty, some, rtol=1e-6, atol=0)
    assert all(bool(g.any()) for g in some) and not any(bool(g.any()) for g in empty)


def test_shares_are_relative_to_the_mean_over_ranks():
    class Two(World):
        def mean(self, value):
            return (value + 5.0) / 2  # the other rank has five

    two = Two(torch.device("cpu"), 0, 2)
    assert two.shares(torch.tensor([1.0, 0.0, 2.0])).tolist() == [0.25, 0.0, 0.5]
    assert World(torch.device("cpu")).shares(torch.tensor([0.0, 0.0])).tolist() == [0.0, 0.0]
    assert World(torch.device("cpu")).shares(torch.tensor([0.25, 0.25])).tolist() == [0.5, 0.5]


@pytest.fixture
def job(tmp_path):
    """Return job(flag, ...), which starts an endless training of two processes and waits for its first steps."""
    (tmp_path / "text.txt").write_text(TEXT)
    started = []

    def job(*more: str) -> tuple[subprocess.Popen, dict[str, int]]:
        endless = ["--max-steps", "100000", "--eval-interval", "100000", "--checkpoint-interval", "100000"]
        command = [*LAUNCH, str(ROOT / "train.py"), *flags("run", 4, *endless, *more)]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        deadline = time.monotonic() + 60
        while len(read_metrics(tmp_path / "run/metrics.jsonl")) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            os.sched_yield()
        return process, {rank_of(pid): pid for pid in children_of(process.pid)}

    yield job
    for process in started:
        if process.poll() is None:
            for pid in (*children_of(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)


def test_a_killed_rank_ends_the_job(job):
    process, ranks = job()
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert "lost contact with another process" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_a_signal_stops_all_ranks_at_one_step_and_saves(job, tmp_path):
    process, _ = job("--parallel", "fsdp")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "stopped by SIGTERM after step" in output, errors
    (newest,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert verify(newest) is None
    assert int(newest.name.removeprefix("step_")) == read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"]


def test_a_signal_in_an_evaluation_stops_all_ranks_and_saves(job, tmp_path):
    """The evaluation after step 3 would read a million tokens; one of the two ranks gets the signal."""
    (tmp_path / "text.txt").write_text(TEXT * 4000)
    process, ranks = job("--tokenizer", "byte", "--eval-interval", "3", "--eval-tokens", "1000000")
    os.kill(ranks["1"], signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "after step 3; continue with --resume, beginning with the evaluation of that step" in output, errors
    assert verify(tmp_path / "run/checkpoints/step_00000003") is None
    assert [r["step"] for r in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert "exitcode  : 4" in errors


def test_all_ranks_roll_back_and_give_up_together(tmp_path):
    """The rate is so high that the weights are not finite after the first step."""
    (tmp_path / "text.txt").write_text(TEXT)
    words = flags("run", 4, "--parallel", "fsdp", "--learning-rate", "1e30", "--warmup-steps", "0")
    words += [
        "--checkpoint-interval",
        "1",
        "--max-skipped-steps",
        "2",
        "--max-rollbacks",
        "2",
        "--eval-interval",
        "100",
    ]
    command = [*LAUNCH, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment())
    assert "rollback 2: continuing from step 1 with other data" in done.stdout, done.stderr
    assert "training gives up; the checkpoint step_00000001 is valid" in done.stdout
    assert "exitcode: 3" in done.stderr
    assert verify(tmp_path / "run/checkpoints/step_00000001") is None


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str | None:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((entry[5:].decode() for entry in entries if entry.startswith(b"RANK=")), None)


def test_without_a_gpu_ranks_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device_of(1, "auto") == torch.device("cpu")

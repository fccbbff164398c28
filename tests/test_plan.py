"""The plan of a run counts what a real run uses; --dry-run, traces and MFU."""

import math
from dataclasses import replace

import pytest
import torch

from gpt.config import PRESETS, Config, ModelConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.run.metrics import read_metrics
from gpt.training import plan
from gpt.training.config import OptimConfig, TrainConfig
from gpt.training.hardware import mfu, peak_of
from gpt.training.optim import build_optimizers
from gpt.training.plan import Memory, describe, duration, fewer_rows, memory_of, saved_bytes, size, sparkline
from tests.run_checks import TEXT, status_of

CPU = torch.device("cpu")


def config_of(preset: str, **options) -> Config:
    model = ModelConfig(**PRESETS[preset], n_layer=2, n_head=2, n_embd=32, seq_len=48, vocab_size=70)
    return Config(model=model, optim=OptimConfig(**options), train=TrainConfig(batch_size=3, dtype="float32"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_planned_memory_equals_that_of_a_real_step(preset, optimizer):
    """Compares weights and optimizer states after a step, and activations that autograd saves."""
    config = config_of(preset, optimizer=optimizer)
    planned = memory_of(config, CPU)
    model = GPT(config.model)
    assert planned.activations == saved_bytes(model, 3, "float32") > 0
    optimizers = build_optimizers(model, config.optim)
    idx = torch.randint(70, (3, 48))
    model.loss(idx, idx).backward()
    for each in optimizers:
        each.step()
    states = [x for each in optimizers for s in each.state.values() for x in s.values() if x.ndim > 0]
    assert planned.optimizer == sum(4 * x.numel() for x in states)
    assert planned.weights == planned.gradients == 4 * model.num_parameters()
    assert planned.total == sum((planned.weights, planned.gradients, planned.optimizer, planned.activations))


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_activations_with_packed_documents(packing):
    """Positions and segments of each row are saved, too."""
    config = config_of("modern")
    config = replace(config, data=replace(config.data, packing=packing))
    planned, model = memory_of(config, CPU).activations, GPT(config.model)
    assert planned == saved_bytes(model, 3, "float32", packing) > saved_bytes(model, 3, "float32")


@pytest.mark.parametrize(
    "options",
    [{"window": 7, "seq_len": 51}, {"position": "alibi", "seq_len": 52}, {"window": 5, "window_pattern": "SL"}],
    ids=["window", "alibi", "pattern"],
)
def test_activations_include_saved_masks(options):
    """Planned before the mask is first created, and after."""
    config = config_of("modern")
    config = replace(config, model=replace(config.model, **options))
    planned = memory_of(config, CPU).activations
    assert planned == saved_bytes(GPT(config.model), 3, "float32") == memory_of(config, CPU).activations


def test_memory_with_average_shards_and_checkpointing():
    plain, more = config_of("modern"), config_of("modern", ema_decay=0.9)
    few = Config(model=plain.model, train=replace(plain.train, activation_checkpointing=True, parallel="fsdp"))
    one, average, two = memory_of(plain, CPU), memory_of(more, CPU), memory_of(few, CPU, 2)
    assert average.total - one.total == average.average == one.weights
    assert (two.weights, two.gradients, two.optimizer) == (one.weights // 2, one.gradients // 2, one.optimizer // 2)
    assert one.activations / 2 < two.activations < one.activations


def test_checkpointing_saves_each_blocks_input_once():
    """The input of a block, and the value embeddings that two blocks share."""
    config, kept = config_of("modern").model, []
    for layers, tables in ((2, 0), (4, 0), (4, 2)):
        model = GPT(replace(config, n_layer=layers, n_kv_head=1, value_embeds=tables))
        model.checkpoint_activations()
        kept.append(saved_bytes(model, 3, "float32"))
    inputs, vectors = kept[1] - kept[0], kept[2] - kept[1]
    assert (inputs, vectors) == (2 * 3 * 48 * 32 * 4, 2 * 3 * 48 * 16 * 4)  # float32 (B, T, C), (B, T, H_kv D)
    plain = saved_bytes(GPT(replace(config, n_layer=2)), 3, "float32")
    train = TrainConfig(batch_size=3, dtype="float32", activation_checkpointing=True)
    planned = memory_of(Config(model=replace(config, n_layer=2), train=train), CPU).activations
    assert planned == (plain + kept[0]) / 2  # all of one of two blocks


def test_activations_grow_with_the_batch():
    config = config_of("modern")
    one, two = (memory_of(Config(model=config.model, train=TrainConfig(batch_size=n)), CPU) for n in (8, 16))
    assert 1.9 * one.activations < two.activations < 2.01 * one.activations


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(1, 10)
            self.config = ModelConfig(seq_len=5)

        def loss(self, idx, targets):
            x = torch.zeros(100, requires_grad=True)
            return (
                (x.exp() * self.embed.weight.sum()).square().sum()
            )  # keeps the exponential, the scalar and the product

    assert saved_bytes(Square(), 1, "float32") == 400 + 4 + 400


def test_describe(monkeypatch):
    config = config_of("gpt2")
    text = describe(config, CPU, train_tokens=10_000)
    tokens = 2000 * 3 * 48
    assert f"{GPT(config.model).num_parameters():,}" in text
    assert f"{tokens:,} in 2,000 steps of 144; {tokens / 10_000:.2f} epochs of 10,000" in text
    assert "unknown" in text.splitlines()[-1]
    monkeypatch.setattr(plan, "peak_flops", lambda device: 1e9)
    flops = GPT(config.model).flops_per_token() * tokens
    assert duration(flops / 0.4e9) in describe(config, CPU, train_tokens=10_000).splitlines()[-1]


def test_the_plan_of_a_small_run(monkeypatch):
    """All numbers counted by hand: 3 blocks of width 16 with biases, a tied vocabulary of 70,000, 16 positions."""
    model = ModelConfig(**PRESETS["gpt2"], n_layer=3, n_head=2, n_embd=16, seq_len=16, vocab_size=70_000)
    train = TrainConfig(batch_size=3, grad_accum_steps=2, max_steps=100, dtype="float32")
    config = Config(model=model, optim=OptimConfig(warmup_steps=20, learning_rate=0.002), train=train)
    activations = saved_bytes(GPT(model), 3, "float32")
    matrices = 4 * 16 * 16 + 2 * 64 * 16  # queries, keys, values and the projection; both of the MLP
    blocks = 3 * (matrices + 3 * 16 + 16 + 64 + 16 + 2 * 2 * 16)  # their biases, and two norms
    tables, rest = 70_000 * 16 + 16 * 16, 2 * 16
    weights = 4 * (tables + blocks + rest)
    flops = 3 * (2 * (3 * matrices + 70_000 * 16) + 3 * 4 * 16 * 17 / 2)  # a query sees 8.5 keys on average
    tokens = 100 * 3 * 2 * 2 * 16
    mib = lambda n: f"{n / 2**20:.1f} MiB"
    curve = ""
    for i in range(60):
        step = i * 99 // 59
        scale = (step + 1) / 20 if step < 20 else (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        curve += " ▁▂▃▄▅▆▇█"[math.floor(8 * scale + 0.5)]
    monkeypatch.setattr(plan, "peak_flops", lambda device: 1e9)
    minutes = flops * tokens / (2 * 0.4e9) / 60
    monkeypatch.setattr(plan, "process_bytes", lambda device: 0)
    assert describe(config, CPU, train_tokens=12_345, world_size=2).splitlines() == [
        f"parameters       {tables + blocks + rest:,}: embeddings {tables:,}, blocks {blocks:,}, rest {rest:,}",
        f"memory           {mib(4 * weights + activations)} on cpu with micro-batches of 3 x 16: "
        f"weights {mib(weights)}, gradients {mib(weights)}, optimizer {mib(2 * weights)}, "
        f"activations {mib(activations)}",
        f"tokens           19,200 in 100 steps of 192; 1.56 epochs of 12,345; {19_200 * 4 / weights:.1f} per parameter",
        f"FLOPs            {flops * tokens:.3g}, {flops:.3g} per token",
        f"learning rate    {curve}  peak 0.002, last 7.71e-07",
        f"time             {minutes:.1f} min at 40% of the device's peak",
    ]


def test_memory_leaves_out_zeros():
    assert str(Memory(1 << 20, 2 << 20, 0, 3 << 30, 0)) == "weights 1.0 MiB, gradients 2.0 MiB, average 3.00 GiB"


@pytest.mark.parametrize("rows", [2, 3, 4, 6, 7, 9, 10, 15, 25, 35])
def test_fewer_rows_is_the_largest_divisor_up_to_half(rows):
    config = config_of("gpt2")
    most = max(n for n in range(1, rows) if rows % n == 0)
    assert fewer_rows(rows, config, CPU) == fewer_rows(rows, config, CPU, 2, agreed=True) == most
    with pytest.raises(UserError):
        fewer_rows(rows, config, CPU, 2)


def test_out_of_memory_with_one_row_is_explained():
    config = config_of("gpt2", ema_decay=0.9)  # of 3 rows of 48
    one = replace(config, train=replace(config.train, batch_size=1, parallel="fsdp"))
    with pytest.raises(UserError) as alone:
        fewer_rows(1, config, CPU)
    with pytest.raises(UserError) as shared:
        fewer_rows(1, replace(config, train=one.train), CPU, 2)
    assert f"out of memory on cpu with micro-batches of 1 x 48, which need about {memory_of(one, CPU)} and" in (
        str(alone.value)
    )
    assert f"which need about {memory_of(one, CPU, 2)} and" in str(shared.value)


def test_bytes_and_seconds_are_formatted_for_people():
    seconds = {0.2: "1 s", 119: "119 s", 120: "2.0 min", 121: "2.0 min", 7199: "120.0 min", 7200: "2.0 h"}
    seconds |= {172_799: "48.0 h", 172_800: "2.0 days", 200_000: "2.3 days"}
    assert {n: duration(n) for n in seconds} == seconds
    assert [size(n) for n in (1 << 19, (1 << 30) - 1, 1 << 30, 3 << 29)] == [
        "0.5 MiB",
        "1024.0 MiB",
        "1.00 GiB",
        "1.50 GiB",
    ]
    assert sparkline([0, 0.5, 1]) == " ▄█"
    assert sparkline([0.0, 0.0]) == "  " and sparkline([]) == ""
    assert sparkline([n / 4 for n in range(9)]) == " ▁▂▃▄▅▆▇█"


def test_peak_by_name():
    """Whole words of an entry must match, and the longest matching entry counts."""
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_of("NVIDIA L4") == 121e12
    assert peak_of("NVIDIA L40S") == 362e12
    assert peak_of("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_of("Quadro K2000") is None


def test_mfu_is_the_formula():
    assert mfu(460_000, 8.6e8, 989.4e12) == pytest.approx(0.39984, abs=1e-4)
    assert mfu(460_000, 8.6e8, 989.4e12, devices=2) == pytest.approx(0.19992, abs=1e-4)
    assert mfu(1.0, 1.0, None) is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, capsys):
    assert status_of("--dry-run", "--max-steps", "7") == 0
    output = capsys.readouterr().out
    assert "in 7 steps of 64" in output and output.startswith("parameters")
    assert not (folder / "run").exists()
    assert status_of("--max-steps", "1") == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    assert status_of("--max-steps", "3", "--dry-run", "--resume") == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before


def test_a_trace_of_some_steps(folder, capsys):
    assert status_of("--max-steps", "6", "--profile-steps", "2") == 0
    assert "Self CPU" in (folder / "run/profile.txt").read_text()
    assert (folder / "run/trace.json.gz").read_bytes().startswith(b"\x1f\x8b")
    assert "run/profile.txt" in capsys.readouterr().out.split("written:")[1]
    assert status_of("--max-steps", "3", "--profile-steps", "2", "--overwrite") == 0
    assert not (folder / "run/profile.txt").exists()
    assert "no step was traced" in capsys.readouterr().out


def test_mfu_is_in_the_metrics_where_the_peak_is_known(folder, capsys, monkeypatch):
    assert status_of("--max-steps", "1") == 0
    assert not any("mfu" in r for r in read_metrics(folder / "run/metrics.jsonl"))
    monkeypatch.setattr("gpt.training.job.peak_flops", lambda device: 1e9)
    assert status_of("--max-steps", "1", "--overwrite") == 0
    (record,) = [r for r in read_metrics(folder / "run/metrics.jsonl") if "mfu" in r]
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, seq_len=16, vocab_size=26))
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * model.flops_per_token() / 1e9, abs=1e-4)


def test_a_plan_states_what_evaluations_cost(monkeypatch):
    """A forward pass is a third of a training step."""
    config = config_of("gpt2")  # 2,000 steps of 144 tokens, evaluated every 250
    line = lambda **given: next(x for x in describe(config, CPU, 10_000, **given).splitlines() if "evaluation" in x)
    expected = 8 * 5_000 / 3 / (2000 * 144)
    assert line(val_tokens=[5_001]) == (
        f"evaluation       8 times 5,000 tokens: {expected:.1%} of the FLOPs above in addition"
    )
    monkeypatch.setattr("gpt.training.validation.DEFAULT_TOKENS", 1_000)
    expected = (8 * 2_000 + 7_000) / 3 / (2000 * 144)
    assert line(val_tokens=[5_001, 2_001]) == (
        f"evaluation       8 times 2,000 tokens and once 7,000: {expected:.1%} of the FLOPs above in addition"
    )
    assert "evaluation" not in describe(config, CPU, 10_000)

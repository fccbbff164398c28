"""The training command: the files it writes, and the input it refuses."""

import functools
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

import gpt
from gpt.data.loader import Batches
from gpt.model import GPT
from gpt.run.metrics import read_metrics
from tests.train_checks import TEXT, flags, lasting, names_in, refused, run, weights_of

# What a run does.


def test_thirty_steps_overfit_a_tiny_text(folder, capsys):
    text = "the quick brown fox jumps over the lazy dog. " * 12
    (folder / "text.txt").write_text(text)
    recipe = {"optimizer": "muon", "learning_rate": 0.03, "schedule": "wsd", "warmup_steps": 0, "weight_decay": 0}
    assert run(max_steps=30, n_embd=64, seq_len=32, batch_size=32, eval_interval=30, **recipe) == 0
    first, *_, last = [r for r in read_metrics(folder / "run/metrics.jsonl") if "train_loss" in r]
    assert first["train_loss"] == pytest.approx(math.log(28), abs=0.01)
    assert last["train_loss"] < 0.1
    model, tokenizer = gpt.load("run", device="cpu")
    sampling = gpt.SamplingConfig(max_new_tokens=20, temperature=0.0)
    written = "".join(piece.text for piece in gpt.generate(model, tokenizer, ["the quick br"], sampling))
    assert written == "own fox jumps over t"


def test_a_run_directory_holds_everything(folder, capsys):
    assert run(sample_tokens=5) == 0
    names = {path.name for path in (folder / "run").iterdir()} - {".lock"}
    files = {"config.toml", "tokenizer.json", "corpus.json", "run.json", "metrics.jsonl", "loss.png"}
    assert names == files | {"checkpoints"}
    (source,) = json.loads((folder / "run/corpus.json").read_text())["sources"]
    assert source == {"name": "text.txt", "bytes": len(TEXT), "sha256": hashlib.sha256(TEXT.encode()).hexdigest()}
    assert names_in("run/checkpoints") == ["best_00000020", "step_00000010", "step_00000020"]
    assert (folder / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(folder / "run/metrics.jsonl")
    losses = [r for r in records if "train_loss" in r]
    assert [r["step"] for r in losses] == list(range(1, 21))
    assert [r["tokens"] for r in losses] == [128 * step for step in range(1, 21)]
    assert all(set(r) >= {"learning_rate", "grad_norm", "tokens_per_second", "seconds"} for r in losses)
    assert [r["step"] for r in records if "val_loss" in r] == [10, 20]
    output = capsys.readouterr().out
    for name in names - {"checkpoints"}:
        assert str(Path("run") / name) in output


@pytest.mark.parametrize("decay", [0.0, 0.9], ids=["weights", "their-average"])
def test_validation_loss_is_the_mean_over_the_whole_tail(folder, capsys, decay):
    """For the model that gpt.load returns, with averaged weights if the run keeps them."""
    run(ema_decay=decay)
    record = [r for r in read_metrics(folder / "run/metrics.jsonl") if "val_loss" in r][-1]
    model, tokenizer = gpt.load("run", device="cpu")
    tail = tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])
    nats = []
    with torch.no_grad():
        for start in range(0, len(tail) - 1, 16):
            window = torch.tensor(tail[start : start + 17])
            log_probs = model(window[None, :-1]).double().log_softmax(-1)[0]
            nats += [-log_probs[i, target].item() for i, target in enumerate(window[1:])]
    assert len(nats) == len(tail) - 1
    assert record["val_loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-6)
    assert record["bits_per_byte"] == pytest.approx(sum(nats) / len(nats) / math.log(2), abs=1e-6)


def test_extra_terms_are_in_the_training_loss_alone(folder, capsys):
    """All logits start at 0: the loss is ln V, and z_loss adds its square. The learning rate is near 0."""
    run(run_dir="plain", max_steps=2, learning_rate=1e-9)
    run(run_dir="z", max_steps=2, learning_rate=1e-9, z_loss=0.5)
    nats = math.log(26)
    for run_dir, expected in (("plain", nats), ("z", nats + 0.5 * nats**2)):
        records = lasting(run_dir)
        assert [r["train_loss"] for r in records if "train_loss" in r] == pytest.approx([expected] * 2, abs=1e-4)
        assert [r["val_loss"] for r in records if "val_loss" in r] == pytest.approx([nats], abs=1e-4)


def test_label_smoothing_keeps_the_model_unsure(folder, capsys):
    run(run_dir="plain")
    run(run_dir="smooth", label_smoothing=0.5)
    train_loss = [[r["train_loss"] for r in lasting(d) if "train_loss" in r][-1] for d in ("plain", "smooth")]
    assert train_loss[0] + 0.1 < train_loss[1]


def test_accumulation_is_a_larger_batch(folder, capsys):
    run(run_dir="whole", batch_size=8, max_steps=3)
    run(run_dir="parts", batch_size=2, grad_accum_steps=4, max_steps=3)
    for one, other in zip(lasting("whole"), lasting("parts"), strict=True):
        assert one == pytest.approx(other, rel=2e-4)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_micro_batches_without_targets(folder, capsys, monkeypatch, packing):
    """Three steps of two micro-batches: the second has one without targets, the third only such, so only decay acts."""
    (folder / "docs").mkdir()
    for i in range(9):
        (folder / f"docs/{i}.txt").write_text(TEXT[50 * i :][: 30 + 20 * i])
    next_batch, losses, true_loss = Batches.next_batch, [], GPT.loss

    def some(self):
        x, y, *places = next_batch(self)
        return (x, torch.full_like(y, -100), *places) if len(losses) in (3, 4, 5) else (x, y, *places)

    def seen(self, x, y, **options):
        loss = true_loss(self, x, y, **options)
        if self.training:
            losses.append(float(loss.detach()))
        return loss

    def one_at_a_time(self):  # best_fit reads a step's batches before it computes
        batch = some(self)
        losses.append(None) if packing == "best_fit" else None
        return batch

    monkeypatch.setattr(Batches, "next_batch", one_at_a_time)
    monkeypatch.setattr(GPT, "loss", seen if packing == "stream" else true_loss)
    options = {"batch_size": 4, "grad_accum_steps": 2, "warmup_steps": 0, "n_layer": 1, "corpus": "docs"}
    run(max_steps=3, checkpoint_interval=1, keep_checkpoints=9, packing=packing, schedule="constant", **options)
    train_losses = [r["train_loss"] for r in lasting("run") if "train_loss" in r]
    assert len(train_losses) == 3 and all(map(math.isfinite, train_losses)) and train_losses[2] == 0.0
    assert train_losses[1] > (2.0 if packing == "best_fit" else 1.0)  # a mean over targets, or over micro-batches
    if packing == "stream":
        assert losses[3:] == [0.0, 0.0, 0.0] and train_losses[1] == pytest.approx(losses[2] / 2)
    before, after = weights_of("run", 2), weights_of("run", 3)
    assert all(torch.isfinite(w).all() and (w - before[name]).abs().max() < 2e-3 for name, w in after.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_follows_float32(folder, capsys, dtype):
    run(run_dir="exact", max_steps=5)
    run(run_dir="low", max_steps=5, dtype=dtype)
    exact, low = lasting("exact"), lasting("low")
    assert exact != low
    for one, other in zip(exact, low, strict=True):
        loss = "train_loss" if "train_loss" in one else "val_loss"
        assert one[loss] == pytest.approx(other[loss], rel=0.02)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_compiled_training_follows_eager(folder, capsys, monkeypatch, packing):
    """The whole graph is captured. Compiling it to machine code takes a minute and is a slow test."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    if packing != "stream":
        (folder / "docs").mkdir()
        for i in range(9):
            (folder / f"docs/{i}.txt").write_text(TEXT[50 * i :][: 30 + 20 * i])
    recipe = {"max_steps": 3, "packing": packing, "corpus": "text.txt" if packing == "stream" else "docs"}
    run(run_dir="eager", **recipe)
    run("--compile", run_dir="compiled", **recipe)
    for one, other in zip(lasting("eager"), lasting("compiled"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_training_compiled_to_machine_code_follows_eager(folder, capsys):
    run(run_dir="eager", max_steps=3)
    run("--compile", run_dir="compiled", max_steps=3)
    for one, other in zip(lasting("eager"), lasting("compiled"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_wandb_offline_is_written_and_reads_back(folder, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("--wandb", "offline", max_steps=4)
    wandb.teardown()  # wandb's own process ends as at a command's exit, and has written all
    (file,) = (folder / "run/wandb").glob("offline-run-*/*.wandb")
    history = [item for record in wandb_records(file) for item in [record.history] if record.HasField("history")]
    seen = [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in item.item} for item in history]
    losses = {row["_step"]: row["train_loss"] for row in seen if "train_loss" in row}
    written = {r["step"]: r["train_loss"] for r in read_metrics(folder / "run/metrics.jsonl") if "train_loss" in r}
    assert losses == pytest.approx(written)
    assert sorted(losses) == [1, 2, 3, 4]


def wandb_records(path: Path):
    """Read the records of a .wandb file: a header of seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-layers", "3"], r"--n-layers is not an option of train.py; did you mean '--n-layer'"),
        (["--n-layer", "three"], r"--n-layer.*'three'"),
        (["--n-embd", "33"], r"n_embd 33 is not divisible by n_head 2"),
        (["--learning-rate", "-1"], r"learning_rate must be above 0, not -1"),
        (["--schedule", "cosin"], r"cosin"),
        (["--z-loss", "-1"], r"z_loss must be at least 0, not -1"),
        (["--label-smoothing", "1"], r"label_smoothing must be at least 0 and below 1, not 1"),
        (["--device", "tpu9"], r"device 'tpu9' cannot be used here"),
        (["--corpus", "nowhere.txt"], r"nowhere\.txt"),
        (["--corpus", "empty.txt"], r"empty\.txt|empty"),
        (["--corpus", "short.txt"], r"seq_len 16"),
        (["--corpus", "latin1.txt"], r"latin1\.txt.*--encoding-errors replace"),
        (["--tokenizer", "gpt5"], r"gpt5"),
        (["--vocab-size", "3"], r"vocab_size 3 is smaller than the tokenizer's 26"),
        (["--resume", "--overwrite"], r"resume and overwrite"),
        (["--eval-only", "--overwrite"], r"eval_only and overwrite contradict"),
        (["--eval-only", "--resume-from", "x"], r"eval_only and resume_from contradict"),
        (["--resume", "--resume-from", "x"], r"resume and resume_from contradict"),
        (["--sample-tokens", "5", "--sample-prompt", "Zoë"], r"the tokenizer lacks the character 'Z'"),
        (["--eval-only"], r"run is not a run directory"),
        (["--resume-from", "nowhere"], r"cannot resume from nowhere: nowhere/manifest.json cannot be read"),
        (["missing.toml"], r"cannot read the config file missing.toml"),
        (["wrong-key.toml"], r"wrong-key.toml: 'n_layers' is not a key of \[model\]; did you mean 'n_layer'"),
        (["wrong-table.toml"], r"wrong-table.toml: 'n_layer' is not a key of \[optim\]; it belongs in \[model\]"),
        (["wrong-type.toml"], r"wrong-type.toml: n_layer must be a whole number, not 'two'"),
        (["wrong-choice.toml"], r"wrong-choice.toml: norm must be one of rmsnorm, layernorm, not 'batchnorm'"),
        (["wrong-value.toml"], r"wrong-value.toml: dropout must be at least 0 and below 1"),
        (["not.toml"], r"not.toml is not valid TOML"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(folder, capsys, words, message):
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("ab")
    (folder / "latin1.txt").write_bytes("Stra\xdfe ".encode("latin-1") * 100)
    files = {"wrong-key": "[model]\nn_layers = 2", "wrong-table": "[optim]\nn_layer = 2", "not": "[model"}
    files |= {"wrong-type": '[model]\nn_layer = "two"', "wrong-choice": '[model]\nnorm = "batchnorm"'}
    files |= {"wrong-value": "[model]\ndropout = 1.5"}
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    file = words if words[0].endswith(".toml") else []
    assert re.search(message, refused(capsys, *file, *flags(), *(words if not file else [])))
    assert not (folder / "run").exists()


def test_an_existing_run_is_refused_and_unchanged(folder, capsys):
    run(max_steps=1)
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "run").rglob("[!.]*"))
    assert "run already holds a run: add --resume" in refused(capsys, *flags())
    wider = flags(n_embd=64)
    assert "run was trained with n_embd 32, not 64" in refused(capsys, *wider, "--resume")
    assert "run was trained with tokenizer char, not byte" in refused(
        capsys, *flags(), "--resume", "--tokenizer", "byte"
    )
    assert "not gelu_tanh: resume with the same model" in refused(
        capsys,
        "--run-dir",
        "run",
        "--resume",
        "--preset",
        "gpt2",
        "--position",
        "rotary",
        "--norm",
        "rmsnorm",
        "--norm-eps",
        "1e-6",
    )
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (folder / "run").rglob("[!.]*"))


def test_a_run_without_a_checkpoint_has_nothing_to_evaluate(folder, capsys):
    run(max_steps=1)
    shutil.rmtree("run/checkpoints")
    assert "run has no checkpoint yet" in refused(capsys, "--run-dir", "run", "--eval-only")

"""The training command as a user runs it: what it writes, what it refuses, how it stops and goes on."""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gpt
from gpt.command_line import load_config
from gpt.errors import run_command
from gpt.monitor import read_metrics
from train import main

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{a} and {b} went up the hill, said {c}.\n" for a in "JKLM" for b in "abcdef" for c in "xyz")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a corpus of 2,736 characters in it; the cache is kept apart as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def flags(**changes) -> list[str]:
    options = {
        "corpus": "text.txt",
        "run_dir": "run",
        "device": "cpu",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "seq_len": 16,
        "batch_size": 8,
        "max_steps": 20,
        "eval_interval": 10,
        "checkpoint_interval": 10,
        "warmup_steps": 2,
        "log_interval": 1,
        "sample_tokens": 0,
        "dtype": "float32",
        **changes,
    }
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return words


def run(*extra: str, **changes) -> int:
    return main(load_config([*extra, *flags(**changes)]))


def refused(capsys, *words: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(load_config(list(words))))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def weights_of(run_dir: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / f"checkpoints/step_{step:08d}/model.safetensors")


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def lasting(run_dir: str) -> list[dict]:
    """The metrics without what depends on the clock."""
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


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
    assert names == {"config.toml", "tokenizer.json", "corpus.json", "metrics.jsonl", "loss.png", "checkpoints"}
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


def test_validation_loss_is_the_mean_over_the_whole_tail(folder, capsys):
    run()
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
    """At the start every logit is 0: the loss is ln V, and z_loss adds the square of it. Rates are near 0."""
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
    """The graph is captured whole; compiling it to machine code takes a minute and is one of the slow tests."""
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
    """The records of a .wandb file: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
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


# Going on.


@pytest.mark.parametrize(
    ("interval", "options"),
    [
        (7, {"dropout": 0.2, "grad_accum_steps": 2, "batch_size": 4}),
        (19, {"optimizer": "muon", "learning_rate": 0.02, "ema_decay": 0.9}),
        (20, {"dtype": "bfloat16"}),
        (20, {"dtype": "float16", "dropout": 0.2}),
    ],
    ids=["adamw-dropout-accumulation", "muon-average", "bfloat16", "float16"],
)
def test_a_run_resumed_at_any_step_ends_as_the_undisturbed_one(folder, capsys, interval, options):
    """The corpus's one epoch of 153 windows ends within the 20th step of 8 rows."""
    options = {"max_steps": 22, "n_layer": 1, "eval_interval": 6} | options
    run(run_dir="plain", checkpoint_interval=100, **options)
    metrics, whole = lasting("plain"), weights_of("plain", 22)
    run(run_dir="often", checkpoint_interval=interval, keep_checkpoints=24, **options)
    assert lasting("often") == metrics  # saving changes nothing
    for step in range(interval, 22, interval):
        torch.manual_seed(99)
        run("--overwrite", "--resume-from", f"often/checkpoints/step_{step:08d}", run_dir="other", **options)
        assert lasting("other") == [r for r in metrics if r["step"] > step]
        resumed = weights_of("other", 22)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_goes_on_in_the_same_directory(folder, capsys):
    run(max_steps=20, eval_interval=5)
    whole, metrics = weights_of("run", 20), lasting("run")
    for name in ("step_00000020", "best_00000020"):
        shutil.rmtree(f"run/checkpoints/{name}")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "event": "of a course that was left"}\n{"step": 21, "cut sh')
    assert run("--resume", max_steps=20, eval_interval=5) == 0
    assert lasting("run") == metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), weights_of("run", 20).values(), strict=True))
    output = capsys.readouterr().out
    assert "this run differs" not in output


def test_what_a_resumed_run_changes_is_said_in_one_line(folder, capsys):
    threads = torch.get_num_threads()
    run(max_steps=4, checkpoint_interval=2, schedule="constant")
    try:
        torch.set_num_threads(threads + 1)
        run("--resume", max_steps=6, batch_size=4, schedule="constant")
    finally:
        torch.set_num_threads(threads)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
    assert line == (
        f"from step 4 on this run differs from one that was never stopped: threads is {threads + 1}, was {threads} "
        "(CPU sums are rounded in another order); batch_size is 4, was 8 (a step sees other text)"
    )
    assert [r["tokens"] for r in lasting("run") if "train_loss" in r] == [128, 256, 384, 512, 576, 640]


def test_the_best_checkpoint_is_kept_apart_and_can_be_loaded(folder, capsys):
    """A rate that is far too high from step 4 on: the validation loss has its minimum early."""
    run(max_steps=4, eval_interval=2, checkpoint_interval=2)
    raised = {"learning_rate": 0.5, "warmup_steps": 0, "schedule": "constant"}
    run("--resume", max_steps=12, eval_interval=2, checkpoint_interval=2, **raised)
    losses = {r["step"]: r["val_loss"] for r in lasting("run") if "val_loss" in r}
    assert min(losses, key=losses.get) == 4
    assert names_in("run/checkpoints") == ["best_00000004", "step_00000010", "step_00000012"]
    state = json.loads(Path("run/checkpoints/step_00000012/state.json").read_text())
    assert state["best"] == {"step": 4, "val_loss": losses[4]}
    loaded = {which: gpt.load("run", "cpu", which=which)[0] for which in ("newest", "best")}
    loaded["path"] = gpt.load("run", "cpu", which="run/checkpoints/step_00000010")[0]
    for which, name in {"newest": "step_00000012", "best": "best_00000004", "path": "step_00000010"}.items():
        saved = load_file(f"run/checkpoints/{name}/model.safetensors")
        assert all(torch.equal(p, saved[key]) for key, p in loaded[which].named_parameters())
    with pytest.raises(gpt.UserError, match=r"step_00000011/manifest\.json cannot be read"):
        gpt.load("run", "cpu", which="run/checkpoints/step_00000011")


def test_going_back_leaves_nothing_of_the_course_that_was_left(folder, capsys):
    """Else a later --resume would take the abandoned step 20, not the newest step of this course."""
    run(checkpoint_interval=5, keep_checkpoints=4)
    run("--resume-from", "run/checkpoints/step_00000005", max_steps=7, learning_rate=1e-4, eval_interval=100)
    assert names_in("run/checkpoints") == ["best_00000007", "step_00000005", "step_00000007"]
    assert [r["step"] for r in lasting("run") if "train_loss" in r] == [*range(1, 8)]


def test_resume_starts_where_there_is_nothing(folder, capsys):
    assert run("--resume", max_steps=2) == 0
    assert (folder / "run/checkpoints/step_00000002").is_dir()


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(folder, capsys):
    run()
    shutil.rmtree("run/checkpoints/best_00000020")
    newest = folder / "run/checkpoints/step_00000020/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    assert run("--resume", max_steps=21) == 0
    assert re.search(r"passing over step_00000020: .*model.safetensors", capsys.readouterr().out)


def test_resume_from_a_checkpoint_of_another_run(folder, capsys):
    run(run_dir="first")
    run("--resume-from", "first/checkpoints/step_00000010", run_dir="second")
    assert all(torch.equal(a, b) for a, b in zip(weights_of("first", 20).values(), weights_of("second", 20).values()))


def test_eval_only_prints_the_loss_and_writes_nothing(folder, capsys):
    run()
    loss = [r for r in read_metrics(folder / "run/metrics.jsonl") if "val_loss" in r][-1]["val_loss"]
    before = sorted((p, p.stat().st_mtime_ns) for p in (folder / "run").rglob("*"))
    capsys.readouterr()
    assert main(load_config(["--run-dir", "run", "--eval-only"])) == 0
    assert f"validation loss {loss:.4f}" in capsys.readouterr().out
    assert before == sorted((p, p.stat().st_mtime_ns) for p in (folder / "run").rglob("*"))


def test_overwrite_deletes_the_run_and_nothing_else(folder, capsys):
    run(max_steps=4, checkpoint_interval=2)
    (folder / "run/notes.txt").write_text("mine")
    assert run("--overwrite", max_steps=1) == 0
    assert (folder / "run/notes.txt").read_text() == "mine"
    assert names_in("run/checkpoints") == ["best_00000001", "step_00000001"]


# Giving up and stopping.


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(folder, capsys):
    assert run(max_steps=20) == 0
    assert run("--resume", max_steps=40, learning_rate=1e38, grad_clip=0, checkpoint_interval=1) == 3
    assert "training gives up" in capsys.readouterr().out
    for path in (folder / "run/checkpoints").iterdir():
        assert all(torch.isfinite(w).all() for w in load_file(path / "model.safetensors").values())
    assert (folder / "run/checkpoints/step_00000020").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_signal_saves_and_resume_goes_on(folder, number):
    command = [sys.executable, str(ROOT / "train.py"), *flags(max_steps=100_000, eval_interval=100_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_metrics(folder / "run/metrics.jsonl")) >= 3, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 4, errors
    assert errors == ""
    stopped = int(re.search(rf"stopped by {number.name} after step (\d+)", output)[1])
    assert run("--resume", max_steps=stopped + 1, eval_interval=100_000) == 0
    assert [r["step"] for r in lasting("run")] == [*range(1, stopped + 2), stopped + 1]


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        os.sched_yield()


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n-layers", "3"], r"--n-layers is not an option of train.py; did you mean '--n-layer'"),
        (["--n-layer", "three"], r"--n-layer.*'three'"),
        (["--n-embd", "33"], r"n_embd 33 is not divisible by n_head 2"),
        (["--learning-rate", "-1"], r"learning_rate must be positive"),
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


def test_an_existing_run_is_not_touched(folder, capsys):
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

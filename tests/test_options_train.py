"""Every option of train.py outside [model] changes a run, each in its own way."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from gpt.data.config import DataConfig, TokenizerConfig
from gpt.distributed import World
from gpt.training.config import LogConfig, OptimConfig, TrainConfig
from gpt.training.parallel import mode_of
from tests import train_looks as looks
from tests.option_checks import Case, check, ignore, missing
from tests.train_checks import TEXT
from tests.train_looks import EMBED, HEAD, MLP, decayed, moment, near, outcome, rated, rates, sides, whose
from tests.train_observer import BASE, OTHER, Observed, network, prepare

KINDS = {"data": DataConfig, "tokenizer": TokenizerConfig, "optim": OptimConfig, "train": TrainConfig, "log": LogConfig}
MUON = {"optimizer": "muon", "init": "gpt2"}
MADE = {"max_steps": 2}  # an earlier run in the same folder

CASES = [
    # [data]
    Case("corpus", (("other.txt",),), lambda s: s.text, lambda b, s, v: all(set(text) <= set(OTHER) for text in s)),
    Case("cache_dir", ("elsewhere",), whose("/corpora/"), lambda b, s, v: (b, s) == (["cache"], [v])),
    Case(
        "cache_dir",
        ("cache",),
        whose("/corpora/"),
        lambda b, s, v: (b, s) == (["usual/gpt-on-triton"], [v]),
        {"cache_dir": None},
    ),
    Case("val_fraction", (0.4,), sides, lambda b, s, v: s[1] == pytest.approx(v * sum(b), abs=1)),
    Case("split_seed", (1, 2), lambda s: (s.text, s.eval_text), others={"corpus": ("docs",), "val_fraction": 0.3}),
    Case(
        "encoding_errors",
        ("replace",),
        lambda s: s.error or "�" in s.tokenizer.decode(range(s.tokenizer.vocab_size)),
        lambda b, s, v: "not valid UTF-8" in b and s is True,
        {"corpus": ("latin.txt",)},
    ),
    Case("text_field", ("body",), lambda s: s.text, lambda b, s, v: "b" in s[0], {"corpus": ("rows.jsonl",)}),
    Case("max_corpus_bytes", (1000,), lambda s: sum(sides(s)), lambda b, s, v: (b, s) == (len(TEXT), v)),
    Case(
        "max_download_bytes",
        (1000,),
        lambda s: s.error,
        lambda b, s, v: b == "" and "has more than 1000 bytes" in s,
        {"corpus": ("http://host/text",)},
        patch=network,
    ),
    Case(
        "corpus_weights",
        ((3, 1),),
        lambda s: (looks.mixed(s), looks.weighted(s)),
        lambda b, s, v: s == (pytest.approx(6, abs=2), True),
        {"corpus": ("text.txt", "other.txt"), "batch_size": 8},
    ),
    Case(
        "packing",
        ("documents", "best_fit"),
        lambda s: [sorted(options) for options in s.places] + [len(s.places[0].get("segment_ids", ()))] + s.text[:1],
        lambda b, s, v: "segment_ids" in s[0] and "segment_ids" not in b[0],
        {"corpus": ("docs",)},
    ),
    # [tokenizer]
    Case(
        "tokenizer",
        ("byte", "bpe", "gpt2"),
        lambda s: (s.tokenizer.name, s.tokenizer.vocab_size),
        lambda b, s, v: b == ("char", 26) and v in s[0].lower(),
        patch=looks.small_encodings,
    ),
    Case(
        "bpe_vocab_size",
        (265,),
        lambda s: s.tokenizer.vocab_size,
        lambda b, s, v: (b, s) == (260, v),
        {"tokenizer": "bpe", "bpe_vocab_size": 260},
    ),
    # [optim]
    Case("optimizer", ("muon",), lambda s: ([g["kind"] for g in s.groups[0]], s.last)),
    Case(
        "learning_rate",
        (3e-3,),
        lambda s: (*rates(s), s.move(HEAD)),
        lambda b, s, v: s == (near(v, v, v), near(v, v, v), pytest.approx(v, rel=0.01)),
    ),
    Case("learning_rate", (3e-3,), lambda s: s.move(MLP), lambda b, s, v: s == pytest.approx(3 * b), MUON),
    Case("embedding_lr", (0.02,), lambda s: s.move(EMBED), lambda b, s, v: near(b, s) == [0.05, v], MUON),
    Case("head_lr", (0.02,), lambda s: s.move(HEAD), lambda b, s, v: near(b, s) == [0.01, v], MUON),
    Case(
        "base_width",
        (4,),
        lambda s: (s.move(MLP), max(group["weight_decay"] for group in s.groups[0])),
        lambda b, s, v: s == (pytest.approx(b[0] / 4, rel=0.05), 0.4),
        {"init": "gpt2", "weight_decay": 0.1},
    ),
    Case("min_lr", (5e-4,), rates, rated(1, 0.875, 0.625), {"schedule": "cosine"}),
    Case("schedule", ("cosine",), rates, rated(1, 0.853553, 0.5, 0.146447), {"max_steps": 4}),
    Case("schedule", ("linear",), rates, rated(1, 0.75, 0.5, 0.25), {"max_steps": 4}),
    Case("schedule", ("wsd",), rates, rated(1, 1, 1, 0.5), {"max_steps": 4, "decay_fraction": 0.5}),
    Case("warmup_steps", (4,), rates, rated(0.25, 0.5, 0.75)),
    Case("decay_fraction", (1.0,), rates, rated(1, 2 / 3, 1 / 3), {"schedule": "wsd"}),
    Case("weight_decay", (0.5,), decayed(EMBED), lambda b, s, v: b == 0 and s == pytest.approx(1e-3 * v, rel=1e-2)),
    Case(
        "weight_decay",
        (0.5,),
        decayed(MLP),
        lambda b, s, v: b == 0 and s == pytest.approx(1e-3 * v, rel=1e-2),
        {"optimizer": "muon"},
    ),
    Case("beta1", (0.5,), moment("exp_avg"), lambda b, s, v: s == pytest.approx(b * (1 - v) / (1 - 0.9), rel=1e-3)),
    Case("beta1", (0.5,), moment("exp_avg"), others=MUON),
    Case("beta2", (0.5,), moment("exp_avg_sq"), lambda b, s, v: s == pytest.approx(b * (1 - v) / (1 - 0.95), rel=1e-3)),
    Case("beta2", (0.5,), moment("exp_avg_sq"), others=MUON),
    Case(
        "muon_momentum",
        (0.5,),
        moment("momentum_buffer", MLP),
        lambda b, s, v: s == pytest.approx(b * (1 - v) / (1 - 0.95), rel=1e-3),
        MUON,
    ),
    Case("muon_ns_steps", (1,), looks.roundness, lambda b, s, v: s < b / 2, MUON),
    Case(
        "grad_clip", (1e-3,), looks.clipped, lambda b, s, v: s == pytest.approx(v, rel=1e-3) and s < b, {"grad_clip": 0}
    ),
    Case("ema_decay", (0.5,), lambda s: (s.column("val_loss"), looks.average_of(s)), lambda b, s, v: s[1] is True),
    Case(
        "z_loss",
        (0.5,),
        lambda s: s.column("train_loss")[0],
        lambda b, s, v: near(b, s) == [math.log(26), math.log(26) + v * math.log(26) ** 2],
    ),
    Case("label_smoothing", (0.5,), lambda s: s.column("train_loss"), others={"init": "xavier"}),
    # [train]
    Case("batch_size", (3,), lambda s: [len(x) for x in s.rows], lambda b, s, v: s == [v] * 3),
    Case("grad_accum_steps", (2,), lambda s: (len(s.rows), s.column("tokens")), lambda b, s, v: s[0] == 3 * v),
    Case("max_steps", (4,), lambda s: s.steps("train_loss"), lambda b, s, v: s == [1, 2, 3, 4]),
    Case(
        "seed",
        (5,),
        lambda s: (s.weights[0][EMBED].tolist(), s.text, s.seeds, s.samplings[0].seed),
        lambda b, s, v: s[-1] == v,
        {"sample_tokens": 2},
    ),
    Case("device", ("meta",), lambda s: s.error, lambda b, s, v: b == "" and "device 'meta' cannot be used here" in s),
    Case("dtype", ("bfloat16", "float16"), lambda s: s.precisions, lambda b, s, v: s == [v] * 3),
    Case(
        "dtype",
        ("auto",),
        lambda s: s.precisions,
        lambda b, s, v: s == ["bfloat16"] * 3,
        patch=looks.matrix_units(True),
    ),
    Case("parallel", ("ddp", "fsdp"), lambda s: s.error, lambda b, s, v: b == "" and f"{v} needs torchrun" in s),
    Case(
        "parallel",
        ("fsdp",),
        lambda s: mode_of(s.config.train, World(torch.device("cpu"), joined=True)),
        lambda b, s, v: (b, s) == ("ddp", v),
    ),
    Case("activation_checkpointing", (True,), lambda s: s.blocks, lambda b, s, v: (b, s) == (3, 6)),
    Case(
        "eval_dtype",
        ("float32", "float16"),
        lambda s: s.eval_precisions,
        lambda b, s, v: set(b) == {"bfloat16"} and set(s) == {v},
        {"dtype": "bfloat16"},
    ),
    Case(
        "eval_dtype",
        ("auto", "bfloat16"),
        lambda s: s.eval_precisions + s.precisions,
        lambda b, s, v: set(s) == {"bfloat16", "float16"} if v == "bfloat16" else set(s) == {"float32", "float16"},
        {"dtype": "float16"},
        patch=looks.matrix_units(False),
    ),
    Case("compile", (True,), lambda s: len(s.compiled), lambda b, s, v: (b, s) == (0, 1)),
    Case("eval_interval", (2,), lambda s: s.steps("val_loss"), lambda b, s, v: (b, s) == ([3], [2, 3])),
    Case("eval_tokens", (20,), lambda s: s.targets, lambda b, s, v: (b, s) == (len(TEXT) // 10, v)),
    Case("checkpoint_interval", (2,), lambda s: s.checkpoints(), lambda b, s, v: (b, s) == ([3], [2, 3])),
    Case(
        "keep_checkpoints",
        (1, 3),
        lambda s: s.checkpoints(),
        lambda b, s, v: b == [2, 3] and s == [1, 2, 3][-v:],
        {"checkpoint_interval": 1},
    ),
    Case(
        "max_skipped_steps",
        (2,),
        lambda s: (s.status, len(s.rows)),
        lambda b, s, v: (b, s) == ((0, 8), (3, 4)),
        {"checkpoint_interval": 2, "max_steps": 8, "max_rollbacks": 0},
        patch=looks.NAN_FROM_3,
    ),
    Case(
        "max_rollbacks",
        (1, 2),
        lambda s: (len(s.rows), s.column("rollbacks")),
        lambda b, s, v: s == (4 + 2 * v, list(range(1, v + 1))),
        {"checkpoint_interval": 2, "max_steps": 8, "max_skipped_steps": 2, "max_rollbacks": 0},
        patch=looks.NAN_FROM_3,
    ),
    Case(
        "spike_threshold",
        (5.0,),
        lambda s: s.column("skipped_steps"),
        lambda b, s, v: (b, s) == ([], [1]),
        {"max_steps": 5},
        patch=looks.SPIKE_AT_4,
    ),
    Case(
        "patience",
        (1, 2),
        lambda s: s.steps("val_loss"),
        lambda b, s, v: b == [1, 2, 3, 4] and s == b[: 1 + v],
        {"eval_interval": 1, "learning_rate": 1e-30, "max_steps": 4},
    ),
    Case(
        "max_minutes",
        (1.4,),
        lambda s: (s.status, s.checkpoints()),
        lambda b, s, v: (b, s) == ((0, [3]), (4, [1])),
        {"max_minutes": 1.6},
        patch=looks.after_90_seconds,
    ),
    Case("run_dir", ("other/place",), whose("/run.json"), lambda b, s, v: (b, s) == (["run"], [v])),
    Case(
        "init_from",
        ("run",),
        lambda s: s.weights[0][HEAD].any().item(),
        lambda b, s, v: s and not b,
        {"run_dir": "new"},
        MADE,
    ),
    Case("resume", (True,), outcome, lambda b, s, v: "already holds a run" in b and s == [1, 2, 3], before=MADE),
    Case(
        "resume_from",
        ("run/checkpoints/step_00000002",),
        outcome,
        lambda b, s, v: (b, s) == ([1, 2, 3], [3]),
        {"run_dir": "new"},
        MADE,
    ),
    Case("overwrite", (True,), lambda s: (outcome(s), s.seeds), lambda b, s, v: len(s[1]) == 3, before=MADE),
    Case(
        "eval_only",
        (True,),
        lambda s: (len(s.rows), s.said.startswith("step 2: validation loss")),
        lambda b, s, v: s == (0, True),
        {"resume": True},
        MADE,
    ),
    Case(
        "dry_run",
        (True,),
        lambda s: (s.said.startswith("parameters"), whose("/run.json")(s)),
        lambda b, s, v: s == (True, []),
    ),
    Case(
        "profile_steps",
        (2,),
        lambda s: (s.profiled, "profile.txt" in (s.run_dir / "run.json").read_text()),
        lambda b, s, v: s == ([v], True),
    ),
    # [log]
    Case("log_interval", (2,), lambda s: s.steps("train_loss"), lambda b, s, v: (b, s) == ([1, 2, 3], [2, 3])),
    Case("sample_tokens", (5,), lambda s: s.said.count("  | "), lambda b, s, v: b == 0 and s > 0),
    Case(
        "sample_tokens",
        (7,),
        lambda s: s.samplings[0].max_new_tokens,
        lambda b, s, v: (b, s) == (5, v),
        {"sample_tokens": 5},
    ),
    Case("sample_prompt", ("went up",), lambda s: "  | went up" in s.said, others={"sample_tokens": 5}),
    Case(
        "wandb",
        ("offline", "online"),
        lambda s: [options["mode"] for options in s.wandb],
        lambda b, s, v: (b, s) == ([], [v]),
    ),
    Case(
        "wandb_project",
        ("mine",),
        lambda s: s.wandb[0]["project"],
        lambda b, s, v: (b, s) == ("gpt", v),
        {"wandb": "offline"},
    ),
]


@pytest.fixture(scope="module")
def bases() -> dict[str, Observed]:
    """Runs without the option under test, shared by their other options."""
    return {}


@pytest.mark.parametrize("kind", KINDS.values())
def test_each_option_has_a_case(kind):
    assert missing(kind, CASES, BASE) == []


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_an_option_acts(case, bases, tmp_path_factory, monkeypatch):
    def observe(options: dict[str, Any]) -> Observed:
        folder = prepare(tmp_path_factory.mktemp("option"), case.before)
        if case.patch is None:
            return Observed(folder, options)
        with pytest.MonkeyPatch.context() as patch:
            case.patch(patch)
            return Observed(folder, options)

    key = repr((case.others, case.before, case.patch))
    base = bases.get(key) or bases.setdefault(key, observe(case.others))
    look = case.look(base)
    changed = [case.look(observe(case.others | {case.name: value})) for value in case.values]
    table = next(name for name, kind in KINDS.items() if case.name in {f.name for f in fields(kind)})
    ignore(monkeypatch, KINDS[table], case.name, getattr(getattr(base.config, table), case.name))
    ignored = case.look(observe(case.others | {case.name: case.values[0]}))
    check(case, look, changed, [ignored])

"""A run directory: start and resume a run, and load its model."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt.arguments import checked
from gpt.cache import cache_folder
from gpt.checkpoint import best_checkpoint, load_weights, newest_checkpoint, verify
from gpt.command_line import config_from_toml, with_changes, write_toml
from gpt.config import Config, TrainConfig
from gpt.device import Device, pick_device
from gpt.distributed import World
from gpt.errors import UserError
from gpt.files import is_folder, make_folder, write_whole
from gpt.generate import generate
from gpt.hf_folders import adapter, instead
from gpt.lock import RunLock
from gpt.model import GPT
from gpt.run_files import RunFiles, checkpoints_of
from gpt.sampling import SamplingConfig
from gpt.shards import read_tokens
from gpt.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from gpt.corpus import Corpus  # which is a command too: `import gpt` leaves it to be run


def earlier_run(
    config: Config, lock: RunLock, say: Callable[[str], None] = print
) -> tuple[Tokenizer | None, Path | None]:
    """The tokenizer and the checkpoint that this run goes on from.

    A run that begins anew has no checkpoint, and no tokenizer unless init_from brings one.

    Takes the lock of a run that exists and may be written to, before anything of it is read.
    Raises UserError where the run directory is taken and neither resume nor overwrite is given, where the run would
    write over what no run wrote, where overwrite would delete what the run begins with, where there is nothing to
    evaluate, where the model or tokenizer asked for is not the run's, or a named checkpoint is damaged.
    """
    from gpt.initial import initial_tokenizer  # it reads runs too

    train = config.train
    files = run_files(train)
    if files.holds_run and not (train.eval_only or train.dry_run):
        lock.take()
    beginnings = [_run_of(train.resume_from)] if train.resume_from else []
    beginnings += [Path(train.init_from)] if train.init_from else []
    deleted = any(_same(train.run_dir, place) for place in beginnings)
    if train.resume_from and _same(train.resume_from.parent, checkpoints_of(train.run_dir)):
        deleted = True  # named by what a link leads to
    if train.overwrite and deleted:
        raise UserError(f"overwrite would delete {train.run_dir}, which this run begins with: give another --run-dir")
    if train.resume_from is not None:
        fault = verify(train.resume_from)
        if fault:
            raise UserError(f"cannot resume from {train.resume_from}: {fault}")
        source, checkpoint = _run_of(train.resume_from), train.resume_from
        if not _same(source, train.run_dir) and files.holds_run and not train.overwrite:
            raise UserError(f"{train.run_dir} already holds another run: add --overwrite, or give another --run-dir")
    elif train.eval_only or (train.resume and files.holds_run):
        source = train.run_dir
        checkpoint = read_run(source, say=say)[2] if train.eval_only else newest_checkpoint(checkpoints_of(source), say)
        if checkpoint is None:
            return initial_tokenizer(config), None
    elif files.holds_run and not (train.overwrite or train.resume):
        raise UserError(
            f"{train.run_dir} already holds a run: add --resume to go on, --overwrite to begin anew, "
            "or give another --run-dir"
        )
    else:
        return initial_tokenizer(config), None
    _check_same(config, config_from_toml(source / "config.toml"), source)
    return run_tokenizer(source), checkpoint


def _check_same(config: Config, saved: Config, source: Path) -> None:
    """UserError where the config asks for another model or tokenizer than a run was trained with."""
    ours, theirs = ({**asdict(c.model), **asdict(c.tokenizer)} for c in (config, saved))
    if config.tokenizer.tokenizer != "bpe":  # nothing else looks at it
        del ours["bpe_vocab_size"]
    for key, value in ours.items():
        if value != theirs[key] and not (key == "vocab_size" and value is None):
            what = "tokenizer" if hasattr(config.tokenizer, key) else "model"
            raise UserError(f"{source} was trained with {key} {theirs[key]}, not {value}: resume with the same {what}")


def _run_of(checkpoint: Path) -> Path:
    """The run directory of RUN/checkpoints/step_x, where checkpoints or the whole path may be a link."""
    run_dir = Path(os.path.abspath(checkpoint)).parent.parent
    return run_dir if (run_dir / "config.toml").exists() else checkpoint.resolve().parent.parent


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def run_files(train: TrainConfig) -> RunFiles:
    """What the run directory holds. UserError where this training would cost something that is not a run's."""
    files = RunFiles(train.run_dir, traces=train.profile_steps > 0)
    if not train.eval_only:
        own = train.resume_from is not None and _same(_run_of(train.resume_from), train.run_dir)
        files.check(resuming=train.resume or own, deleting=train.overwrite)
    return files


def claim_run_dir(train: TrainConfig, lock: RunLock) -> Path:
    """Make the run directory, take its lock and record the run's files; overwrite then deletes an earlier run's."""
    try:
        make_folder(train.run_dir)
        free, files = lock.take(), run_files(train)
        if free and files.holds_run and not train.overwrite:
            raise UserError(f"another training has begun in {train.run_dir}: give another --run-dir")
        files.record()
        if train.overwrite:
            files.delete()
            files.record()
    except OSError as error:
        raise UserError(f"cannot use the run directory {train.run_dir}: {error.strerror or error}") from error
    return train.run_dir


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the tokenizer's vocabulary, unless it asks for a larger one; UserError where it is too small.

    A table that comes with its tokenizer, by init_from, may grow to fit it.
    """
    from gpt.initial import has_tokenizer, initial_config

    size, source = config.model.vocab_size or tokenizer.vocab_size, config.train.init_from
    if source is not None and size < tokenizer.vocab_size and size == initial_config(source).vocab_size:
        if not has_tokenizer(source):
            raise UserError(
                f"the table of {source} has {size} rows and the tokenizer {config.tokenizer.tokenizer} "
                f"{tokenizer.vocab_size} tokens: name the one that it was trained with by --tokenizer"
            )
        size = tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}: raise it, or leave it out"
        )
    return with_changes(config, "model", vocab_size=size)


def summary(corpus: "Corpus", parameters: int, tokens_per_step: int, world: World, mode: str) -> str:
    """What a training begins with, in two lines."""
    return (
        f"{corpus.documents} document{'s' * (corpus.documents > 1)}: {corpus.train_tokens:,} tokens to train on, "
        f"{corpus.val_tokens:,} to validate; vocabulary {corpus.tokenizer.vocab_size:,}\n"
        f"{parameters:,} parameters on {world.device}, {tokens_per_step:,} tokens a step"
        + (f", {world.size} processes ({mode})" if world.size > 1 else "")
    )


def write_run(config: Config, tokenizer: Tokenizer, corpus: "Corpus") -> None:
    """The run directory's config.toml, tokenizer.json and corpus.json, each written whole or left unchanged."""
    run_dir = config.train.run_dir
    try:
        write_toml(config, run_dir / "config.toml")
        tokenizer.save(run_dir / "tokenizer.json")
        write_provenance(corpus, run_dir / "corpus.json")
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; the checkpoints are untouched") from error


def recipe(config: Config, processes: int = 1) -> dict[str, Any]:
    """What decides a run's numbers beside its text and model, by name: kept in each checkpoint for differences."""
    train = {key: getattr(config.train, key) for key in ("batch_size", "grad_accum_steps", "dtype", "max_steps")}
    data = {"packing": config.data.packing, "corpus_weights": list(config.data.corpus_weights)}
    rest = {**data, "dropout": config.model.dropout, **asdict(config.optim)}
    return {"threads": torch.get_num_threads(), "processes": processes, **train, **rest}


def differences(saved: dict[str, Any], now: dict[str, Any], step: int) -> str | None:
    """One sentence on what has changed since a checkpoint was saved, and what that does; None: nothing has."""
    rows = [[made.get(key) for key in ("batch_size", "grad_accum_steps", "processes")] for made in (saved, now)]
    alike = all(type(n) is int for n in rows[0]) and math.prod(rows[0]) == math.prod(rows[1])
    dealt = "sums are rounded in another order" + ", dropout is drawn anew" * bool(now["dropout"])
    reasons = {
        "threads": "CPU sums are rounded in another order",
        **dict.fromkeys(("processes", "batch_size", "grad_accum_steps"), dealt if alike else "a step sees other text"),
        "packing": "documents fill rows in another way",
        "corpus_weights": "a step sees other text",
        "max_steps": "the learning rate falls along another curve",
    }
    changed = [key for key in now if key in saved and saved[key] != now[key]]
    if now["schedule"] == "constant" == saved.get("schedule"):
        changed = [key for key in changed if key != "max_steps"]
    if not changed:
        return None
    clauses = [
        f"{key} is {now[key]}, was {saved[key]}" + f" ({reasons.get(key)})" * (key in reasons) for key in changed
    ]
    return f"from step {step} on this run differs from one that was never stopped: {'; '.join(clauses)}"


def write_provenance(corpus: "Corpus", path: Path) -> None:
    """What the run was trained on: every source with its size and SHA-256, and how it was split."""
    sources = [{"name": name, "bytes": size, "sha256": sha256} for name, size, sha256 in corpus.sources]
    counts = ("digest", "documents", "train_tokens", "val_tokens", "train_bytes", "val_bytes")
    record = {key: getattr(corpus, key) for key in counts} | {"sources": sources}
    record |= {"tokenizer": corpus.tokenizer.fingerprint}
    record |= {"parts": corpus.parts} if corpus.parts else {}
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def tokenized_folders(run_dir: Path) -> list[Path]:
    """Where the cache had the tokens that a run was trained on: a folder, or one for each of its weighted corpora.

    Raises OSError, ValueError, KeyError or TypeError where its config.toml or corpus.json is missing or damaged.
    """
    record = json.loads((run_dir / "corpus.json").read_bytes())
    cache = cache_folder(config_from_toml(run_dir / "config.toml").data.cache_dir)
    return [
        cache / "corpora" / digest[:32] for digest in (record["parts"] if "parts" in record else [record["digest"]])
    ]


def read_run(
    run_dir: Path, which: str | Path = "newest", say: Callable[[str], None] = print
) -> tuple[Config, Tokenizer, Path]:
    """Config, tokenizer and a sound checkpoint of a run: its newest, its best, or the one at a path.

    Raises UserError where one is missing or damaged.
    """
    if not is_folder(run_dir):
        hint = instead(run_dir) if run_dir.exists() else "there is no such directory"
        raise UserError(f"{run_dir} is not a run directory: {hint or 'it is a file'}")
    if not (run_dir / "config.toml").exists():
        hint = adapter(run_dir) if (run_dir / "config.json").exists() else instead(run_dir)
        if not hint and (run_dir / "config.json").exists():
            hint = "it is a Hugging Face checkpoint: train it on with --init-from, or load it with gpt.from_hf"
        raise UserError(f"{run_dir} is not a run directory: {hint or 'it has no config.toml'}")
    if which in ("newest", "best"):
        checkpoint = {"newest": newest_checkpoint, "best": best_checkpoint}[which](checkpoints_of(run_dir), say)
        if checkpoint is None:
            kind = "checkpoint" if which == "newest" else "best checkpoint"
            raise UserError(f"{run_dir} has no {kind} yet: train it first, or wait for its first one")
    else:
        checkpoint = Path(which)
        if fault := verify(checkpoint):
            raise UserError(f"the checkpoint {checkpoint} cannot be used: {fault}")
    return config_from_toml(run_dir / "config.toml"), run_tokenizer(run_dir), checkpoint


def run_tokenizer(run_dir: Path) -> Tokenizer:
    """A run's tokenizer; UserError where the file is damaged, or is not the one that the run was trained with."""
    tokenizer = load_tokenizer(run_dir / "tokenizer.json")
    try:
        trained = json.loads((run_dir / "corpus.json").read_bytes()).get("tokenizer")
    except (OSError, ValueError, AttributeError):
        trained = None
    if trained not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{run_dir / 'tokenizer.json'} is not the tokenizer that the run was trained with, so its ids mean other "
            "text: bring the file back"
        )
    return tokenizer


@checked
def load(run_dir: str | Path, device: Device = "auto", *, which: str | Path = "newest") -> tuple[GPT, Tokenizer]:
    """The model (in eval mode, fp32) and tokenizer of a run: the averaged weights, if kept.

    which: "newest", its newest sound checkpoint; "best", that of the lowest validation loss; or a checkpoint's path.
    Raises UserError where the directory holds no run, no checkpoint, or a damaged one, and for a device that cannot be
    used.
    """
    place = pick_device(device)
    config, tokenizer, checkpoint = read_run(Path(run_dir), which)
    model = GPT(config.model)
    load_weights(checkpoint, model, averaged=True)
    return model.eval().to(place), tokenizer


def loss_of_int8(run_dir: Path, model: GPT, tokenizer: Tokenizer, dtype: str | None = None) -> str:
    """A line that says what int8 weights cost this model, in nats per token, and on which tokens that was measured:
    the run's validation text while the cache holds it, otherwise what the model itself writes."""
    from gpt.quantize import quantization_loss

    T = model.config.seq_len
    tokens, what = _validation_tokens(run_dir, tokenizer), "the run's validation text"
    if tokens is None:
        config = SamplingConfig(num_samples=8, max_new_tokens=max(2, T // 2), rolling=True, temperature=1.0)
        pieces = [p for p in generate(model, tokenizer, [""], config) if p.token is not None]
        rows = [[p.token for p in pieces if p.sample == j] for j in range(8)]
        rows = [row for row in rows if len(row) > 1]
        if not rows:
            return "int8 weights: their loss was not measured, as the validation text is gone and the model wrote none"
        shortest = min(map(len, rows))
        tokens, what = torch.tensor([row[:shortest] for row in rows]), "text that the model wrote"
    else:
        width = min(T, len(tokens))
        rows = min(len(tokens) // width, max(1, 2048 // width))
        tokens = torch.from_numpy(tokens[: rows * width].astype("int64")).view(rows, width)
    lost = quantization_loss(
        model, tokens.to(model.embed.weight.device), dtype=None if dtype is None else getattr(torch, dtype)
    )
    return f"int8 weights: {lost:+.4f} nats per token, on {tokens[:, 1:].numel():,} tokens of {what}"


def _validation_tokens(run_dir: Path, tokenizer: Tokenizer) -> np.ndarray | None:
    """The run's validation tokens, at least two, if the cache still holds them."""
    try:
        tokens = read_tokens(tokenized_folders(run_dir)[0] / "val.tokens", tokenizer)
    except (OSError, ValueError, KeyError, TypeError):  # a UserError is a ValueError
        return None
    return tokens if len(tokens) > 1 else None

"""Start or resume a run: what it begins from, and what it writes at startup."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gpt.config import Config
from gpt.config_file import config_from_toml, with_changes, write_toml
from gpt.data.corpus import Corpus
from gpt.data.provenance import write_provenance
from gpt.data.tokenizers import Tokenizer
from gpt.distributed import World
from gpt.errors import UserError
from gpt.files import make_folder
from gpt.interop.initial import has_tokenizer, initial_config, initial_tokenizer
from gpt.option import marked
from gpt.run.checkpoint import newest_checkpoint, verify
from gpt.run.layout import CONFIG, CORPUS, TOKENIZER, checkpoints_of
from gpt.run.loading import read_run, run_tokenizer
from gpt.run.lock import RunLock
from gpt.run.run_files import RunFiles
from gpt.training.config import TrainConfig


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
    _check_same(config, config_from_toml(source / CONFIG), source)
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
    return run_dir if (run_dir / CONFIG).exists() else checkpoint.resolve().parent.parent


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


def summary(corpus: Corpus, parameters: int, tokens_per_step: int, world: World, mode: str) -> str:
    """What a training begins with, in two lines."""
    return (
        f"{corpus.documents} document{'s' * (corpus.documents > 1)}: {corpus.train_tokens:,} tokens to train on, "
        f"{corpus.val_tokens:,} to validate; vocabulary {corpus.tokenizer.vocab_size:,}\n"
        f"{parameters:,} parameters on {world.device}, {tokens_per_step:,} tokens a step"
        + (f", {world.size} processes ({mode})" if world.size > 1 else "")
    )


def write_run(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """The run directory's config.toml, tokenizer.json and corpus.json, each written whole or left unchanged."""
    run_dir = config.train.run_dir
    try:
        write_toml(config, run_dir / CONFIG)
        tokenizer.save(run_dir / TOKENIZER)
        write_provenance(corpus, run_dir / CORPUS)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; the checkpoints are untouched") from error


def recipe(config: Config, processes: int = 1) -> dict[str, Any]:
    """Collect what determines a run's numbers beside its text and model: a checkpoint keeps it for `differences`."""
    found = {"threads": torch.get_num_threads(), "processes": processes}
    for part in (config.train, config.data, config.model):
        found |= marked(part, lambda rules: rules.in_recipe)
    return found | {"corpus_weights": list(config.data.corpus_weights)} | asdict(config.optim)


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

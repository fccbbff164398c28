"""Start or resume a run: the checkpoint it starts from, and the files it writes at startup."""

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
    """Find the tokenizer and the checkpoint to resume from.

    A new run has no checkpoint, and a tokenizer only if init_from provides one. Takes the lock of an existing run that
    may be written to, before reading from it.

    Raises UserError if the run directory is taken and neither resume nor overwrite is given, if the run would destroy
    files that are not a run's or delete what it starts from, if there is nothing to evaluate, if model or tokenizer
    differ from those of the run, or if a named checkpoint is damaged.
    """
    train = config.train
    files = run_files(train)
    if files.holds_run and not (train.eval_only or train.dry_run):
        lock.take()
    sources = [_run_of(train.resume_from)] if train.resume_from else []
    sources += [Path(train.init_from)] if train.init_from else []
    deleted = any(_same(train.run_dir, source) for source in sources)
    if train.resume_from and _same(train.resume_from.parent, checkpoints_of(train.run_dir)):
        deleted = True  # `checkpoints` is a link
    if train.overwrite and deleted:
        raise UserError(f"overwrite would delete {train.run_dir}, which this run starts from: give another --run-dir")
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
            f"{train.run_dir} already holds a run: add --resume to continue it, --overwrite to delete "
            "it, or give another --run-dir"
        )
    else:
        return initial_tokenizer(config), None
    _check_same(config, config_from_toml(source / CONFIG), source)
    return run_tokenizer(source), checkpoint


def _check_same(config: Config, saved: Config, source: Path) -> None:
    """Raise UserError if the config's model or tokenizer is not the one that a run was trained with."""
    ours, theirs = ({**asdict(c.model), **asdict(c.tokenizer)} for c in (config, saved))
    if config.tokenizer.tokenizer != "bpe":  # it is ignored
        del ours["bpe_vocab_size"]
    for key, value in ours.items():
        if value != theirs[key] and not (key == "vocab_size" and value is None):
            what = "tokenizer" if hasattr(config.tokenizer, key) else "model"
            raise UserError(f"{source} was trained with {key} {theirs[key]}, not {value}: resume with the same {what}")


def _run_of(checkpoint: Path) -> Path:
    """Return the run directory of RUN/checkpoints/step_x; any part of the path may be a link."""
    run_dir = Path(os.path.abspath(checkpoint)).parent.parent
    return run_dir if (run_dir / CONFIG).exists() else checkpoint.resolve().parent.parent


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def run_files(train: TrainConfig) -> RunFiles:
    """Inspect the run directory. Raises UserError if this training would destroy files that are not a run's."""
    files = RunFiles(train.run_dir, traces=train.profile_steps > 0)
    if not train.eval_only:
        own = train.resume_from is not None and _same(_run_of(train.resume_from), train.run_dir)
        files.check(resuming=train.resume or own, deleting=train.overwrite)
    return files


def claim_run_dir(train: TrainConfig, lock: RunLock) -> None:
    """Create the run directory, lock it and write run.json; with overwrite, delete the earlier run."""
    try:
        make_folder(train.run_dir)
        is_new, files = lock.take(), run_files(train)
        if is_new and files.holds_run and not train.overwrite:
            raise UserError(f"another training has started in {train.run_dir}: give another --run-dir")
        files.record()
        if train.overwrite:
            files.delete()
            files.record()
    except OSError as error:
        raise UserError(f"cannot use the run directory {train.run_dir}: {error.strerror or error}") from error


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """Set vocab_size to the tokenizer's size, or check that the given one is large enough (else UserError).

    A table loaded by init_from together with its tokenizer may grow to fit it.
    """
    size, source = config.model.vocab_size or tokenizer.vocab_size, config.train.init_from
    if source is not None and size < tokenizer.vocab_size and size == initial_config(source).vocab_size:
        if not has_tokenizer(source):
            raise UserError(
                f"the table of {source} has {size} rows and the tokenizer {config.tokenizer.tokenizer} "
                f"{tokenizer.vocab_size} tokens: give the tokenizer that it was trained with by --tokenizer"
            )
        size = tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {size} is smaller than the tokenizer's {tokenizer.vocab_size}: increase it, or leave it out"
        )
    return with_changes(config, "model", vocab_size=size)


def write_run(config: Config, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Write the run's config.toml, tokenizer.json and corpus.json, each atomically."""
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
    """Say in one sentence which values of the recipe changed since a checkpoint, and their effect; None if none did."""
    split = ("processes", "batch_size", "grad_accum_steps")
    before, after = ([each.get(key) for key in split] for each in (saved, now))
    same_rows = all(type(n) is int for n in before) and math.prod(before) == math.prod(after)
    rounding = "sums are rounded in another order" + ", dropout is drawn anew" * bool(now["dropout"])
    reasons = {
        "threads": "CPU sums are rounded in another order",
        **dict.fromkeys(split, rounding if same_rows else "a step sees other text"),
        "packing": "documents fill rows differently",
        "corpus_weights": "a step sees other text",
        "max_steps": "the learning rate follows another curve",
    }
    changed = [key for key in now if key in saved and saved[key] != now[key]]
    if now["schedule"] == "constant" == saved.get("schedule"):
        changed = [key for key in changed if key != "max_steps"]
    if not changed:
        return None
    clauses = [
        f"{key} is {now[key]}, was {saved[key]}" + f" ({reasons.get(key)})" * (key in reasons) for key in changed
    ]
    return f"from step {step} on, this run differs from an uninterrupted one: {'; '.join(clauses)}"

"""Build the Job of a training: corpora, model, optimizers, restored state and run directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt.config import Config
from gpt.data.corpus import Corpus
from gpt.data.loader import Batches
from gpt.data.mixture import check_lengths, make_mixture, prepare_all, together
from gpt.data.packing import check_packing
from gpt.data.progress_bar import CorpusProgress
from gpt.data.token_files import read_tokens
from gpt.device import give_back_freed_memory, require_compiler
from gpt.distributed import World
from gpt.interop.initial import copy_initial_weights
from gpt.model import GPT
from gpt.run.layout import checkpoints_of
from gpt.run.lock import RunLock
from gpt.stop import StopRequest
from gpt.training.average import Average
from gpt.training.due import evaluate_only
from gpt.training.guard import Guard, LossScale
from gpt.training.job import Job
from gpt.training.monitor import Monitor
from gpt.training.optim import build_optimizers
from gpt.training.parallel import Parallel, mode_of
from gpt.training.plan import describe
from gpt.training.profile import Profiler
from gpt.training.ranks import check_alike, data_facts, start_facts, weight_facts
from gpt.training.resume import claim_run_dir, differences, earlier_run, recipe, with_vocabulary, write_run
from gpt.training.saver import Saver
from gpt.training.state import load_training_state
from gpt.training.validation import bound_note, recover_evaluation


def start(config: Config, world: World, lock: RunLock, stop: StopRequest) -> Job | None:
    """Build the Job and open its run directory; with dry_run or eval_only, do only that and return None.

    Raises UserError for wrong input before it changes the run directory, and Stopped if a rank was told to stop.
    """
    options, device = config.train, world.device
    if options.compile:
        require_compiler(device)
    if options.activation_checkpointing and device.type == "cpu":
        give_back_freed_memory()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    say = print if world.main else lambda text: None
    check_alike(world, start_facts(config))
    with stop.at_once():
        tokenizer, checkpoint = earlier_run(config, lock, say=say)
    # Rank 0 tokenizes the corpora, then the other ranks read them from the cache.
    with stop.at_once(), world.main_first(), CorpusProgress() as progress:
        shown = progress if world.main else None
        corpora = prepare_all(config.data, config.tokenizer, fixed_tokenizer=tokenizer, progress=shown)
    corpus = together(corpora)
    config = _checked(config, world, corpora, corpus, checkpoint)
    if options.dry_run:
        say(describe(config, device, corpus.train_tokens, world.size, [c.val_tokens for c in corpora]))
        return None
    job = _job(config, world, stop, corpora, is_new=checkpoint is None)
    state = {}
    if checkpoint is not None:
        with stop.at_once():
            state = restore(job, checkpoint)
    if options.eval_only:
        evaluate_only(job)
        return None
    _open_run(job, lock, corpus, checkpoint, state)
    return job


def _checked(
    config: Config, world: World, corpora: Sequence[Corpus], corpus: Corpus, checkpoint: Path | None
) -> Config:
    """Return the config with the vocabulary of the corpus. Raises UserError if config and corpus do not fit."""
    tokenizer = corpus.tokenizer
    check_alike(world, data_facts(corpus, checkpoint))
    check_lengths(corpora, config.data, config.model.seq_len)
    check_packing(config.data.packing, tokenizer.document_token, corpus.documents)
    config = with_vocabulary(config, tokenizer)
    if config.log.sample_tokens:
        tokenizer.encode(config.log.sample_prompt)  # refuse an unknown character now, not after hours
    return config


def _job(config: Config, world: World, stop: StopRequest, corpora: Sequence[Corpus], *, is_new: bool) -> Job:
    """Build data, model and optimizers, with initial weights for a new run."""
    options, device, tokenizer = config.train, world.device, corpora[0].tokenizer  # all corpora have the same one
    val_tokens = [read_tokens(c.val, tokenizer) for c in corpora]
    loader = make_mixture([read_tokens(c.train, tokenizer) for c in corpora], tokenizer, config, world)
    model = GPT(config.model).to(device)
    if is_new:
        copy_initial_weights(config, model, print if world.main else lambda text: None)
    check_alike(world, weight_facts(model))
    model.checkpoint_activations(options.activation_checkpointing)
    parallel = Parallel(model, world, mode_of(options, world), compiled=options.compile)
    return Job(
        config=config,
        world=world,
        stop=stop,
        tokenizer=tokenizer,
        loader=loader,
        batches=Batches(loader, device),
        val_tokens=val_tokens,
        model=model,
        parallel=parallel,
        optimizers=build_optimizers(model, config.optim, world),
        weights=[p for p in model.parameters() if p.requires_grad],
        average=Average(model, config.optim.ema_decay) if config.optim.ema_decay else None,
        guard=Guard(device, options.spike_threshold),
        loss_scale=LossScale(device, enabled=options.dtype == "float16"),
        tokens_per_step=options.batch_size * options.grad_accum_steps * world.size * config.model.seq_len,
        trials=2 * (parallel.mode == "ddp" and world.size > 1),  # the first creates optimizer states, so two
    )


def restore(job: Job, checkpoint: Path, **position: int) -> dict[str, Any]:
    """Restore the training state of a checkpoint, and return it. position: changes of its data position."""
    state = load_training_state(checkpoint, job.model, job.optimizers, job.average)
    job.at.load(state, job.tokens_per_step)
    job.batches.go_to(state.get("loader", {}) | position)
    job.loss_scale.load_state_dict(state.get("scaler", {}))
    job.guard.load_state_dict(state.get("guard", {}))
    recover_evaluation(job.at, checkpoint, state, job.config, job.val_tokens, job.world)
    return state


def _open_run(job: Job, lock: RunLock, corpus: Corpus, checkpoint: Path | None, state: dict[str, Any]) -> None:
    """Open the run directory, in which rank 0 writes from here on."""
    config, world, options, begins = job.config, job.world, job.config.train, job.at.step
    if world.main:
        claim_run_dir(options, lock)
        write_run(config, job.tokenizer, corpus)
        lasting = {key: state.get(key) for key in ("metrics_bytes", "wandb_id")}
        job.monitor = Monitor(config, start_step=begins, **lasting)
    job.saver = Saver(
        checkpoints_of(options.run_dir) if world.main else None,
        keep=options.keep_checkpoints,
        metrics=job.monitor.path,
        in_place=world.device.type == "cpu",  # a copy would take memory from training
    )
    job.profiler = Profiler(options.run_dir, options.profile_steps * world.main, job.monitor.say)
    job.checkpoint = checkpoint
    job.saved_step = begins if options.resume or checkpoint is None else None
    say = job.monitor.say
    say(_summary(job, corpus))
    say(bound_note(config, job.val_tokens))
    if begins >= options.max_steps:
        say(f"the run is already at step {begins}: raise --max-steps to continue it")
    say(differences(state.get("recipe", {}), recipe(config, world.size), begins))
    job.model.train()
    job.rate.restart(begins)


def _summary(job: Job, corpus: Corpus) -> str:
    """Summarise data and model in two lines."""
    return (
        f"{corpus.documents} document{'s' * (corpus.documents > 1)}: {corpus.train_tokens:,} tokens to train on, "
        f"{corpus.val_tokens:,} to validate; vocabulary {corpus.tokenizer.vocab_size:,}\n"
        f"{job.model.num_parameters():,} parameters on {job.device}, {job.tokens_per_step:,} tokens a step"
        + (f", {job.world.size} processes ({job.parallel.mode})" if job.world.size > 1 else "")
    )

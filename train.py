"""Train a GPT: python train.py [CONFIG.toml] [--name value ...], or torchrun --nproc-per-node N train.py ...

The loop is flat: setup, data, model, optimizer, loop. A run directory holds all of a run.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpt  # isort: skip  # noqa: F401 - before torch, whose threads' waiting it sets
import torch
from torch import Tensor

from gpt.config import Config
from gpt.data.loader import IGNORED, PLACES, Batches
from gpt.data.mixture import check_lengths, make_mixture, prepare_all, together
from gpt.data.packing import check_packing
from gpt.data.progress_bar import CorpusProgress
from gpt.data.token_files import read_tokens
from gpt.device import autocast, give_back_freed_memory, require_compiler, seed_generators
from gpt.distributed import World, join
from gpt.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED, out_of_memory, run_command
from gpt.interop.initial import copy_initial_weights
from gpt.model import GPT
from gpt.run.checkpoint import verify
from gpt.run.layout import checkpoints_of
from gpt.run.lock import RunLock
from gpt.stop import Stopped, StopRequest
from gpt.streams import check_output, do_without_output
from gpt.training.average import Average
from gpt.training.command import load_config
from gpt.training.gradients import gradient_norm, scale_gradients
from gpt.training.guard import Guard, LossScale, all_finite
from gpt.training.hardware import mfu, peak_flops
from gpt.training.monitor import Monitor, SilentMonitor
from gpt.training.optim import build_optimizers
from gpt.training.optimizer_state import take_step
from gpt.training.parallel import Parallel, mode_of
from gpt.training.plan import describe, fewer_rows
from gpt.training.profile import Profiler
from gpt.training.progress import Progress
from gpt.training.ranks import check_alike, data_facts, start_facts, weight_facts
from gpt.training.resume import claim_run_dir, differences, earlier_run, recipe, summary, with_vocabulary, write_run
from gpt.training.saver import Saver
from gpt.training.schedule import lr_scale, set_learning_rate
from gpt.training.state import load_training_state, training_tensors
from gpt.training.validation import bound_said, evaluate, evaluate_only, evaluations, sample_text, settle


def main(config: Config) -> int:
    """Train, or with eval_only evaluate; returns the exit status. Under torchrun all ranks together.

    Raises UserError for whatever the user can put right, before anything in the run directory is touched.
    """
    check_output() if config.train.dry_run or config.train.eval_only else do_without_output()
    try:
        with (
            join(config.train.device, config.train.parallel) as world,
            RunLock(config.train.run_dir if world.main else None) as lock,
        ):
            return train(config, world, lock)
    except Stopped as stopped:
        print(f"stopped by {stopped} before training began; the same command begins again", file=sys.stderr)
        return EXIT_STOPPED


def train(config: Config, world: World, lock: RunLock) -> int:
    """The whole run. world is joined already; the caller releases lock. Raises Stopped before the first step."""
    with StopRequest(config.train.max_minutes) as stop:
        return _train(config, world, lock, stop)


def _train(config: Config, world: World, lock: RunLock, stop: StopRequest) -> int:
    options, device = config.train, world.device

    # Setup.
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

    # Data: rank 0 makes what the others then find in the cache.
    with stop.at_once(), world.main_first(), CorpusProgress() as progress:
        shown = progress if world.main else None
        corpora = prepare_all(config.data, config.tokenizer, fixed_tokenizer=tokenizer, progress=shown)
    corpus = together(corpora)
    tokenizer = corpus.tokenizer
    check_alike(world, data_facts(corpus, checkpoint))
    check_lengths(corpora, config.data, config.model.seq_len)
    check_packing(config.data.packing, tokenizer.document_token, corpus.documents)
    config = with_vocabulary(config, tokenizer)
    if config.log.sample_tokens:
        tokenizer.encode(config.log.sample_prompt)  # a character that it lacks is refused here, not after hours
    if options.dry_run:
        if world.main:
            print(describe(config, device, corpus.train_tokens, world.size, [c.val_tokens for c in corpora]))
        return EXIT_DONE
    val_tokens = [read_tokens(c.val, tokenizer) for c in corpora]
    loader = make_mixture([read_tokens(c.train, tokenizer) for c in corpora], tokenizer, config, world)

    # Model and optimizer.
    model = GPT(config.model).to(device)
    if checkpoint is None:
        copy_initial_weights(config, model, say)
    check_alike(world, weight_facts(model))
    model.checkpoint_activations(options.activation_checkpointing)
    parameters, flops_per_token = model.num_parameters(), model.flops_per_token()
    parallel = Parallel(model, world, mode_of(options, world), compiled=options.compile)
    optimizers = build_optimizers(model, config.optim, world)
    weights = [p for p in model.parameters() if p.requires_grad]
    loss_scale = LossScale(device, enabled=options.dtype == "float16")
    average = Average(model, config.optim.ema_decay) if config.optim.ema_decay else None
    tokens_per_step = options.batch_size * options.grad_accum_steps * world.size * config.model.seq_len
    batches, guard, at, state = Batches(loader, device), Guard(device, options.spike_threshold), Progress(), {}
    extra = {"z_loss": config.optim.z_loss, "label_smoothing": config.optim.label_smoothing}

    def averaged() -> contextlib.AbstractContextManager:
        """The model with its averaged weights, if they are kept, for as long as the block lasts."""
        if average is None:
            return contextlib.nullcontext()
        saver.before_change()
        return average.swapped_in()

    def restore(checkpoint: Path, **place: int) -> dict[str, Any]:
        state = load_training_state(checkpoint, model, optimizers, average)
        at.load(state, tokens_per_step)
        batches.go_to(state.get("loader", {}) | place)
        loss_scale.load_state_dict(state.get("scaler", {}))
        guard.load_state_dict(state.get("guard", {}))
        settle(at, checkpoint, state, config, val_tokens, world)
        return state

    def heard() -> bool:
        """Whether any rank was told to stop: all must ask together."""
        return world.any(stop.reason is not None)

    if checkpoint is not None:
        with stop.at_once():
            state = restore(checkpoint)
    start = at.step
    if options.eval_only:
        evaluate_only(model, average, parallel, world, val_tokens, tokenizer, config, start, stop)
        return EXIT_DONE

    # The run directory: from here on things are written, by rank 0.
    run_dir, monitor = options.run_dir, SilentMonitor()
    if world.main:
        claim_run_dir(options, lock)
        write_run(config, tokenizer, corpus)
        lasting = {key: state.get(key) for key in ("metrics_bytes", "wandb_id")}
        monitor = Monitor(config, start_step=start, **lasting)
    directory = checkpoints_of(run_dir) if world.main else None
    on_cpu = device.type == "cpu"  # where a save's copy would take memory from the training
    saver = Saver(directory, keep=options.keep_checkpoints, metrics=monitor.path, in_place=on_cpu)
    monitor.say(summary(corpus, parameters, tokens_per_step, world, parallel.mode))
    monitor.say(bound_said(config, val_tokens))
    if start >= options.max_steps:
        monitor.say(f"the run is at step {start} already: give more --max-steps to go on")
    monitor.say(differences(state.get("recipe", {}), recipe(config, world.size), start))

    def save(*kinds: str) -> Path:
        state = {
            **asdict(at),
            "loader": batches.state_dict(),
            "scaler": loss_scale.state_dict(),
            "guard": guard.state_dict(),
            "recipe": recipe(config, world.size),
            **monitor.state(),
        }
        saver.save(training_tensors(model, optimizers, average, world), state, kinds=kinds)
        return checkpoints_of(run_dir) / f"{kinds[0]}_{at.step:08d}"

    def micro_step(batch: Sequence[Tensor], share: Tensor | float, reduced: bool) -> Tensor:
        """Add the gradients of a batch, which has this share of the step; its part of the loss."""
        x, y, *places = batch
        with parallel.gradients(reduced=reduced):
            with autocast(device, options.dtype):
                loss = parallel.loss(x, y, **dict(zip(PLACES, places)), **extra) * share
            (loss * loss_scale.scale if loss_scale.enabled else loss).backward()
        return loss.detach()

    def forward_backward() -> Tensor:
        """A step's gradients; its loss, the mean over this rank's targets: over all, when averaged over the ranks."""
        loss = torch.zeros((), device=device)
        micro_steps = options.batch_size * options.grad_accum_steps // loader.batch_size
        parts = (batches.next_batch() for _ in range(micro_steps))
        shares = itertools.repeat(1 / micro_steps)
        if config.data.packing == "best_fit":  # rows have places without a target: batches count by what they have
            parts = list(parts)
            counts = torch.stack([(y != IGNORED).sum() for _, y, *_ in parts]).float()
            shares = world.shares(counts)
        for n, (batch, share) in enumerate(zip(parts, shares), start=1):
            if n > 1 and listens and n % pace == 0 and heard():
                raise Stopped
            loss += micro_step(batch, share, reduced=n == micro_steps)
        return loss

    def fits_everywhere() -> bool:
        """Whether every rank has memory for a micro-batch. Each tries alone: none waits for one that has not.

        Raises Stopped where a rank was told to stop.
        """
        place, fits = batches.state_dict(), True
        try:
            micro_step(batches.next_batch(), 1.0, reduced=False)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fits = False
        model.zero_grad(set_to_none=True)
        batches.go_to(place)
        fitting, asked = world.sum(fits, stop.reason is not None)
        if asked and listens:
            raise Stopped
        return fitting == world.size

    def evaluated() -> list[dict[str, float]] | None:
        """The evaluations of this step; None where a stop was heard first."""
        watch = lambda done, total: monitor.evaluating(done, total) or heard()
        run = lambda limit: evaluate(model, parallel, world, val_tokens, tokenizer, config, limit, watch)
        with averaged():
            return evaluations(run, config, val_tokens, at)

    def validate() -> bool:
        """Evaluate this step and write it down, and show a sample; False where a stop was heard first."""
        if (results := evaluated()) is None:
            return False
        for result in results:
            monitor.log({"step": at.step, "tokens": at.tokens} | result)
        at.evaluated(results[0]["val_loss"])
        with averaged():
            sample = sample_text(model, parallel, world, tokenizer, config, lambda: stop.reason is not None)
        monitor.say(sample)
        return True

    def can_go_back() -> bool:
        if options.max_rollbacks <= loader.rollbacks:
            return False
        saver.wait()
        world.sum(0)  # all ranks wait for rank 0's checkpoint
        return world.sum(checkpoint is not None and verify(checkpoint) is None) == [world.size]

    # Loop. Nothing in it waits for the device but what comes after guard.read().
    status, stopping = EXIT_DONE, False
    # Between micro-batches a stop is heard where that makes no device wait, or seldom; not while steps are skipped.
    prompt, listens = world.size == 1 or on_cpu, True
    pace = 1 if prompt else 16
    saved_step = start if options.resume or checkpoint is None else None  # in the run directory
    trials = 2 * (parallel.mode == "ddp" and world.size > 1)  # steps to try first; the second has optimizer states
    profiler, peak = Profiler(run_dir, options.profile_steps * world.main, monitor.say), peak_flops(device)
    model.train()
    since, since_step = time.perf_counter(), at.step
    try:
        # A run that was stopped or killed between the two checkpoints of one step has the first of them, "step", alone.
        lacks_best = world.any(world.main and not (checkpoints_of(run_dir) / f"best_{start:08d}").exists())
        lacks_best = lacks_best and (options.resume or at.evaluation_due)
        if at.evaluation_due:
            stopping = not validate()
        if kinds := ["step"] * (stopping and saved_step is None) + ["best"] * (lacks_best and at.is_best):
            save(*kinds)
        elif options.resume and start >= options.max_steps:
            saver.prune(start)  # the last save may have been killed before it did
        while at.step < options.max_steps and not (stopping or at.without_progress(options.patience)):
            scale = lr_scale(at.step, options.max_steps, config.optim)
            set_learning_rate(optimizers, scale)
            place, loss, abandoned = batches.state_dict(), None, False
            try:
                fits = trials == 0 or fits_everywhere()
                seed_generators(device, options.seed, at.step, world.rank)  # of dropout: a resumed run draws alike
                loss = forward_backward() if fits else None
            except Stopped:
                abandoned = True
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            if abandoned:
                model.zero_grad(set_to_none=True)
                batches.go_to(place)
            elif loss is None:  # out here the error no longer holds on to the activations
                model.zero_grad(set_to_none=True)
                rows = loader.batch_size
                batches.go_to(place, rows=fewer_rows(rows, config, device, world.size, agreed=not fits))
                monitor.say(f"out of memory: micro-batches of {loader.batch_size} rows from now on, not {rows}")
                continue
            else:
                # Ranks must stop at the same step: what each was asked travels with the losses.
                loss, asked = world.mean(torch.stack((loss, torch.full_like(loss, stop.reason is not None)))).unbind()
                grad_norm = gradient_norm(weights) / loss_scale.scale
                found_inf = guard.update(loss, grad_norm, asked)
                if config.optim.grad_clip or loss_scale.enabled:
                    clip = (config.optim.grad_clip or math.inf) / (grad_norm + 1e-6)
                    scale_gradients(weights, clip.clamp(max=1.0) / loss_scale.scale)
                saver.before_change()
                for optimizer in optimizers:
                    take_step(optimizer, found_inf)
                    optimizer.zero_grad(set_to_none=True)
                loss_scale.update(found_inf)
                if average is not None:
                    average.update(found_inf)
                trials = max(0, trials - 1)
                at.step += 1
                at.tokens += tokens_per_step
                monitor.advance(at.step)
                saver.check()
                profiler.step()

            stopping = abandoned or (prompt and heard())
            last = at.step == options.max_steps
            # A stop adds no log and no evaluation: a resumed run has the metrics of one that was never stopped.
            log_now = not abandoned and (last or at.step % config.log.log_interval == 0)
            evaluate_now = not abandoned and (last or at.step % options.eval_interval == 0)
            save_now = not abandoned and (last or at.step % options.checkpoint_interval == 0)
            looked_at = log_now or evaluate_now or save_now
            if not (looked_at or stopping):
                continue
            seen = guard.read()  # waits for the device, and so does what follows
            at.skipped += seen.skipped
            stopping = stopping or seen.stopping
            save_now = save_now or (stopping and at.step != saved_step)
            monitor.say(seen.said(at.step))
            # A spike, or a gradient out of float16's range, says nothing against the weights; any other may.
            doubtful = seen.in_a_row > 0 and not seen.spike and not (loss_scale.enabled and math.isfinite(seen.loss))
            listens = not doubtful
            broken = (last or ((save_now or evaluate_now) and not doubtful)) and not all_finite(weights, world)
            failed = broken or (looked_at and seen.in_a_row >= options.max_skipped_steps)
            if doubtful and last and not failed:
                if (results := evaluated()) is None:  # the last checkpoint leads here again
                    stopping = True
                    break
                failed = not math.isfinite(results[0]["val_loss"])
            what = f"step {at.step}: the {'weights are not finite' if broken else seen.fault}"
            if failed and can_go_back():
                restore(checkpoint, rollbacks=loader.rollbacks + 1)
                monitor.rewind(at.step)
                monitor.log({"step": at.step, "tokens": at.tokens, "rollbacks": loader.rollbacks})
                monitor.say(f"{what}; rollback {loader.rollbacks}: on from step {at.step} with other data")
                since, since_step, stopping = time.perf_counter(), at.step, False
                continue
            if failed:
                left = f"the checkpoint {checkpoint.name} is sound" if checkpoint else "nothing was saved"
                monitor.say(f"{what} and training gives up; {left}.")
                monitor.say("Try a lower --learning-rate, a longer --warmup-steps, or --grad-clip 1")
                status = EXIT_DIVERGED
                break
            if doubtful and not last:
                stopping = False  # until a step is taken there is nothing new to see, and nothing to save
                continue
            record = {"step": at.step, "tokens": at.tokens}
            if log_now:
                rate = (at.step - since_step) * tokens_per_step / (time.perf_counter() - since)
                learning_rate = scale * config.optim.learning_rate
                numbers = {"learning_rate": learning_rate, "tokens_per_second": round(rate, 1)}
                if peak is not None:
                    numbers["mfu"] = round(mfu(rate, flops_per_token, peak, world.size), 4)
                monitor.log(record | seen.record(at.skipped) | numbers)
                at.skipped = 0
            at.evaluation_due = evaluate_now
            if save_now:  # before the evaluation, which may take long
                checkpoint, saved_step = save("step"), at.step
            if evaluate_now:
                stopping = not validate() or (not last and heard())
                ends = (stopping or at.without_progress(options.patience)) and saved_step != at.step
                if kinds := ["step"] * ends + ["best"] * at.is_best:
                    made = save(*kinds)
                    checkpoint = checkpoint if save_now else made
                    saved_step = at.step if ends else saved_step
            since, since_step = time.perf_counter(), at.step
        saver.wait()
        if at.without_progress(options.patience) and status == EXIT_DONE:
            monitor.say(f"{at.said()}, and training ends")
        if stopping and status == EXIT_DONE:
            reason = stop.reason or "what another process was told"
            where = "there, with the evaluation of that step" if at.evaluation_due else "there"
            monitor.say(f"stopped by {reason} after step {at.step}; --resume goes on from {where}")
            status = EXIT_STOPPED
    finally:
        saver.close()
        batches.close()
        profiler.close()
        monitor.close()
    if world.main:
        print("\n".join(["written:", *(f"  {run_dir / name}" for name in monitor.written())]))
    world.sum(0)  # torchrun ends the others when one leaves with a status: none does before rank 0 is through
    return status


if __name__ == "__main__":
    run_command(lambda: main(load_config(sys.argv[1:])))

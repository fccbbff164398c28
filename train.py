"""Train a GPT: python train.py [CONFIG.toml] [--name value ...]

The loop is flat, in main(config): setup, data, model, optimizer, loop. A run directory holds everything of a run.
"""

import math
import signal
import sys
import time
from typing import Any

import gpt  # isort: skip  # noqa: F401 - before torch, whose threads' waiting it sets
import torch

from gpt.checkpoint import load_training_state, restore_rng, rng_state, training_tensors
from gpt.command_line import load_config, with_changes
from gpt.config import Config
from gpt.corpus import check_length, prepare
from gpt.device import autocast, pick_device, require_compiler
from gpt.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED, UserError, run_command
from gpt.generate import SamplingConfig, generate
from gpt.loader import TrainLoader, read_tokens, target_bytes, validation_batches
from gpt.lock import RunLock
from gpt.model import GPT
from gpt.monitor import CorpusProgress, Monitor
from gpt.optim import build_optimizers, lr_scale, set_learning_rate
from gpt.run import StopRequest, checkpoints_of, claim_run_dir, differences, earlier_run, recipe, write_run
from gpt.saver import Saver
from gpt.tokenizer import Tokenizer


@torch.no_grad()
def evaluate(model: GPT, tokens: Any, tokenizer: Tokenizer, config: Config) -> dict[str, float]:
    """Loss over the validation slice, each of its tokens but the first once, in windows of the context."""
    device, T, limit = model.embed.weight.device, config.model.seq_len, config.train.eval_tokens
    nats, count = 0.0, 0
    rows = max(config.train.batch_size, 8192 // T)
    model.eval()
    for x, y in validation_batches(tokens, batch_size=rows, seq_len=T, max_tokens=limit):
        with autocast(device, config.train.dtype):
            nats += float(model.loss(x.to(device), y.to(device), reduction="sum"))
        count += int((y >= 0).sum())
    model.train()
    bits = nats / math.log(2)
    return {"val_loss": nats / count, "bits_per_byte": bits / max(1, target_bytes(tokens, tokenizer, limit))}


def show_sample(model: GPT, tokenizer: Tokenizer, config: Config, monitor: Monitor) -> None:
    """Print what the model writes now. It draws from a generator of its own and changes nothing."""
    if config.log.sample_tokens:
        sampling = SamplingConfig(max_new_tokens=config.log.sample_tokens, rolling=True, seed=config.train.seed)
        pieces = generate(model, tokenizer, [config.log.sample_prompt], sampling)
        text = config.log.sample_prompt + "".join(piece.text for piece in pieces)
        monitor.say("\n".join("  | " + line for line in text.split("\n")))


def main(config: Config) -> int:
    """Train, or with eval_only evaluate; returns the exit status.

    Raises UserError for whatever the user can put right, before anything in the run directory is touched.
    """
    with RunLock(config.train.run_dir) as lock:
        return run(config, lock)


def run(config: Config, lock: RunLock) -> int:
    """main, with a lock that is released when it ends."""
    train = config.train

    # Setup.
    device = pick_device(train.device)
    if train.compile:
        require_compiler(device)
    torch.manual_seed(train.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer, checkpoint = earlier_run(config, lock)

    # Data.
    with CorpusProgress() as progress:
        corpus = prepare(config.data, config.tokenizer, fixed_tokenizer=tokenizer, progress=progress)
    tokenizer = corpus.tokenizer
    check_length(corpus, config.model.seq_len)
    config = with_changes(config, "model", vocab_size=config.model.vocab_size or tokenizer.vocab_size)
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}: "
            "raise it, or leave it out"
        )
    train_tokens, val_tokens = read_tokens(corpus.train, tokenizer), read_tokens(corpus.val, tokenizer)
    loader = TrainLoader(train_tokens, batch_size=train.batch_size, seq_len=config.model.seq_len, seed=train.seed)

    # Model and optimizer.
    model = GPT(config.model).to(device)
    optimizers = build_optimizers(model, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=train.dtype == "float16")
    weights = [p for p in model.parameters() if p.requires_grad]
    loss_fn = torch.compile(model.loss) if train.compile else model.loss
    start, state = 0, {}
    if checkpoint is not None:
        state = load_training_state(checkpoint, model, optimizers)
        start = state["step"]
        loader.load_state_dict(state["loader"])
        if state["scaler"]:  # empty where the run was not in float16
            scaler.load_state_dict(state["scaler"])
        restore_rng(state["rng"], device)
    if train.eval_only:
        result = evaluate(model, val_tokens, tokenizer, config)
        print(f"step {start}: validation loss {result['val_loss']:.4f} nats per token, ", end="")
        print(f"{result['bits_per_byte']:.4f} bits per byte")
        return EXIT_DONE

    # The run directory: from here on things are written.
    run_dir = claim_run_dir(train, lock)
    write_run(config, tokenizer, corpus)
    stop = StopRequest()
    lasting = {key: state.get(key) for key in ("metrics_bytes", "wandb_id")}
    monitor = Monitor(config, start_step=start, **lasting)
    saver = Saver(checkpoints_of(run_dir), keep=train.keep_checkpoints, metrics=monitor.path)
    tokens_per_step = train.batch_size * train.grad_accum_steps * config.model.seq_len
    monitor.say(
        f"{corpus.documents} document{'s' * (corpus.documents > 1)}: {corpus.train_tokens:,} tokens to train on, "
        f"{corpus.val_tokens:,} to validate; vocabulary {tokenizer.vocab_size:,}\n"
        f"{model.num_parameters():,} parameters on {device}, {tokens_per_step:,} tokens a step"
    )
    if start >= train.max_steps:
        monitor.say(f"the run is at step {start} already: give more --max-steps to go on")

    if changed := differences(state.get("recipe", {}), recipe(config), start):
        monitor.say(changed)

    def save(step: int, *kinds: str) -> None:
        state = {
            "step": step,
            "tokens": tokens_at(step),
            "best": best,
            "loader": loader.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng_state(device),
            "recipe": recipe(config),
            **monitor.state(),
        }
        saver.save(training_tensors(model, optimizers), state, kinds=kinds)

    def tokens_at(step: int) -> int:
        return state.get("tokens", start * tokens_per_step) + (step - start) * tokens_per_step

    # Loop.
    status, step, saved = EXIT_DONE, start, start
    best = state.get("best")  # step and val_loss of the lowest validation loss so far
    model.train()
    since, since_step = time.perf_counter(), step
    try:
        while step < train.max_steps and stop.signal is None:
            scale = lr_scale(step, train.max_steps, config.optim)
            set_learning_rate(optimizers, scale)
            loss = torch.zeros((), device=device)
            for _ in range(train.grad_accum_steps):
                x, y = loader.next_batch()
                with autocast(device, train.dtype):
                    micro_loss = loss_fn(x.to(device), y.to(device)) / train.grad_accum_steps
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, config.optim.grad_clip or math.inf)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()
            step += 1
            monitor.advance(step)
            saver.check()

            last = step == train.max_steps or stop.signal is not None
            log_now = last or step % config.log.log_interval == 0
            evaluate_now = step == train.max_steps or step % train.eval_interval == 0
            save_now = last or step % train.checkpoint_interval == 0
            best_now = False
            if not (log_now or evaluate_now or save_now):
                continue
            train_loss = float(loss)  # waits for the device, and so does what follows
            if not math.isfinite(train_loss) or (save_now and not all(torch.isfinite(w).all() for w in weights)):
                what = "weights are not finite" if math.isfinite(train_loss) else f"loss is {train_loss}"
                left = f"the checkpoint of step {saved} is sound" if saved else "nothing was saved"
                monitor.say(f"step {step}: the {what} and training gives up; {left}.")
                monitor.say("Try a lower --learning-rate, a longer --warmup-steps, or --grad-clip 1")
                status = EXIT_DIVERGED
                break
            record = {"step": step, "tokens": tokens_at(step)}
            if log_now:
                rate = (step - since_step) * tokens_per_step / (time.perf_counter() - since)
                learning_rate = scale * config.optim.learning_rate
                numbers = {"train_loss": train_loss, "learning_rate": learning_rate, "grad_norm": float(grad_norm)}
                monitor.log(record | numbers | {"tokens_per_second": round(rate, 1)})
            if evaluate_now:
                result = evaluate(model, val_tokens, tokenizer, config)
                monitor.log(record | result)
                show_sample(model, tokenizer, config, monitor)
                best_now = best is None or result["val_loss"] < best["val_loss"]
                best = {"step": step, "val_loss": result["val_loss"]} if best_now else best
            if save_now or best_now:
                save(step, *["step"] * save_now, *["best"] * best_now)
                saved = step
            since, since_step = time.perf_counter(), step
        saver.wait()
        if stop.signal is not None and status == EXIT_DONE:
            monitor.say(f"stopped by {signal.Signals(stop.signal).name} after step {step}; --resume goes on from there")
            status = EXIT_STOPPED
    finally:
        saver.close()
        monitor.close()
        stop.close()
    print("\n".join(["written:", *(f"  {run_dir / name}" for name in monitor.written())]))
    return status


if __name__ == "__main__":
    run_command(lambda: main(load_config(sys.argv[1:])))

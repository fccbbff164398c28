"""Train a GPT: python train.py [CONFIG.toml] [--name value ...]

The loop is flat, in main(config): setup, data, model, optimizer, loop. A run directory holds everything of a run.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch

from gpt.checkpoint import load_training_state, newest_checkpoint, restore_rng, rng_state, save_checkpoint, verify
from gpt.command_line import load_config, with_changes, write_toml
from gpt.config import Config
from gpt.corpus import check_length, prepare
from gpt.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED, UserError, run_command
from gpt.generate import SamplingConfig, generate
from gpt.loader import TrainLoader, read_tokens, target_bytes, validation_batches
from gpt.model import GPT
from gpt.monitor import Monitor
from gpt.optim import build_optimizers, lr_scale, set_learning_rate
from gpt.run import checkpoints_of, claim_run_dir, pick_device, read_run
from gpt.tokenizer import Tokenizer


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the second ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number


def autocast(device: torch.device, dtype: str) -> Any:
    """The autocast context of a dtype; auto is bfloat16 where a GPU has it, else float32."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


@torch.no_grad()
def evaluate(model: GPT, tokens: Any, tokenizer: Tokenizer, config: Config, context: Any) -> dict[str, float]:
    """Loss over the validation slice, each of its tokens but the first once, in windows of the context."""
    device = model.embed.weight.device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    T = config.model.seq_len
    rows = max(config.train.batch_size, 8192 // T)
    model.eval()
    for x, y in validation_batches(tokens, batch_size=rows, seq_len=T, max_tokens=config.train.eval_tokens):
        with context:
            total += model.loss(x.to(device), y.to(device), reduction="sum")
        count += int((y >= 0).sum())
    model.train()
    nats = float(total)
    bytes_ = target_bytes(tokens, tokenizer, max_tokens=config.train.eval_tokens)
    return {"val_loss": nats / count, "bits_per_byte": nats / math.log(2) / max(bytes_, 1)}


def main(config: Config) -> int:
    """Train, or with eval_only evaluate. Returns the exit status. Raises UserError before anything is written."""
    train, model_config = config.train, config.model
    run_dir = train.run_dir

    # Setup: everything that can be refused is refused before the run directory is touched.
    device = pick_device(train.device)
    context = autocast(device, train.dtype)
    torch.manual_seed(train.seed)
    torch.set_float32_matmul_precision("high")
    checkpoint = None
    fixed_tokenizer = None
    if train.eval_only or (train.resume and (run_dir / "config.toml").exists()):
        saved, fixed_tokenizer, checkpoint = read_run(run_dir) if train.eval_only else read_resumable(run_dir)
        refuse_other_model(config, saved)
        model_config = saved.model
    if train.resume_from is not None:
        fault = verify(train.resume_from)
        if fault:
            raise UserError(f"cannot resume from {train.resume_from}: {fault}")
        checkpoint = train.resume_from

    # Data.
    corpus = prepare(config.data, config.tokenizer, fixed_tokenizer=fixed_tokenizer)
    tokenizer = corpus.tokenizer
    check_length(corpus, model_config.seq_len)
    vocab_size = model_config.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}: raise it or leave it out"
        )
    config = with_changes(config, "model", **asdict(model_config) | {"vocab_size": vocab_size})
    train_tokens, val_tokens = read_tokens(corpus.train, tokenizer), read_tokens(corpus.val, tokenizer)
    loader = TrainLoader(train_tokens, batch_size=train.batch_size, seq_len=config.model.seq_len, seed=train.seed)

    # Model and optimizer.
    model = GPT(config.model).to(device)
    optimizers = build_optimizers(model, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=train.dtype == "float16")
    weights = [p for p in model.parameters() if p.requires_grad]
    loss_fn = torch.compile(model.loss) if train.compile else model.loss
    start_step = 0
    if checkpoint is not None:
        state = load_training_state(checkpoint, model, optimizers)
        start_step = state["step"]
        loader.load_state_dict(state["loader"])
        scaler.load_state_dict(state["scaler"])
        restore_rng(state["rng"], device)
    if train.eval_only:
        result = evaluate(model, val_tokens, tokenizer, config, context)
        print(
            f"step {start_step}: validation loss {result['val_loss']:.4f} nats per token, {result['bits_per_byte']:.4f} bits per byte"
        )
        return EXIT_DONE

    claim_run_dir(run_dir, resume=train.resume or train.resume_from is not None, overwrite=train.overwrite)
    write_toml(config, run_dir / "config.toml")
    tokenizer.save(run_dir / "tokenizer.json")
    stop = StopRequest()
    monitor = Monitor(
        run_dir,
        max_steps=train.max_steps,
        resume_step=start_step,
        wandb=config.log.wandb,
        wandb_project=config.log.wandb_project,
        config=asdict(config),
    )
    tokens_per_step = train.batch_size * train.grad_accum_steps * config.model.seq_len
    monitor.say(
        f"{corpus.documents} document(s), {corpus.train_tokens:,} training and {corpus.val_tokens:,} validation tokens; "
        f"{model.num_parameters():,} parameters on {device}; {tokens_per_step:,} tokens a step"
    )

    def save(step: int) -> None:
        state = {
            "step": step,
            "loader": loader.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": rng_state(device),
            "threads": torch.get_num_threads(),
        }
        save_checkpoint(checkpoints_of(run_dir), model, optimizers, state, keep=train.keep_checkpoints)

    # Loop.
    status = EXIT_DONE
    model.train()
    step, saved_step = start_step, start_step if checkpoint is not None else None
    since, since_step = time.perf_counter(), step
    try:
        while step < train.max_steps and stop.signal is None:
            scale = lr_scale(step, train.max_steps, config.optim)
            set_learning_rate(optimizers, scale)
            loss = torch.zeros((), device=device)
            for _ in range(train.grad_accum_steps):
                x, y = loader.next_batch()
                with context:
                    micro_loss = loss_fn(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
                    micro_loss = micro_loss / train.grad_accum_steps
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

            last = step == train.max_steps
            log_now = step % config.log.log_interval == 0 or last
            evaluate_now = step % train.eval_interval == 0 or last
            save_now = step % train.checkpoint_interval == 0 or last or stop.signal is not None
            if not (log_now or evaluate_now or save_now):
                continue
            # Reading the loss waits for the device, so it is done here only.
            train_loss = float(loss)
            if not (math.isfinite(train_loss) and (math.isfinite(float(grad_norm)) or scaler.is_enabled())):
                monitor.say(
                    f"step {step}: the loss is {train_loss} and the gradient's norm {float(grad_norm)}: training gave up, "
                    f"nothing was saved after {f'step {saved_step}' if saved_step else 'the start'}; "
                    "try a lower --learning-rate or a longer --warmup-steps"
                )
                status = EXIT_DIVERGED
                break
            record = {"step": step, "tokens": step * tokens_per_step}
            if log_now:
                elapsed = time.perf_counter() - since
                monitor.log(
                    record
                    | {
                        "train_loss": train_loss,
                        "learning_rate": scale * config.optim.learning_rate,
                        "grad_norm": float(grad_norm),
                        "tokens_per_second": round((step - since_step) * tokens_per_step / elapsed, 1),
                    }
                )
            if evaluate_now:
                monitor.log(record | evaluate(model, val_tokens, tokenizer, config, context))
                show_sample(model, tokenizer, config, monitor, first_token=int(train_tokens[0]))
            if save_now:
                save(step)
                saved_step = step
            if log_now or evaluate_now or save_now:
                since, since_step = time.perf_counter(), step
        if stop.signal is not None and status == EXIT_DONE:
            if saved_step != step:
                save(step)
            monitor.say(
                f"stopped by {signal.Signals(stop.signal).name} after step {step}, everything saved; --resume goes on"
            )
            status = EXIT_STOPPED
    finally:
        monitor.plot()
        monitor.close()
    for name in ("config.toml", "tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"):
        print(f"  {run_dir / name}")
    return status


def read_resumable(run_dir: Any) -> tuple[Any, Any, Any]:
    """As read_run, but a run that was stopped before its first checkpoint begins anew."""
    if newest_checkpoint(checkpoints_of(run_dir)) is None:
        return None, None, None
    return read_run(run_dir)


def refuse_other_model(config: Config, saved: Config | None) -> None:
    """UserError where a resumed run is asked for another model than the one it has."""
    if saved is None:
        return
    for key, value in asdict(config.model).items():
        was = getattr(saved.model, key)
        if value != was and not (key == "vocab_size" and value is None):
            raise UserError(
                f"the run has {key} {was}, the config asks for {value}: resume with the same model, or begin anew elsewhere"
            )


def show_sample(model: GPT, tokenizer: Tokenizer, config: Config, monitor: Monitor, first_token: int) -> None:
    """Print what the model writes now. It draws from a generator of its own and changes nothing."""
    if config.log.sample_tokens:
        sampling = SamplingConfig(max_new_tokens=config.log.sample_tokens, rolling=True, seed=config.train.seed)
        pieces = generate(model, tokenizer, [config.log.sample_prompt], sampling, first_token=first_token)
        text = config.log.sample_prompt + "".join(piece.text for piece in pieces)
        monitor.say("\n".join("  | " + line for line in text.splitlines()))


if __name__ == "__main__":
    run_command(lambda: main(load_config(sys.argv[1:])))

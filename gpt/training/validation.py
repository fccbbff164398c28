"""Compute the validation loss and generate a sample during training."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpt.config import Config
from gpt.data.loader import DOCUMENT_INPUTS, target_bytes, targets_in
from gpt.data.packing import validation_batches
from gpt.data.tokenizers import Tokenizer
from gpt.device import autocast
from gpt.distributed import World
from gpt.inference.generation import generate
from gpt.inference.sampling import SamplingConfig
from gpt.run.layout import METRICS
from gpt.training.parallel import Parallel
from gpt.training.progress import Progress

DEFAULT_TOKENS = 1 << 18  # that an evaluation reads of each corpus without --eval-tokens

Watch = Callable[[int, int], bool]  # (finished targets, all targets) -> whether to stop


@torch.no_grad()
def evaluate(
    parallel: Parallel, tokens: Sequence[Any], tokenizer: Tokenizer, config: Config, limit: int | None, watch: Watch
) -> dict[str, float] | None:
    """Compute the validation loss over all ranks: each token but the first once, in windows of the context.

    limit: the number of targets to read of each corpus, from its start; None: all. All ranks call watch together before
    each batch; returns None if it tells to stop. Several corpora give their weighted mean, and the loss of each as
    val_loss_1, val_loss_2, ...
    """
    world, weights, losses = parallel.world, config.data.corpus_weights, []
    total, done = sum(targets_in(part, limit) for part in tokens), 0
    T = config.model.seq_len
    rows = {"batch_size": max(config.train.batch_size, 8192 // T), "seq_len": T}
    rows |= {"rank": world.rank, "world_size": world.size, "max_tokens": limit}
    parallel.model.eval()
    try:
        for part in tokens:
            nats = count = 0
            for batch in validation_batches(part, config.data.packing, tokenizer.document_token, **rows):
                if watch(done + count * world.size, total):
                    return None
                count += int((batch[1] >= 0).sum())
                x, y, *places = (tensor.to(world.device) for tensor in batch)
                with autocast(world.device, config.train.eval_dtype or config.train.dtype):
                    nats += float(parallel.eval_loss(x, y, **dict(zip(DOCUMENT_INPUTS, places))))
            nats, count = world.sum(nats, count)
            losses.append(nats / count)
            done += int(count)
    finally:
        parallel.model.train()
    # Average bytes of text per target.
    sizes = [max(1, target_bytes(part, tokenizer, limit)) / targets_in(part, limit) for part in tokens]
    shares = [weight / sum(weights) for weight in weights] if len(tokens) > 1 else [1.0]
    nats, size = (sum(map(math.prod, zip(shares, values, strict=True))) for values in (losses, sizes))
    each = {f"val_loss_{i}": loss for i, loss in enumerate(losses, 1)} if len(tokens) > 1 else {}
    return {"val_loss": nats, "bits_per_byte": nats / math.log(2) / size, **each}


def limits(config: Config, tokens: Sequence[Any], *, ends: bool) -> list[int | None]:
    """List how many targets of each corpus the evaluations of a step read, one after the other; None: all.

    Every step has a bounded evaluation, so that losses compare on the same text. At the end of training a second one
    reads all text, unless that is the same or --eval-tokens is given.
    """
    if config.train.eval_tokens is not None:
        return [config.train.eval_tokens]
    if all(targets_in(part, None) <= DEFAULT_TOKENS for part in tokens):
        return [None]
    return [DEFAULT_TOKENS] + [None] * ends


def evaluations(
    run: Callable[[int | None], dict[str, float] | None], config: Config, tokens: Sequence[Any], at: Progress
) -> list[dict[str, float]] | None:
    """Run the evaluations of a step, the bounded one first; None if one was stopped. run(limit) runs one."""
    first = run(limits(config, tokens, ends=False)[0])
    if first is None:
        return None
    rest = limits(config, tokens, ends=_ends(at, config, first["val_loss"]))[1:]
    total = {"val_tokens": sum(targets_in(part, None) for part in tokens)}
    results = [first, *(result and result | total for result in map(run, rest))]
    return None if None in results else results


def recover_evaluation(
    at: Progress, checkpoint: Path, state: dict[str, Any], config: Config, tokens: Sequence[Any], world: World
) -> None:
    """Read the evaluation of a checkpoint saved before it, if the run's metrics.jsonl has it.

    The state's metrics_bytes then includes its lines. Rank 0 reads the file; all ranks must call this together.
    """
    if not at.evaluation_due:
        return
    found = _losses_written(checkpoint.parent.parent / METRICS, at.step, state.get("metrics_bytes"))
    losses, length = found if world.main else ([], 0)
    first, count, length = world.sum(losses[0] if losses else 0.0, len(losses), length)
    if count and count >= len(limits(config, tokens, ends=_ends(at, config, first))):
        at.evaluated(first)
        state["metrics_bytes"] += int(length)


def _ends(at: Progress, config: Config, val_loss: float) -> bool:
    """Tell whether training ends with a step of this validation loss."""
    after = replace(at)
    after.evaluated(val_loss)
    return at.step >= config.train.max_steps or after.without_progress(config.train.patience)


def bound_note(config: Config, tokens: Sequence[Any]) -> str | None:
    """Write a line on the text that evaluations skip by default, if they do."""
    if limits(config, tokens, ends=False) != [DEFAULT_TOKENS] or config.train.eval_tokens is not None:
        return None
    left = ", ".join(f"{targets_in(part, None):,}" for part in tokens)
    each = " of each corpus" if len(tokens) > 1 else ""
    return (
        f"evaluations read the first {DEFAULT_TOKENS:,} of {left} validation tokens{each}, the last one reads all; "
        "--eval-tokens sets a number for all evaluations"
    )


def _losses_written(metrics: Path, step: int, size: int | None) -> tuple[list[float], int]:
    """Read a step's validation losses after the first `size` bytes of a metrics.jsonl, and the bytes of their lines."""
    losses, length = [], 0
    try:
        with metrics.open("rb") as file:
            file.seek(size)
            for line in file:
                record = json.loads(line)
                if record["step"] != step or not line.endswith(b"\n"):
                    break
                losses.append(float(record["val_loss"]))
                length += len(line)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return losses, length


def sample_text(parallel: Parallel, tokenizer: Tokenizer, config: Config, stopped: Callable[[], bool]) -> str | None:
    """Generate a sample on rank 0, until stopped(); None on other ranks or without sample_tokens.

    It has its own random generator.
    """
    if not config.log.sample_tokens or (whole := parallel.whole_model()) is None:
        return None
    sampling = SamplingConfig(max_new_tokens=config.log.sample_tokens, rolling=True, seed=config.train.seed)
    pieces, text = generate(whole, tokenizer, [config.log.sample_prompt], sampling), config.log.sample_prompt
    for piece in pieces:
        text += piece.text
        if stopped():
            pieces.stop()
    return "\n".join("  | " + line for line in text.split("\n"))

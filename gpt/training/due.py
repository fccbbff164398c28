"""Log, evaluate and save after the steps at which each is due."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt.config import Config
from gpt.errors import EXIT_DONE, EXIT_STOPPED
from gpt.run.layout import checkpoint_name, checkpoints_of
from gpt.stop import Stopped
from gpt.training.guard import Reading
from gpt.training.job import Job
from gpt.training.monitor import Ticker
from gpt.training.resume import recipe
from gpt.training.state import training_tensors
from gpt.training.validation import evaluate, evaluations, sample_text


@dataclass(frozen=True)
class Due:
    """What to do after a step, and whether it is the last step."""

    last: bool = False
    log: bool = False
    evaluate: bool = False
    save: bool = False

    @classmethod
    def at(cls, step: int, config: Config) -> "Due":
        """Tell what is due after a step. The last step logs, evaluates and saves."""
        train, last = config.train, step == config.train.max_steps
        return cls(
            last=last,
            log=last or step % config.log.log_interval == 0,
            evaluate=last or step % train.eval_interval == 0,
            save=last or step % train.checkpoint_interval == 0,
        )

    @property
    def anything(self) -> bool:
        return self.log or self.evaluate or self.save


def log(job: Job, reading: Reading, learning_rate: float) -> None:
    """Write a line of metrics.jsonl."""
    numbers = {"learning_rate": learning_rate, **job.throughput()}
    job.monitor.log({"step": job.at.step, "tokens": job.at.tokens} | reading.record(job.at.skipped) | numbers)
    job.at.skipped = 0


def save(job: Job, *kinds: str) -> Path:
    """Start to write a checkpoint of each kind, "step" and "best"; return the path of the first."""
    state = {**asdict(job.at), **job.state(), "recipe": recipe(job.config, job.world.size), **job.monitor.state()}
    job.saver.save(training_tensors(job.model, job.optimizers, job.average, job.world), state, kinds=kinds)
    return checkpoints_of(job.config.train.run_dir) / checkpoint_name(kinds[0], job.at.step)


def save_step(job: Job) -> None:
    """Save this step, to resume from or to roll back to."""
    job.checkpoint, job.saved_step = save(job, "step"), job.at.step


def _evaluate(job: Job, limit: int | None, progress: Callable[[int, int], None]) -> dict[str, float] | None:
    """Evaluate the averaged weights on the first `limit` targets of each corpus; None if a rank was told to stop."""
    watch = lambda done, total: progress(done, total) or job.heard()
    with job.averaged():
        return evaluate(job.parallel, job.val_tokens, job.tokenizer, job.config, limit, watch)


def evaluated(job: Job) -> list[dict[str, float]] | None:
    """Evaluate this step; None if a rank was told to stop first."""
    run = lambda limit: _evaluate(job, limit, job.monitor.evaluating)
    return evaluations(run, job.config, job.val_tokens, job.at)


def evaluate_only(job: Job) -> None:
    """Print the validation loss of the checkpoint. All ranks must call it together.

    Raises Stopped on all ranks if one was told to stop.
    """
    ticker = Ticker(print if job.world.main else lambda text: None)
    if (result := _evaluate(job, job.config.train.eval_tokens, ticker)) is None:
        raise Stopped(job.stop.reason or "a signal to another process")
    if job.world.main:
        loss, bits = result["val_loss"], result["bits_per_byte"]
        print(f"step {job.at.step}: validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte")


def validate(job: Job) -> bool:
    """Evaluate this step, log the result and print a sample; False if a rank was told to stop first."""
    if (results := evaluated(job)) is None:
        return False
    for result in results:
        job.monitor.log({"step": job.at.step, "tokens": job.at.tokens} | result)
    job.at.evaluated(results[0]["val_loss"])
    with job.averaged():
        stopped = lambda: job.stop.reason is not None
        sample = sample_text(job.parallel, job.tokenizer, job.config, stopped)
    job.monitor.say(sample)
    return True


def validate_and_save(job: Job, due: Due) -> None:
    """Evaluate this step; save it if it is the best so far, or if training ends with it unsaved."""
    job.stopping = not validate(job) or (not due.last and job.heard())
    ends = (job.stopping or job.without_progress) and job.saved_step != job.at.step
    if kinds := ["step"] * ends + ["best"] * job.at.is_best:
        made = save(job, *kinds)
        if job.saved_step != job.at.step:
            job.checkpoint = made
        if ends:
            job.saved_step = job.at.step


def catch_up(job: Job) -> None:
    """Do what a stopped or killed run left undone: evaluate its last step, save its best checkpoint."""
    options, at = job.config.train, job.at
    # A kill can come between the two saves of a step: "step", then "best".
    best = checkpoints_of(options.run_dir) / checkpoint_name("best", at.step)
    lacks_best = job.world.any(job.world.main and not best.exists()) and (options.resume or at.evaluation_due)
    if at.evaluation_due:
        job.stopping = not validate(job)
    if kinds := ["step"] * (job.stopping and job.saved_step is None) + ["best"] * (lacks_best and at.is_best):
        save(job, *kinds)
    elif options.resume and at.step >= options.max_steps:
        job.saver.prune(at.step)  # a kill can come between the last save and its pruning


def finish(job: Job) -> int:
    """Wait for the last checkpoint, report how training ended, and return the exit status."""
    job.saver.wait()
    if job.without_progress:
        job.monitor.say(f"{job.at.patience_note()}, and training ends")
    if not job.stopping:
        return EXIT_DONE
    reason = job.stop.reason or "a signal to another process"
    first = ", beginning with the evaluation of that step" if job.at.evaluation_due else ""
    job.monitor.say(f"stopped by {reason} after step {job.at.step}; continue with --resume{first}")
    return EXIT_STOPPED

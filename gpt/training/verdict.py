"""Decide after a step whether to go on, wait, roll back or give up."""

import math
from enum import Enum, auto

from gpt.errors import EXIT_DIVERGED
from gpt.run.checkpoint import verify
from gpt.training.due import Due, evaluated
from gpt.training.guard import Reading, all_finite
from gpt.training.job import Job
from gpt.training.start import restore


class Verdict(Enum):
    """The decisions of judge."""

    GO_ON = auto()
    WAIT = auto()
    """steps are skipped: log and save nothing until one is taken"""
    ROLL_BACK = auto()
    GIVE_UP = auto()


def judge(job: Job, due: Due, saving: bool, reading: Reading) -> tuple[Verdict, str]:
    """Return the verdict on a step, and what is wrong with it. saving: its checkpoint is due.

    While steps are skipped there is nothing to save, so the job ignores stops.
    """
    # A spike or an overflow of float16 does not make the weights doubtful; any other fault does.
    overflow = job.loss_scale.enabled and math.isfinite(reading.loss)
    doubtful = reading.in_a_row > 0 and not reading.spike and not overflow
    job.listens = not doubtful
    looks = due.last or ((saving or due.evaluate) and not doubtful)
    broken = looks and not all_finite(job.weights, job.world)
    failed = broken or (due.anything and reading.in_a_row >= job.config.train.max_skipped_steps)
    if doubtful and due.last and not failed:
        if (results := evaluated(job)) is None:  # resuming from the last checkpoint leads here again
            job.stopping = True
            return Verdict.WAIT, ""
        failed = not math.isfinite(results[0]["val_loss"])
    if failed:
        verdict = Verdict.ROLL_BACK if can_go_back(job) else Verdict.GIVE_UP
        return verdict, f"step {job.at.step}: the {'weights are not finite' if broken else reading.fault}"
    if doubtful and not due.last:
        job.stopping = False
        return Verdict.WAIT, ""
    return Verdict.GO_ON, ""


def can_go_back(job: Job) -> bool:
    """Tell whether a rollback is left and every rank finds a valid checkpoint. All ranks must call it together."""
    if job.config.train.max_rollbacks <= job.loader.rollbacks:
        return False
    job.saver.wait()
    job.world.sum(0)  # all ranks wait for rank 0's checkpoint
    return job.world.sum(job.checkpoint is not None and verify(job.checkpoint) is None) == [job.world.size]


def roll_back(job: Job, fault: str) -> None:
    """Restore the last checkpoint, and change the order of the data after it."""
    restore(job, job.checkpoint, rollbacks=job.loader.rollbacks + 1)
    job.monitor.rewind(job.at.step)
    job.monitor.log({"step": job.at.step, "tokens": job.at.tokens, "rollbacks": job.loader.rollbacks})
    job.monitor.say(f"{fault}; rollback {job.loader.rollbacks}: continuing from step {job.at.step} with other data")
    job.rate.restart(job.at.step)
    job.stopping = False


def give_up(job: Job, fault: str) -> int:
    """Report why training gives up; return the exit status."""
    left = f"the checkpoint {job.checkpoint.name} is valid" if job.checkpoint else "nothing was saved"
    job.monitor.say(f"{fault} and training gives up; {left}.")
    job.monitor.say("Try a lower --learning-rate, a longer --warmup-steps, or --grad-clip 1")
    job.saver.wait()
    return EXIT_DIVERGED

"""Train a GPT: python train.py [CONFIG.toml] [--name value ...], or torchrun --nproc-per-node N train.py ...

`train` is the whole of it: build the job, take steps until it is over. A run directory holds all of a run.
"""

import sys

import gpt  # isort: skip  # noqa: F401 - before torch, whose threads' waiting it sets

from gpt.config import Config
from gpt.distributed import World, join
from gpt.errors import EXIT_DONE, EXIT_STOPPED, run_command
from gpt.run.lock import RunLock
from gpt.stop import Stopped, StopRequest
from gpt.streams import check_output, do_without_output
from gpt.training.command import load_config
from gpt.training.due import Due, catch_up, finish, log, save_step, validate_and_save
from gpt.training.gradients import gradient_norm
from gpt.training.job import Job
from gpt.training.schedule import lr_scale, set_learning_rate
from gpt.training.start import start
from gpt.training.step import accumulate, agree, clip, update
from gpt.training.verdict import Verdict, give_up, judge, roll_back


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
        job = start(config, world, lock, stop)
        if job is None:
            return EXIT_DONE
        try:
            status = loop(job)
        finally:
            job.close()
        if world.main:
            print("\n".join(["written:", *(f"  {config.train.run_dir / name}" for name in job.monitor.written())]))
        world.sum(0)  # torchrun ends the others when one leaves with a status: none does before rank 0 is through
        return status


def loop(job: Job) -> int:
    """Take steps until the job is over; its exit status. Nothing before guard.read() waits for the device."""
    config, at = job.config, job.at
    catch_up(job)
    while not job.is_over:
        scale = lr_scale(at.step, config.train.max_steps, config.optim)
        set_learning_rate(job.optimizers, scale)

        loss = accumulate(job)  # forward and backward
        if loss is not None:
            loss, asked = agree(job, loss)
            grad_norm = gradient_norm(job.weights) / job.loss_scale.scale
            found_inf = job.guard.update(loss, grad_norm, asked)
            clip(job, grad_norm)
            update(job, found_inf)

        # A stop adds no log and no evaluation: a resumed run has the metrics of one that was never stopped.
        due = Due.at(at.step, config) if loss is not None else Due()
        job.stopping = loss is None or (job.hears_at_once and job.heard())
        if not (due.anything or job.stopping):
            continue

        seen = job.guard.read()
        at.skipped += seen.skipped
        job.stopping = job.stopping or seen.stopping
        job.monitor.say(seen.said(at.step))
        saving = due.save or (job.stopping and at.step != job.saved_step)

        verdict, fault = judge(job, due, saving, seen)
        if verdict is Verdict.ROLL_BACK:
            roll_back(job, fault)
        elif verdict is Verdict.GIVE_UP:
            return give_up(job, fault)
        elif verdict is Verdict.GO_ON:
            if due.log:
                log(job, seen, scale * config.optim.learning_rate)
            at.evaluation_due = due.evaluate
            if saving:  # before the evaluation, which may take long
                save_step(job)
            if due.evaluate:
                validate_and_save(job, due)
            job.rate.restart(at.step)
    return finish(job)


if __name__ == "__main__":
    run_command(lambda: main(load_config(sys.argv[1:])))

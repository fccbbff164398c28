"""Train a GPT: python train.py [CONFIG.toml] [--name value ...], or torchrun --nproc-per-node N train.py ...

It builds the job and takes steps until the job is over. The run directory holds everything that it writes.
"""

import sys

import gpt  # isort: skip  # noqa: F401 - sets how threads wait, before torch starts them

from gpt.config import Config
from gpt.distributed import World, join
from gpt.errors import EXIT_DONE, EXIT_STOPPED, run_command
from gpt.run.lock import RunLock
from gpt.stop import Stopped, StopRequest
from gpt.streams import check_output, do_without_output
from gpt.training.command import load_config
from gpt.training.due import Due, catch_up, finish, log, save_step, validate_and_save
from gpt.training.job import Job
from gpt.training.schedule import lr_scale, set_learning_rate
from gpt.training.start import start
from gpt.training.step import accumulate, agree, clip, gradient_norm, update
from gpt.training.verdict import Verdict, give_up, judge, roll_back


def main(config: Config) -> int:
    """Train, or evaluate with eval_only, and return the exit status. Under torchrun all ranks call it together.

    Raises UserError for wrong input before it changes the run directory.
    """
    check_output() if config.train.dry_run or config.train.eval_only else do_without_output()
    try:
        with (
            join(config.train.device, config.train.parallel) as world,
            RunLock(config.train.run_dir if world.main else None) as lock,
        ):
            return train(config, world, lock)
    except Stopped as stopped:
        print(f"stopped by {stopped} before training began; run the same command again", file=sys.stderr)
        return EXIT_STOPPED


def train(config: Config, world: World, lock: RunLock) -> int:
    """Run a whole training. The caller joins world and releases lock. Raises Stopped before the first step."""
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
        world.sum(0)  # ranks exit together: torchrun kills the others when one exits with a status other than 0
        return status


def loop(job: Job) -> int:
    """Take steps until the job is over; return the exit status. Nothing before guard.read() waits for the device."""
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

        # Do not log or evaluate on a stop: a resumed run's metrics must equal an uninterrupted run's.
        due = Due.at(at.step, config) if loss is not None else Due()
        job.stopping = loss is None or (job.hears_at_once and job.heard())
        if not (due.anything or job.stopping):
            continue

        reading = job.guard.read()
        at.skipped += reading.skipped
        job.stopping = job.stopping or reading.stopping
        job.monitor.say(reading.note(at.step))
        saving = due.save or (job.stopping and at.step != job.saved_step)

        verdict, fault = judge(job, due, saving, reading)
        if verdict is Verdict.ROLL_BACK:
            roll_back(job, fault)
        elif verdict is Verdict.GIVE_UP:
            return give_up(job, fault)
        elif verdict is Verdict.GO_ON:
            if due.log:
                log(job, reading, scale * config.optim.learning_rate)
            at.evaluation_due = due.evaluate
            if saving:  # before the evaluation, which may take long
                save_step(job)
            if due.evaluate:
                validate_and_save(job, due)
            job.rate.restart(at.step)
    return finish(job)


if __name__ == "__main__":
    run_command(lambda: main(load_config(sys.argv[1:])))

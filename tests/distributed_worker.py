"""Several training runs in one process group: torchrun tests/distributed_worker.py CONFIGS.json

CONFIGS.json is a list of command lines; one start of the processes serves them all. After the last word may come a
number: the last rank is out of memory with more rows than that; or, under "optimizer", the name of one of the tests'.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import gpt.training.muon
import train as train_module
from gpt.distributed import join
from gpt.model import GPT
from gpt.run.lock import RunLock
from gpt.training import start as start_module
from gpt.training.command import load_config
from tests.optimizer_checks import MAKERS

true_loss, built_in = GPT.loss, start_module.build_optimizers


def loss_with_room_for(rows: int):
    def loss(self, x, *args, **options):
        if len(x) > rows and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return true_loss(self, x, *args, **options)

    return loss


def made(name: str):
    return lambda model, *_: [MAKERS[name](list(model.parameters()))]


if __name__ == "__main__":
    gpt.training.muon.multiplies_bfloat16 = lambda device: False  # rounding there would hide what is asked here
    with join("cpu", "auto") as world:
        for words in json.loads(Path(sys.argv[1]).read_text()):
            room = words.pop() if isinstance(words[-1], int) else None
            name = words.pop()["optimizer"] if isinstance(words[-1], dict) else None
            start_module.build_optimizers = built_in if name is None else made(name)
            GPT.loss = true_loss if room is None or world.main else loss_with_room_for(room)
            config = load_config(words)
            with RunLock(config.train.run_dir if world.main else None) as lock:
                status = train_module.train(config, world, lock)
            if status:
                sys.exit(status)

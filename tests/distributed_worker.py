"""Several training runs in one process group: torchrun tests/distributed_worker.py CONFIGS.json

CONFIGS.json is a list of command lines; one start of the processes serves them all. A number after the last word: the
last rank is out of memory with more rows than that.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import gpt.optim
from gpt.command_line import load_config
from gpt.config import TrainConfig
from gpt.distributed import join
from gpt.lock import RunLock
from gpt.model import GPT
from train import train

true_loss = GPT.loss


def loss_with_room_for(rows: int):
    def loss(self, x, *args, **options):
        if len(x) > rows and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return true_loss(self, x, *args, **options)

    return loss


if __name__ == "__main__":
    gpt.optim.multiplies_bfloat16 = lambda device: False  # rounding there would hide what is asked here
    with join(TrainConfig(device="cpu")) as world:
        for words in json.loads(Path(sys.argv[1]).read_text()):
            room = words.pop() if isinstance(words[-1], int) else None
            GPT.loss = true_loss if room is None or world.main else loss_with_room_for(room)
            config = load_config(words)
            with RunLock(config.train.run_dir if world.main else None) as lock:
                status = train(config, world, lock)
            if status:
                sys.exit(status)

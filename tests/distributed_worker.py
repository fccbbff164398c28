"""Several training runs in one process group: torchrun tests/distributed_worker.py CONFIGS.json

CONFIGS.json is a list of command lines; one start of the processes serves them all.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gpt.optim
from gpt.command_line import load_config
from gpt.config import TrainConfig
from gpt.distributed import join
from gpt.lock import RunLock
from train import train

if __name__ == "__main__":
    gpt.optim.multiplies_bfloat16 = lambda device: False  # rounding there would hide what is asked here
    with join(TrainConfig(device="cpu")) as world:
        for words in json.loads(Path(sys.argv[1]).read_text()):
            config = load_config(words)
            with RunLock(config.train.run_dir if world.main else None) as lock:
                status = train(config, world, lock)
            if status:
                sys.exit(status)

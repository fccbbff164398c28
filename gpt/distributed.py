"""What torchrun needs: the ranks, their process group and collectives, and whole tensors out of their shards.

Under `torchrun --nproc-per-node N train.py ...` each process is a rank with a device of its own. A process started
without it is a world of one, for which everything here does nothing.
"""

import gc
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.device import pick_device
from gpt.errors import LostProcess, UserError

# The others wait in a collective while rank 0 writes a checkpoint or samples; a dead rank is noticed at once on one
# node (torchrun ends the job) and after this long where only silence tells.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CORPUS_TIMEOUT = timedelta(days=1)  # rank 0 may have a long text to download and to tokenize


@dataclass(frozen=True)
class World:
    """This process among the others. `joined`: there is a process group, if only of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    joined: bool = False

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which alone logs, writes and samples."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks of a tensor that each of them has; in place, and on the device."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, in float64. Waits for the device."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether some rank says so. Waits for the device."""
        return self.sum(value)[0] > 0

    def shares(self, counts: Tensor) -> Tensor:
        """Each of this rank's counts (n,) over the mean, over ranks, of their sums: 0 where nothing was counted at all.

        Means weighted with them and averaged over the ranks make the mean over all that was counted.
        """
        total = self.mean(counts.sum())
        return counts / total.where(total > 0, 1.0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block alone; the others follow when it is through."""
        if self.size == 1:
            yield
            return
        patient = dist.new_group(backend="gloo", timeout=CORPUS_TIMEOUT)
        if not self.main:
            through = dist.barrier(patient, async_op=True)
            while not through.is_completed():  # a wait within the library would hear no signal
                time.sleep(0.05)
            through.wait()
        yield
        if self.main:
            dist.barrier(patient)
        dist.destroy_process_group(patient)

    def gather(self, text: str) -> list[str]:
        """The text that each rank gives, by rank. Waits for the device."""
        if self.size == 1:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)], device=self.device))
        longest = max(map(int, lengths))
        parts = [data.new_zeros(longest) for _ in range(self.size)]
        dist.all_gather(parts, torch.cat((data, data.new_zeros(longest - len(data)))))
        return [bytes(part[: int(n)].tolist()).decode() for part, n in zip(parts, lengths, strict=True)]


@contextmanager
def join(device: str, parallel: str) -> Iterator[World]:
    """The World that torchrun's environment describes, left in order at the end of the block.

    device and parallel: options of TrainConfig.

    Raises UserError for --parallel without torchrun, and for a device that the ranks of a node cannot share out.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if parallel != "auto":
            raise UserError(
                f"--parallel {parallel} needs torchrun: torchrun --nproc-per-node 2 train.py --parallel {parallel} ..."
            )
        yield World(pick_device(device))
        return
    rank, size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if size == 1 and parallel == "auto":
        yield World(pick_device(device))
        return
    own = _device_of(local_rank, device)
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, device_id=own if backend == "nccl" else None)
    try:
        yield World(own, rank, size, True)
    except UserError:
        # torchrun sends it when another rank left first: each says its sentence.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if backend == "gloo":  # NCCL could wait for ranks that are gone
            _leave()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        first_line = str(error).splitlines()[0]
        raise LostProcess(
            f"rank {rank} lost contact with another process, which ended or hangs: {first_line[:120]}"
        ) from error
    _leave()


def _leave() -> None:
    """End the process group and its threads: one that outlives Python aborts the process.

    Whatever still holds on to the group, such as DDP's reducer in a cycle, is collected first.
    """
    gc.collect()
    dist.destroy_process_group()


def _device_of(local_rank: int, name: str) -> torch.device:
    """The device of a node's local_rank-th process."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} finds {torch.cuda.device_count()} GPUs on this node: start as many "
                "processes as there are GPUs (--nproc-per-node), or give --device cpu"
            )
        torch.cuda.set_device(local_rank)  # before anything takes memory on the first GPU
        return torch.device("cuda", local_rank)
    if name.startswith("cuda:"):
        raise UserError(f"--device {name} names one GPU, but each process takes its own: give --device cuda")
    device = pick_device("cpu" if name == "auto" else name)
    if device.type != "cpu":
        raise UserError(f"several processes train on GPUs with CUDA or on CPUs, not on {device}: give --device cpu")
    return device


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, sharing its memory; all of it unless it is sharded."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered if it is sharded: then all ranks must call it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(whole: Tensor, pattern: Tensor) -> Tensor:
    """A copy of a whole tensor that is placed, and sharded, as the pattern is."""
    whole = whole.to(pattern.device, copy=True)
    if not hasattr(pattern, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # No rank as the source: each cuts its own part out of what it read.
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)


def first_row(tensor: Tensor, world: World) -> int:
    """Where this rank's rows of a tensor begin; fully_shard deals them out as torch.chunk does."""
    if not hasattr(tensor, "full_tensor"):
        return 0
    return min(world.rank * -(-tensor.shape[0] // world.size), tensor.shape[0])


def gathered(named: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Whole tensors by name on rank 0, nothing on the others; one at a time, and all ranks together."""
    whole = {}
    for name, tensor in named:
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = full(tensor)
            if world.main:
                whole[name] = tensor.cpu()
        elif world.main:
            whole[name] = tensor
    return whole


def shared_out(stacked: Tensor, owned: int, world: World) -> Tensor:
    """All ranks' parts (owned, ...) in one tensor (size * owned, ...), in the ranks' order."""
    if world.size == 1:
        return stacked
    whole = stacked.new_empty(world.size * owned, *stacked.shape[1:])
    # Its name from torch 2.13 on, and the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, stacked.contiguous())
    return whole

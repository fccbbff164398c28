"""Ranks under torchrun: the process group, collectives, and whole tensors gathered from shards.

Under `torchrun --nproc-per-node N train.py ...` each process is a rank with its own device. Without torchrun the world
has one process, and everything here does nothing.
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

# The other ranks wait in a collective while rank 0 writes a checkpoint or samples. On one node torchrun ends the job as
# soon as a rank dies; across nodes a dead rank is noticed after this time.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CORPUS_TIMEOUT = timedelta(days=1)  # rank 0 may download and tokenize a long text


@dataclass(frozen=True)
class World:
    """This process and its ranks. joined: a process group exists, even with a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    joined: bool = False

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the only one that logs, writes and samples."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over the ranks, in place on the device."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the ranks, in float64. Waits for the device."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Tell whether the value is true on any rank. Waits for the device."""
        return self.sum(value)[0] > 0

    def shares(self, counts: Tensor) -> Tensor:
        """Divide this rank's counts (n,) by the mean over the ranks of their sums; 0 if all counts are 0.

        As weights of per-count means, averaged over the ranks, they give the mean over everything counted.
        """
        total = self.mean(counts.sum())
        return counts / total.where(total > 0, 1.0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the other ranks."""
        if self.size == 1:
            yield
            return
        patient = dist.new_group(backend="gloo", timeout=CORPUS_TIMEOUT)
        if not self.main:
            barrier = dist.barrier(patient, async_op=True)
            while not barrier.is_completed():  # waiting inside the library would block signals
                time.sleep(0.05)
            barrier.wait()
        yield
        if self.main:
            dist.barrier(patient)
        dist.destroy_process_group(patient)

    def gather(self, text: str) -> list[str]:
        """Gather a text from each rank, in rank order. Waits for the device."""
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
    """Join the World described by torchrun's environment, and leave it in order at the end of the block.

    device, parallel: as in TrainConfig. Raises UserError for --parallel without torchrun, and for a device that the
    ranks of a node cannot share.
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
        # torchrun sends SIGTERM when another rank exits first; each rank still prints its error.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if backend == "gloo":  # NCCL could wait for ranks that have exited
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
    """Destroy the process group and its threads: a thread that outlives Python aborts the process."""
    gc.collect()  # first what still refers to the group, such as DDP's reducer in a cycle
    dist.destroy_process_group()


def _device_of(local_rank: int, name: str) -> torch.device:
    """Choose the device of process number local_rank on this node."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} finds {torch.cuda.device_count()} GPUs on this node: start one process "
                "per GPU (--nproc-per-node), or give --device cpu"
            )
        torch.cuda.set_device(local_rank)  # before anything allocates memory on the first GPU
        return torch.device("cuda", local_rank)
    if name.startswith("cuda:"):
        raise UserError(f"--device {name} names one GPU, but each process takes its own: give --device cuda")
    device = pick_device("cpu" if name == "auto" else name)
    if device.type != "cpu":
        raise UserError(f"several processes train on GPUs with CUDA or on CPUs, not on {device}: give --device cpu")
    return device


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor. All ranks must call it together if the tensor is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(whole: Tensor, pattern: Tensor) -> Tensor:
    """Copy a whole tensor to the device and sharding of the pattern."""
    whole = whole.to(pattern.device, copy=True)
    if not hasattr(pattern, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank: each takes its own part of the tensor that it read.
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)


def first_row(tensor: Tensor, world: World) -> int:
    """Return the index of this rank's first row of a tensor; fully_shard splits rows as torch.chunk does."""
    if not hasattr(tensor, "full_tensor"):
        return 0
    return min(world.rank * -(-tensor.shape[0] // world.size), tensor.shape[0])


def gathered(named: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Gather whole tensors by name on rank 0, one at a time; empty on the other ranks. All ranks call it together."""
    whole = {}
    for name, tensor in named:
        tensor, is_sharded = full(tensor.detach()), hasattr(tensor, "full_tensor")
        if world.main:
            whole[name] = tensor.cpu() if is_sharded else tensor
    return whole


def shared_out(stacked: Tensor, owned: int, world: World) -> Tensor:
    """Gather the parts (owned, ...) of all ranks into one tensor (size * owned, ...), in rank order."""
    if world.size == 1:
        return stacked
    whole = stacked.new_empty(world.size * owned, *stacked.shape[1:])
    # Named all_gather_single from torch 2.13 on.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, stacked.contiguous())
    return whole

"""Compute the loss on one process, or on several with DDP or FSDP2."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from gpt.distributed import World, gathered
from gpt.model import GPT
from gpt.training.config import TrainConfig

Mode = Literal["none", "ddp", "fsdp"]


def mode_of(train: TrainConfig, world: World) -> Mode:
    """Choose how the processes share the work."""
    if not world.joined:
        return "none"
    return "ddp" if train.parallel == "auto" else train.parallel


class _Loss(nn.Module):
    """GPT.loss as a forward method, which DDP and FSDP hook into."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, **options) -> Tensor:
        return self.model.loss(x, y, **options)


class Parallel:
    """A model's loss on every rank, whose gradients are the mean over the ranks.

    none: a single process. ddp: each rank has all weights, and gradients are averaged in buckets during the backward
    pass (Li et al. 2020). fsdp: each rank keeps its rows of each weight, gradient and optimizer state, and a block's
    weights are gathered while it computes (Zhao et al. 2023; PyTorch's fully_shard). It turns the model's parameters
    into DTensors, so build optimizers afterwards.
    """

    def __init__(self, model: GPT, world: World, mode: Mode, *, compiled: bool = False):
        self.model, self.world, self.mode = model, world, mode
        self.loss: Callable[..., Tensor] = model.loss
        self._eval_loss = model.loss
        if mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(world.device.type, (world.size,))
            for block in model.blocks:
                if compiled:
                    block.compile()
                fully_shard(block, mesh=mesh)
            self.loss = self._eval_loss = fully_shard(_Loss(model), mesh=mesh)
            return
        if mode == "ddp":
            DDP = nn.parallel.DistributedDataParallel
            devices = [world.device] if world.device.type == "cuda" else None
            # Our buffers are constant tables. The option is named forward_sync_buffers from torch 2.13 on.
            newer = "forward_sync_buffers" in inspect.signature(DDP).parameters
            constant = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
            self.loss = DDP(_Loss(model), device_ids=devices, gradient_as_bucket_view=True, **constant)
        if compiled:
            self.loss = torch.compile(self.loss)

    @contextmanager
    def gradients(self, *, reduced: bool) -> Iterator[None]:
        """Enclose a forward and backward pass; reduced=False accumulates its gradients on the rank."""
        if self.mode == "fsdp":
            self.loss.set_requires_gradient_sync(reduced)
        if self.mode == "ddp" and not reduced:
            with self.loss.no_sync():
                yield
        else:
            yield

    def eval_loss(self, x: Tensor, y: Tensor, **places: Tensor) -> Tensor:
        """Sum the losses of this rank's batch, without gradients. Under fsdp all ranks must call it together."""
        loss = self._eval_loss(x, y, reduction="sum", **places)
        if self.mode == "fsdp":
            # Without a backward pass the outermost weights would stay gathered and become stale.
            self._eval_loss.reshard()
        return loss

    def whole_model(self) -> GPT | None:
        """Return a model that rank 0 can run alone; None on the others. Under fsdp all ranks must call it together."""
        if self.mode != "fsdp":
            return self.model if self.world.main else None
        weights = gathered(self.model.named_parameters(), self.world)
        if not self.world.main:
            return None
        whole = GPT(self.model.config).to(self.world.device)
        whole.load_state_dict(weights, strict=False)  # a tied head has no parameter in weights
        return whole

"""Plan a run: parameters, memory, tokens, FLOPs and time (python train.py ... --dry-run).

Memory is counted: the model runs forward on tensors without data (torch's FakeTensorMode), and the tensors that
autograd saves for the backward pass are added up.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import Embedding

from gpt.config import Config
from gpt.data.loader import targets_in
from gpt.device import autocast
from gpt.errors import UserError
from gpt.model import GPT
from gpt.training.hardware import peak_flops
from gpt.training.optim import build_optimizers
from gpt.training.optimizer_state import begin_states
from gpt.training.schedule import lr_scale
from gpt.training.validation import limits

ASSUMED_MFU = 0.4  # of the peak; llm.c reaches this on an H100 at 124M parameters


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by purpose. loss: the workspace of the loss; process: Python and its libraries."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    loss: int = 0
    process: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {size(n)}" for name, n in asdict(self).items() if n)


def saved_bytes(model: GPT, batch_size: int, dtype: str, packing: str = "stream") -> int:
    """Count the bytes that a forward pass of batch_size rows saves for the backward pass, each storage once.

    Works on real and fake tensors. Weights, labels and temporary buffers of operators do not count.
    """
    device = model.embed.weight.device
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves, since a freed address could be reused

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, storage)
        return x

    def pack_inputs(block: torch.nn.Module, args: tuple) -> None:
        for x in filter(torch.is_tensor, args):
            pack(x)

    # The input of a recomputed block counts, whether torch's checkpoint shows it to the hooks or not.
    again = [block for block in getattr(model, "blocks", ()) if block.checkpointing]
    handles = [block.register_forward_pre_hook(pack_inputs) for block in again]
    idx = torch.zeros(batch_size, model.config.seq_len, dtype=torch.int64, device=device)
    places = {} if packing == "stream" else {"positions": idx, "segment_ids": idx.int()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(device, dtype):
        loss = model.loss(idx, idx, **places)
    del loss
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(model: GPT, config: Config) -> int:
    """Count the bytes that the forward pass of a micro-batch saves for the backward pass.

    With activation checkpointing: everything outside the blocks, the input of each block, and all of one block.
    """
    train, blocks = config.train, model.config.n_layer
    kept = saved_bytes(model, train.batch_size, train.dtype, config.data.packing)
    if not train.activation_checkpointing:
        return kept
    model.checkpoint_activations()  # each block then saves its input only
    outside = saved_bytes(model, train.batch_size, train.dtype, config.data.packing)
    return outside + (kept - outside) // blocks


def process_bytes(device: torch.device) -> int:
    """Return the memory of this process if the device is a CPU and the system is Linux, else 0."""
    status = Path("/proc/self/statm")
    if device.type != "cpu" or not status.exists():
        return 0
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of the states that an optimizer of fake weights keeps from its first step on."""
    with contextlib.suppress(DataDependentOutputException):  # the states exist before a value is read
        begin_states(optimizer)
    values = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(value.numel() * value.element_size() for value in values if value.ndim > 0)


def memory_of(config: Config, device: torch.device, processes: int = 1) -> Memory:
    """Count the memory of training on one device. config.model.vocab_size must be set."""
    with FakeTensorMode(allow_non_fake_inputs=True), device:
        model = GPT(config.model)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        states = sum(map(state_bytes, build_optimizers(model, config.optim)))
        with autocast(device, config.train.dtype):
            loss = model.loss_workspace_bytes(config.train.batch_size * model.config.seq_len, device)
        activations = activation_bytes(model, config)
    average = weights if config.optim.ema_decay else 0
    shards = processes if config.train.parallel == "fsdp" else 1
    return Memory(*(n // shards for n in (weights, weights, states, average)), activations, loss)


def fewer_rows(rows: int, config: Config, device: torch.device, processes: int = 1, *, agreed: bool = False) -> int:
    """Return the size of smaller micro-batches after `rows` rows ran out of memory: the largest divisor up to half.

    Raises UserError, which lists what needs the memory, for a single row. Also raised with several processes that have
    not agreed: one rank alone cannot restart a step, because the others wait for its gradients.
    """
    if rows > 1 and (processes == 1 or agreed):
        return next(part for part in range(rows // 2, 0, -1) if rows % part == 0)
    small = replace(config, train=replace(config.train, batch_size=rows))
    raise UserError(
        f"out of memory on {device} with micro-batches of {rows} x {config.model.seq_len}, which need about "
        f"{memory_of(small, device, processes)} and temporary buffers: lower --batch-size (and raise "
        "--grad-accum-steps alike), --seq-len or the model's size, or add --activation-checkpointing, --dtype bfloat16 "
        "or, with torchrun, --parallel fsdp"
    )


def sparkline(values: list[float]) -> str:
    """Draw non-negative numbers as a line of blocks; the largest gets the full block."""
    blocks, largest = " ▁▂▃▄▅▆▇█", max([*values, 1e-30])
    return "".join(blocks[round(8 * value / largest)] for value in values)


def describe(
    config: Config, device: torch.device, train_tokens: int, world_size: int = 1, val_tokens: Sequence[int] = ()
) -> str:
    """Write the plan: parameters, memory, tokens, FLOPs, learning rate and, for a known device, time."""
    train, optim, T = config.train, config.optim, config.model.seq_len
    process = process_bytes(device)  # first, since counting makes torch import more
    with torch.device("meta"):
        model = GPT(config.model)
    memory = replace(memory_of(config, device, world_size), process=process)
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, Embedding))
    blocks = sum(p.numel() for p in model.blocks.parameters())
    total = model.num_parameters()
    step_tokens = train.batch_size * train.grad_accum_steps * T * world_size
    tokens = step_tokens * train.max_steps
    flops = model.flops_per_token() * tokens
    curve = [lr_scale(int(i * (train.max_steps - 1) / 59), train.max_steps, optim) for i in range(60)]
    lines = [
        f"parameters       {total:,}: embeddings {tables:,}, blocks {blocks:,}, rest {total - tables - blocks:,}",
        f"memory           {size(memory.total)} on {device} with micro-batches of {train.batch_size} x {T}: {memory}",
        f"tokens           {tokens:,} in {train.max_steps:,} steps of {step_tokens:,}; "
        f"{tokens / train_tokens:.2f} epochs of {train_tokens:,}; {tokens / total:.1f} per parameter",
        f"FLOPs            {flops:.3g}, {model.flops_per_token():.3g} per token",
        f"learning rate    {sparkline(curve)}  peak {optim.learning_rate:g}, "
        f"last {optim.learning_rate * lr_scale(train.max_steps - 1, train.max_steps, optim):.3g}",
    ]
    if val_tokens:
        lines.append(_evaluations(config, model, flops, val_tokens))
    peak = peak_flops(device)
    if peak is not None:
        seconds = flops / (peak * world_size * ASSUMED_MFU)
        lines.append(f"time             {duration(seconds)} at {ASSUMED_MFU:.0%} of the device's peak")
    else:
        lines.append(f"time             unknown: the peak of {device} is not known")
    return "\n".join(lines)


def _evaluations(config: Config, model: GPT, flops: float, val_tokens: Sequence[int]) -> str:
    """Write the cost of the evaluations, relative to the FLOPs of training."""
    corpora = [range(n) for n in val_tokens]
    read = [sum(targets_in(part, limit) for part in corpora) for limit in limits(config, corpora, ends=True)]
    times = -(-config.train.max_steps // config.train.eval_interval)
    total = times * read[0] + sum(read[1:])
    share = total * model.flops_per_token(training=False) / flops
    once = f" and once {read[1]:,}" if len(read) > 1 else ""
    return f"evaluation       {times:,} times {read[0]:,} tokens{once}: {share:.1%} of the FLOPs above in addition"


def size(n_bytes: int) -> str:
    """Format bytes for people."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Format seconds for people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{math.ceil(seconds)} s"

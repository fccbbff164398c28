"""How the weights move: AdamW, Muon, their parameter groups, clipping, the schedule, and the weights' average."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.config import OptimConfig
from gpt.device import multiplies_bfloat16
from gpt.distributed import World, first_row, full, like, local, shared_out


def lr_scale(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate at a step (0 is the first) as a share of its peak.

    Linear warm-up; then a cosine (Loshchilov & Hutter 2017), or a straight line, or stable and linear decay over the
    last decay_fraction (WSD, Hu et al. 2024), or constant. Ends at min_lr / learning_rate.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr / config.learning_rate
    left = max_steps - step  # steps still to take, this one included
    if config.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left / max(1, max_steps - config.warmup_steps))
    elif config.schedule == "linear":
        share = left / max(1, max_steps - config.warmup_steps)
    elif config.schedule == "wsd":
        share = min(1.0, left / max(1.0, config.decay_fraction * max_steps))
    else:
        return 1.0
    return floor + (1 - floor) * share


# Quintic Newton-Schulz whose slope at zero is large: singular values land in about [0.7, 1.2] within five steps
# (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """About U V^T of each matrix G = U S V^T; G (..., rows, cols).

    Computed in dtype; None: in bfloat16, which suffices, where the device multiplies it in hardware, else in float32.
    """
    a, b, c = NEWTON_SCHULZ
    X = G.to(dtype or (torch.bfloat16 if multiplies_bfloat16(G.device) else torch.float32))
    X = X.flatten(0, -3) if X.ndim > 2 else X.unsqueeze(0)  # (matrices, rows, cols)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return (X.mT if tall else X).to(G.dtype).reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, for 2-d weights of hidden layers (Jordan et al. 2024).

    Matrices of one shape go through Newton-Schulz as one batch; each rank takes its share of it. The update of a
    (rows, cols) matrix is scaled by sqrt(max(1, rows / cols)); weight decay is decoupled: w -= lr * weight_decay * w.
    A group's `row_splits` cuts each of its weights into blocks of rows that are orthogonalised apart, as for the
    queries, keys and values of a fused projection.
    An attribute `found_inf` of 1 makes a step change nothing, as in torch's fused optimizers.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        world: World | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "row_splits": None,
        }
        super().__init__(params, defaults)
        self.world = world or World(torch.device("cpu"))

    def make_states(self, params: Iterable[Tensor] | None = None) -> None:
        """Give the params, all by default, the momentum that they begin with."""
        for p in [p for group in self.param_groups for p in group["params"]] if params is None else params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)

    @torch.no_grad()
    def step(self) -> None:
        taken = 1.0 if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self.make_states(params)
            buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
            grads = [local(p.grad) for p in params]
            if self.found_inf is not None:  # a buffer drawn towards itself stays, and no NaN gets past here
                grads = [torch.where(self.found_inf > 0, b, g) for b, g in zip(buffers, grads, strict=True)]
            mu = group["momentum"]
            torch._foreach_lerp_(buffers, grads, 1 - mu)
            nesterov = torch._foreach_lerp(grads, buffers, mu)
            if group["weight_decay"]:
                torch._foreach_mul_([local(p) for p in params], 1 - group["lr"] * group["weight_decay"] * taken)
            self._apply(params, nesterov, group, taken)

    def _apply(self, params: list[Tensor], momenta: list[Tensor], group: dict, taken: Tensor | float) -> None:
        """Move the params, of whose momenta this rank has its rows."""
        by_shape: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # (param's index, first row)
        for i, p in enumerate(params):
            start = 0
            for rows in group["row_splits"] or (p.shape[0],):
                by_shape[rows, p.shape[1]].append((i, start))
                start += rows
        for (rows, cols), blocks in by_shape.items():
            # Each rank orthogonalises `owned` of them; what is left over is zeros.
            owned = -(-len(blocks) // self.world.size)
            mine = range(self.world.rank * owned, (self.world.rank + 1) * owned)
            parts, gathered, whole = [], None, momenta[0]
            for n, (i, start) in enumerate(blocks):
                if gathered != i:  # all ranks gather together, one matrix at a time
                    gathered, whole = i, self._whole(momenta[i], params[i])
                if n in mine:
                    parts.append(whole[start : start + rows])
            parts += [momenta[0].new_zeros(rows, cols)] * (owned - len(parts))
            updates = shared_out(orthogonalize(torch.stack(parts), group["ns_steps"]), owned, self.world)
            updates *= taken
            alpha = -group["lr"] * math.sqrt(max(1.0, rows / cols))
            pairs = [self._rows_here(params[i], start, u) for (i, start), u in zip(blocks, updates, strict=False)]
            torch._foreach_add_([weight for weight, _ in pairs], [update for _, update in pairs], alpha=alpha)

    @staticmethod
    def _whole(rows: Tensor, p: Tensor) -> Tensor:
        """The matrix of p's shape that these rows of this rank belong to; they are all of it unless p is sharded."""
        if local(p) is p:
            return rows
        from torch.distributed.tensor import DTensor

        return full(DTensor.from_local(rows, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()))

    def _rows_here(self, p: Tensor, start: int, update: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of p's rows from `start` on, and of the update of those rows."""
        weight, low = local(p), first_row(p, self.world)
        a, b = max(start, low), min(start + len(update), low + len(weight))
        return weight[a - low : max(a, b) - low], update[a - start : max(a, b) - start]


def gradient_norm(weights: list[nn.Parameter]) -> Tensor:
    """The norm () of all gradients together, over all ranks."""
    return full(torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]))


@torch.no_grad()
def scale_gradients(weights: list[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by a factor ()."""
    torch._foreach_mul_([local(p.grad) for p in weights if p.grad is not None], factor)


class Average:
    """An exponential moving average of the weights: average += (1 - decay) * (weight - average) after each step.

    Kept in float32, sharded as the weights are. It starts as the weights are when it is made.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self._pairs = [(local(p.detach()), local(self.tensors[name])) for name, p in model.named_parameters()]

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Follow the weights by one step, unless the step was skipped."""
        weights, averages = map(list, zip(*self._pairs))
        away = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(away, (1 - self.decay) * (1 - found_inf))
        torch._foreach_add_(averages, away)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the average's values for as long as the block lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in self._pairs:
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take whole tensors by name, as checkpoints hold them."""
        for name, average in self.tensors.items():
            local(average).copy_(local(like(tensors[name], average)))


def leave_compiler_out() -> None:
    """Keep torch.optim from importing torch's compiler, a second and more, only to be exempt from it.

    The methods that torch exempts look for the exempted function under this name before they import. Compiled models
    are not concerned: our optimizers' steps are never compiled.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            function.__dynamo_disable = function


def build_optimizers(model: nn.Module, config: OptimConfig, world: World | None = None) -> list[torch.optim.Optimizer]:
    """The optimizers that move a GPT. Each group carries its peak rate as "peak_lr" for set_learning_rate.

    adamw: matrices and embeddings decay, vectors (norms and biases) do not, as in GPT-2 and nanoGPT. With base_width
    the matrices whose fan-in grows with the model have their rate times base_width / n_embd, and their decay divided
    by it, so that rate * decay stays (muP's rule for Adam: Yang et al. 2022, table 3).
    muon: the blocks' matrices under Muon; embeddings under Adam with one rate, head, gates and vectors with another, no
    decay.
    """
    leave_compiler_out()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Only the fused one takes found_inf.
    adam = {"betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": True}
    if config.optimizer == "adamw":
        share = 1.0 if config.base_width is None else config.base_width / model.config.n_embd
        # A head that is the embedding table is named as that.
        grow = {name for name, p in named if share != 1.0 and p.ndim >= 2 and "embed" not in name}
        groups = [
            {"params": [p for n, p in named if p.ndim >= 2 and n not in grow], "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        if grow:
            scaled = {"lr": config.learning_rate * share, "weight_decay": config.weight_decay / share}
            groups.append({"params": [p for name, p in named if name in grow], **scaled})
        optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, **adam)]
    else:
        hidden = [(name, p) for name, p in named if name.startswith("blocks.") and p.ndim == 2]
        matrices = {name: p for name, p in hidden if not name.endswith("value_gate.weight")}
        qkv = [p for name, p in matrices.items() if name.endswith("c_qkv.weight")]
        rest = [p for name, p in matrices.items() if not name.endswith("c_qkv.weight")]
        attn = model.blocks[0].attn
        splits = tuple(n * attn.head_dim for n in (attn.n_head, attn.n_kv_head, attn.n_kv_head))
        embeddings = [p for name, p in named if "embed" in name]
        others = [p for name, p in named if name not in matrices and "embed" not in name]
        groups = [{"params": qkv, "row_splits": splits}, {"params": rest}]
        optimizers = [
            Muon(groups, config.learning_rate, config.muon_momentum, config.weight_decay, config.muon_ns_steps, world),
            torch.optim.AdamW(
                [{"params": embeddings, "lr": config.embedding_lr}, {"params": others, "lr": config.head_lr}],
                weight_decay=0.0,
                **adam,
            ),
        ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Set every group's rate to scale times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = scale * group.setdefault("peak_lr", group["lr"])

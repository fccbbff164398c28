"""Muon: momentum, orthogonalised by Newton-Schulz."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from gpt.device import multiplies_bfloat16
from gpt.distributed import World, first_row, full, local, shared_out

# Quintic Newton-Schulz with a large slope at zero: five steps bring singular values into about [0.7, 1.2] (Jordan et
# al. 2024, "Muon: an optimizer for hidden layers in neural networks").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(G: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate U V^T of each matrix G = U S V^T; G (..., rows, cols).

    dtype: of the computation. None: bfloat16, which suffices, if the device has matrix units for it, else float32.
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
    """Momentum, orthogonalised by Newton-Schulz, for hidden layers' matrices and stacks of them (Jordan et al. 2024).

    Matrices of one shape form a batch for Newton-Schulz, which the ranks share out. The update of a (rows, cols) matrix
    is scaled by sqrt(max(1, rows / cols)); weight decay is decoupled: w -= lr * weight_decay * w. A group's
    `row_splits` cuts each of its weights (rows, cols) into blocks of rows that are orthogonalised separately, as the
    queries, keys and values of a fused projection. Each matrix of a stack (n, rows, cols) is a block. With an attribute
    `found_inf` of 1 a step changes nothing, as with torch's fused optimizers.
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
        """Create the initial momentum of the params, by default of all."""
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
            if self.found_inf is not None:  # with itself as the gradient a buffer stays, and no NaN enters it
                grads = [torch.where(self.found_inf > 0, b, g) for b, g in zip(buffers, grads, strict=True)]
            mu = group["momentum"]
            torch._foreach_lerp_(buffers, grads, 1 - mu)
            nesterov = torch._foreach_lerp(grads, buffers, mu)
            if group["weight_decay"]:
                torch._foreach_mul_([local(p) for p in params], 1 - group["lr"] * group["weight_decay"] * taken)
            self._apply(params, nesterov, group, taken)

    def _apply(self, params: list[Tensor], momenta: list[Tensor], group: dict, taken: Tensor | float) -> None:
        """Update the params, given this rank's rows of their momenta."""
        by_shape: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # (param's index, first row)
        for i, p in enumerate(params):
            start = 0
            for rows in group["row_splits"] or (p.shape[-2],) * math.prod(p.shape[:-2]):
                by_shape[rows, p.shape[-1]].append((i, start))
                start += rows
        for (rows, cols), blocks in by_shape.items():
            # Each rank orthogonalises `owned` blocks, padded with zeros.
            owned = -(-len(blocks) // self.world.size)
            mine = range(self.world.rank * owned, (self.world.rank + 1) * owned)
            parts, gathered, whole = [], None, momenta[0]
            for n, (i, start) in enumerate(blocks):
                if gathered != i:  # all ranks together, one matrix at a time
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
        """Gather all rows (n * rows, cols) of a tensor shaped and sharded like p, given this rank's rows."""
        if local(p) is p:
            return rows.flatten(0, -2)
        from torch.distributed.tensor import DTensor

        whole = full(DTensor.from_local(rows, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()))
        return whole.flatten(0, -2)

    def _rows_here(self, p: Tensor, start: int, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the rows of p that the update changes, from `start` on, and of the update."""
        weight = local(p).flatten(0, -2)
        low = first_row(p, self.world) * (p.shape[1] if p.ndim > 2 else 1)
        a, b = max(start, low), min(start + len(update), low + len(weight))
        return weight[a - low : max(a, b) - low], update[a - start : max(a, b) - start]

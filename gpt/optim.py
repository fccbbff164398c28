"""How the weights move: AdamW, Muon, their parameter groups, and the learning rate's schedule."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from gpt.config import OptimConfig
from gpt.device import multiplies_bfloat16


def lr_scale(step: int, max_steps: int, config: OptimConfig) -> float:
    """The learning rate at a step (0 is the first) as a share of its peak.

    Linear warm-up; then a cosine (Loshchilov & Hutter 2017), or stable and linear decay over the last decay_fraction
    (WSD, Hu et al. 2024), or constant. Ends at min_lr / learning_rate.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr / config.learning_rate
    left = max_steps - step  # steps still to take, this one included
    if config.schedule == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * left / max(1, max_steps - config.warmup_steps))
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

    Matrices of one shape go through Newton-Schulz as one batch. The update of a (rows, cols) matrix is scaled by
    sqrt(max(1, rows / cols)), and weight decay is decoupled: w -= lr * weight_decay * w.
    A group's `row_splits` cuts each of its weights into blocks of rows that are orthogonalised apart, as for the
    queries, keys and values of a fused projection.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, ns_steps: int = 5):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "row_splits": None,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            mu = group["momentum"]
            torch._foreach_lerp_(buffers, grads, 1 - mu)
            nesterov = torch._foreach_lerp(grads, buffers, mu)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            self._apply(params, nesterov, group)

    @staticmethod
    def _apply(params: list[Tensor], momenta: list[Tensor], group: dict) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, m in zip(params, momenta, strict=True):
            splits = group["row_splits"] or (p.shape[0],)
            for block, update in zip(p.split(splits), m.split(splits), strict=True):
                by_shape[block.shape].append((block, update))
        for (rows, cols), pairs in by_shape.items():
            updates = orthogonalize(torch.stack([m for _, m in pairs]), group["ns_steps"])
            alpha = -group["lr"] * math.sqrt(max(1.0, rows / cols))
            torch._foreach_add_([block for block, _ in pairs], list(updates.unbind()), alpha=alpha)


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers that move a GPT. Each group carries its peak rate as "peak_lr" for set_learning_rate.

    adamw: matrices and embeddings decay, vectors (norms and biases) do not, as in GPT-2 and nanoGPT.
    muon: the blocks' matrices under Muon; embeddings, head and vectors under Adam with rates of their own, no decay.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fused = all(p.device.type in ("cuda", "cpu") for _, p in named)
    adam = {"betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": fused}
    if config.optimizer == "adamw":
        groups = [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, **adam)]
    else:
        matrices = {name: p for name, p in named if name.startswith("blocks.") and p.ndim == 2}
        qkv = [p for name, p in matrices.items() if name.endswith("c_qkv.weight")]
        rest = [p for name, p in matrices.items() if not name.endswith("c_qkv.weight")]
        attn = model.blocks[0].attn
        splits = tuple(n * attn.head_dim for n in (attn.n_head, attn.n_kv_head, attn.n_kv_head))
        embeddings = [p for name, p in named if "embed" in name]
        others = [p for name, p in named if name not in matrices and "embed" not in name]
        groups = [{"params": qkv, "row_splits": splits}, {"params": rest}]
        optimizers = [
            Muon(groups, config.learning_rate, config.muon_momentum, config.weight_decay, config.muon_ns_steps),
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
            group["lr"] = scale * group["peak_lr"]

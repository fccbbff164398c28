"""Optimizers that gpt.training does not have: torch's own, and two of the tests'."""

import torch
from torch import optim

from gpt.distributed import local


class Lion(optim.Optimizer):
    """Chen et al. 2023, with a state under a name of its own, one number per row, and a count that is a Python int."""

    def __init__(self, params, lr=1e-2, count=True):
        super().__init__(params, {"lr": lr, "count": count})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"] = p.grad.detach().clone()  # what the first gradient was: no zeros to begin with
                    state["rows"] = torch.ones(len(p), dtype=torch.float64)
                    if group["count"]:
                        state["steps"] = 0
                if group["count"]:
                    state["steps"] += 1
                p.sub_(group["lr"] * (0.9 * state["mean"] + 0.1 * p.grad).sign())
                state["mean"].lerp_(p.grad, 0.1)
                state["rows"] += p.grad.double().flatten(1).abs().sum(1) if p.ndim > 1 else p.grad.double().abs()


class LocalMomentum(optim.Optimizer):
    """Momentum that each rank keeps for its own rows in plain tensors, and the mean size of each row's gradients."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                weight, grad, state = local(p), local(p.grad), self.state[p]
                if not state:
                    state["momentum"], state["rows"] = torch.zeros_like(weight), torch.zeros(len(weight))
                state["momentum"].lerp_(grad, 0.1)
                state["rows"].lerp_(grad.abs().flatten(1).mean(1) if grad.ndim > 1 else grad.abs(), 0.1)
                rows = state["rows"].view(-1, *[1] * (grad.ndim - 1))
                weight.sub_(group["lr"] * state["momentum"] / (rows + 1e-3))


class Counting(optim.Optimizer):
    """SGD whose rate falls with states that the group has: a count made by the first step, and a tensor (Prodigy's
    way). With `quiet`, it keeps nothing for a weight."""

    def __init__(self, params, lr=1e-1, quiet=True):
        super().__init__(params, {"lr": lr, "quiet": quiet, "largest": torch.zeros(()), "k": 3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["k"] += 0.5 * (group["steps"] > 2)
            for p in group["params"]:
                group["largest"].copy_(torch.maximum(group["largest"], local(p.grad).abs().max()))
                rate = group["lr"] / (group["steps"] * group["k"] * group["largest"])
                if not group["quiet"]:
                    self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                p.sub_(rate * (p.grad if group["quiet"] else self.state[p]["sum"]))


MAKERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, weight_decay=0.01),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam-amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw-fused-amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "adam-with-a-tensor-as-rate": lambda p: optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "lion": lambda p: Lion(p),
    "lion-without-count": lambda p: Lion(p, count=False),
    "local-momentum": lambda p: LocalMomentum(p),
    "group-counts": lambda p: Counting(p),
    "group-counts-and-sums": lambda p: Counting(p, quiet=False),
}


def use_optimizer(monkeypatch, name: str) -> None:
    """Let train.py train with this one."""
    monkeypatch.setattr(
        "gpt.training.start.build_optimizers", lambda model, *_: [MAKERS[name](list(model.parameters()))]
    )

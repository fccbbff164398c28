"""Build the optimizers, with parameter groups by the weights' roles."""

from collections import defaultdict

import torch
from torch import nn

from gpt.distributed import World
from gpt.model.roles import HIDDEN, RESIDUAL_OUT, TABLES, VECTOR, Weight, weights_of
from gpt.training.config import OptimConfig
from gpt.training.muon import Muon


def leave_compiler_out() -> None:
    """Keep torch.optim from importing torch's compiler, which takes a second, only to exclude its methods from it.

    torch looks for the excluded function under this attribute before it imports. Compiled models are not affected: our
    optimizers' steps are never compiled.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        function = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if function is not None and not hasattr(function, "__dynamo_disable"):
            function.__dynamo_disable = function


def build_optimizers(model: nn.Module, config: OptimConfig, world: World | None = None) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a GPT. Each group keeps its peak learning rate as "peak_lr" for set_learning_rate.

    adamw: matrices and embeddings have weight decay, vectors (norms and biases) none, as in GPT-2 and nanoGPT. With
    base_width the matrices whose fan-in grows with the width have their rate multiplied by base_width / n_embd and
    their decay divided by it, so that rate * decay is unchanged (muP's rule for Adam: Yang et al. 2022, table 3). muon:
    Muon for the matrices of the blocks; Adam without decay for the embeddings at one rate, and for head, gates and
    vectors at another.
    """
    leave_compiler_out()
    weights = [weight for weight in weights_of(model) if weight.parameter.requires_grad]
    # Only the fused Adam takes found_inf.
    adam = {"betas": (config.beta1, config.beta2), "eps": 1e-8, "fused": True}
    if config.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(_adamw_groups(model, config, weights), lr=config.learning_rate, **adam)]
    else:
        stacks: dict[tuple[int, ...] | None, list[nn.Parameter]] = defaultdict(list)  # by row_splits
        for weight in weights:
            if weight.role in (HIDDEN, RESIDUAL_OUT):
                stacks[weight.row_splits].append(weight.parameter)
        tables = [weight.parameter for weight in weights if weight.role in TABLES]
        others = [weight.parameter for weight in weights if weight.role not in (HIDDEN, RESIDUAL_OUT, *TABLES)]
        groups = [{"params": params, "row_splits": splits} for splits, params in stacks.items()]
        optimizers = [
            Muon(groups, config.learning_rate, config.muon_momentum, config.weight_decay, config.muon_ns_steps, world),
            torch.optim.AdamW(
                [{"params": tables, "lr": config.embedding_lr}, {"params": others, "lr": config.head_lr}],
                weight_decay=0.0,
                **adam,
            ),
        ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _adamw_groups(model: nn.Module, config: OptimConfig, weights: list[Weight]) -> list[dict]:
    """Group the weights: with decay; vectors, without; and with base_width the matrices that grow with it."""
    share = 1.0 if config.base_width is None else config.base_width / model.config.n_embd
    grown = [w.parameter for w in weights if share != 1.0 and w.role not in (VECTOR, *TABLES)]
    rest = [w.parameter for w in weights if w.role != VECTOR and (share == 1.0 or w.role in TABLES)]
    vectors = [w.parameter for w in weights if w.role == VECTOR]
    groups = [{"params": rest, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if grown:
        scaled = {"lr": config.learning_rate * share, "weight_decay": config.weight_decay / share}
        groups.append({"params": grown, **scaled})
    return groups

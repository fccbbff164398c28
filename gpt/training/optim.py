"""How the weights move: AdamW, Muon, their parameter groups, clipping, the schedule, and the weights' average."""

import torch
from torch import nn

from gpt.distributed import World
from gpt.training.config import OptimConfig
from gpt.training.muon import Muon


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

"""A model's modules, made ready to run on a few tokens: the same forward, other linear layers."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt.model import GPT, CausalSelfAttention
from gpt.model.positions import rotated

Linear = Callable[[nn.Linear], Callable]


def prepared(module: nn.Module, linear: Linear, dtype: torch.dtype) -> nn.Module:
    """A twin of a module that shares its tensors, with linear(layer) in the place of each linear layer.

    dtype: that of the matrices, in which queries and keys are normalised. Norms become plain functions, and what a twin
    holds are attributes of Python's own, which are found faster than a module's. It is for inference: it has no
    parameters and no dropout.
    """
    twin = copy.copy(module)
    twin.__class__ = _direct(type(module))
    twin.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}, "training": False}
    tensors = {**module._parameters, **module._buffers}
    twin.__dict__ |= {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    for name, part in module._modules.items():
        twin.__dict__[name] = _part(part, linear, dtype)
    if getattr(type(module), "turn", None) is CausalSelfAttention.turn:
        twin.turn = _turn_together(module, dtype)
    return twin


@functools.cache
def _direct(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of module whose call is its forward: no hooks are looked for."""
    return type(kind.__name__, (kind,), {"__call__": kind.forward})


def _turn_together(attn: CausalSelfAttention, dtype: torch.dtype) -> Callable:
    """CausalSelfAttention.turn with queries and keys as one tensor, which takes half as many calls."""
    (n_head, n_kv_head, _), shape, weight = attn.heads, (attn.head_dim,), None
    if attn.q_norm is not None:
        weights = attn.q_norm.weight.expand(n_head, -1), attn.k_norm.weight.expand(n_kv_head, -1)
        weight, eps = torch.cat(weights).detach().to(dtype), attn.q_norm.eps  # (H + H_kv, D)

    def turn(qkv: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = qkv.split_with_sizes((n_head + n_kv_head, n_kv_head), -2)  # split is a function in Python
        if weight is not None:
            qk = torch.rms_norm(qk, shape, None, eps).mul_(weight)
        if rotary is not None:
            qk = rotated(qk, *rotary)
        return *qk.split_with_sizes((n_head, n_kv_head), -2), v

    return turn


def _part(part: nn.Module | None, linear: Linear, dtype: torch.dtype) -> object:
    if part is None or isinstance(part, nn.Identity):
        return part
    if isinstance(part, nn.ModuleList):
        return [_part(each, linear, dtype) for each in part]
    if isinstance(part, nn.Linear):
        return linear(part)
    if isinstance(part, nn.RMSNorm | nn.LayerNorm):
        return _norm(part)
    return prepared(part, linear, dtype)


def _norm(norm: nn.RMSNorm | nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """The norm as a function: less is called than through a module."""
    shape, eps, weight = norm.normalized_shape, norm.eps, norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.detach()
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x: torch.rms_norm(x, shape, weight, eps)


def lengthen_tables(model: GPT, rows: int, dtype: torch.dtype) -> None:
    """Give the position tables of a twin at least so many rows, repeating the last; rotary ones in `dtype`."""

    def longer(table: Tensor) -> Tensor:
        missing = max(0, rows - len(table))
        return torch.cat((table, table[-1:].expand(missing, -1))) if missing else table

    if model.config.position == "learned":
        model.position_embed.__dict__["weight"] = longer(model.position_embed.weight)
    elif model.config.position == "sinusoidal":
        model.__dict__["position_table"] = longer(model.position_table)
    elif model.config.position == "rotary":
        model.__dict__ |= {"cos": longer(model.cos).to(dtype), "sin": longer(model.sin).to(dtype)}

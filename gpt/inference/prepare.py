"""Twins of a model's modules for decoding: the same forward, with other linear layers and less overhead in Python."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt.model import GPT, Block, CausalSelfAttention
from gpt.model.positions import rotated

Linear = Callable[[nn.Linear], Callable]


def prepared(module: nn.Module, linear: Linear, dtype: torch.dtype) -> nn.Module:
    """Make a twin of a module that shares its tensors and has linear(layer) in place of each linear layer.

    dtype: of the matrices; queries and keys are normalised in it. A twin is for inference: it has no parameters, no
    dropout and no hooks. Its parts are plain attributes, which Python finds faster than a module's.
    """
    twin = copy.copy(module)
    twin.__class__ = _direct(type(module))
    twin.__dict__ |= {"_modules": {}, "_parameters": {}, "_buffers": {}, "training": False}
    tensors = {**module._parameters, **module._buffers}
    twin.__dict__ |= {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    twin.__dict__ |= {name: _part(part, linear, dtype) for name, part in module._modules.items()}
    if getattr(type(module), "turn", None) is CausalSelfAttention.turn:
        twin.turn = _turn_together(module, dtype)
    return twin


@functools.cache
def _direct(kind: type[nn.Module]) -> type[nn.Module]:
    """Subclass a kind of module so that a call is its forward, or for a block its body: nothing looks for hooks."""
    call = kind.body if kind.forward is Block.forward else kind.forward
    return type(kind.__name__, (kind,), {"__call__": call})


def _turn_together(attn: CausalSelfAttention, dtype: torch.dtype) -> Callable:
    """Make a CausalSelfAttention.turn that takes queries and keys as one tensor, for half as many calls."""
    heads, shape, weight = attn.heads, (attn.head_dim,), None
    n_head, n_kv_head, _ = heads
    qk_and_v, q_and_k = (n_head + n_kv_head, n_kv_head), (n_head, n_kv_head)
    if attn.q_norm is not None:
        weights = attn.q_norm.weight.expand(n_head, -1), attn.k_norm.weight.expand(n_kv_head, -1)
        weight, eps = torch.cat(weights).detach().to(dtype), attn.q_norm.eps  # (H + H_kv, D)

    def turn(qkv: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        if weight is None and rotary is None:
            return qkv.split_with_sizes(heads, -2)
        qk, v = qkv.split_with_sizes(qk_and_v, -2)
        if weight is not None:
            qk = torch.rms_norm(qk, shape, None, eps).mul_(weight)
        if rotary is not None:
            qk = rotated(qk, *rotary)
        return *qk.split_with_sizes(q_and_k, -2), v

    return turn


def _part(part: nn.Module | None, linear: Linear, dtype: torch.dtype) -> object:
    """Prepare a part of a module."""
    if isinstance(part, nn.Identity | nn.Dropout):
        return lambda x: x
    if isinstance(part, nn.ModuleList):
        return [_part(each, linear, dtype) for each in part]
    if isinstance(part, nn.Linear):
        return linear(part)
    if isinstance(part, nn.RMSNorm | nn.LayerNorm):
        return _norm(part)
    return None if part is None else prepared(part, linear, dtype)


def _norm(norm: nn.RMSNorm | nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """Make a function of a norm: it costs fewer calls than the module."""
    shape, eps, weight = norm.normalized_shape, norm.eps, norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.detach()
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    return lambda x: torch.rms_norm(x, shape, weight, eps)


def lengthen_tables(model: GPT, rows: int, dtype: torch.dtype) -> None:
    """Extend a twin's position tables to at least `rows` rows by repeating the last; rotary ones become `dtype`."""

    def longer(table: Tensor) -> Tensor:
        missing = max(0, rows - len(table))
        return torch.cat((table, table[-1:].expand(missing, -1))) if missing else table

    if model.config.position == "learned":
        model.position_embed.__dict__["weight"] = longer(model.position_embed.weight)
    elif model.config.position == "sinusoidal":
        model.__dict__["position_table"] = longer(model.position_table)
    elif model.config.position == "rotary":
        model.__dict__ |= {"cos": longer(model.cos).to(dtype), "sin": longer(model.sin).to(dtype)}

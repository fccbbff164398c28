"""Skip steps of any torch optimizer, and save and restore its states.

Which states an optimizer keeps, with which shapes and sharding, is read from the optimizer itself.
"""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gpt.distributed import like, local
from gpt.errors import UserError

Optimizers = list[torch.optim.Optimizer]


def take_step(optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
    """Take an optimizer step that changes neither weights nor states if found_inf () is 1.

    An optimizer that supports found_inf gets it. For any other, weights and states are copied before the step and
    restored on the device, without waiting for it. Only a step that changes anything but tensors, or creates a state as
    the first one does, waits for found_inf.
    """
    options = _options(optimizer)
    if skips_by_itself(optimizer):
        optimizer.found_inf = found_inf
        optimizer.step()
    else:
        before = _Copy(optimizer)
        optimizer.step()
        before.put_back(optimizer, found_inf)
    changed = {name for name, value in _options(optimizer).items() if name not in options or value != options[name]}
    optimizer.counters = _counters(optimizer) | changed


def _options(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """Return the groups' options by group and name, without tensors and the learning rates that the schedule sets."""
    return {
        (n, key): copy.copy(value)
        for n, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key not in ("params", "param_names", "lr", "peak_lr") and not torch.is_tensor(value)
    }


def _counters(optimizer: torch.optim.Optimizer) -> set[tuple[int, str]]:
    """Return group and name of each option that steps change, such as a step count: a state, not a setting."""
    tensors = {
        (n, key)
        for n, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if torch.is_tensor(value) and key not in ("lr", "peak_lr", *inspect.signature(type(optimizer)).parameters)
    }
    return getattr(optimizer, "counters", set()) | tensors


def skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimizer supports found_inf: torch's fused Adam and AdamW, and classes with this attribute.

    Not torch's fused SGD: a skipped first step leaves its momentum uninitialised.
    """
    fused_adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and optimizer.defaults["fused"]
    return bool(fused_adam) or hasattr(type(optimizer), "found_inf")


class _Copy:
    """A copy of an optimizer's weights, states and group options."""

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer):
        kept = lambda value: local(value.detach()).clone() if torch.is_tensor(value) else copy.deepcopy(value)
        self.weights = {p: kept(p) for group in optimizer.param_groups for p in group["params"]}
        self.states = {p: {key: kept(value) for key, value in s.items()} for p, s in optimizer.state.items()}
        self.groups = [{k: kept(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer, found_inf: Tensor) -> None:
        """Restore everything if found_inf is 1, and delete states that did not exist."""
        if self._only_tensors_moved(optimizer):
            for now, then in self._pairs(optimizer):
                now.copy_(torch.where(found_inf > 0, then, now))
        elif found_inf.item():
            for now, then in self._pairs(optimizer):
                now.copy_(then)
            for p in [p for p in optimizer.state if p not in self.states]:
                del optimizer.state[p]
            for now, before in self._tables(optimizer):
                for key in now.keys() - before.keys() - {"params"}:
                    del now[key]
                both = {key for key, value in before.items() if torch.is_tensor(value) and torch.is_tensor(now[key])}
                now.update({key: value for key, value in before.items() if key not in both})

    def _tables(self, optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Pair the optimizer's states and group options with their copies."""
        states = [(optimizer.state[p], before) for p, before in self.states.items()]
        return [*states, *zip(optimizer.param_groups, self.groups, strict=True)]

    def _pairs(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the optimizer's tensors that existed before, each with its earlier values."""
        for p, then in self.weights.items():
            yield local(p.detach()), then
        for now, before in self._tables(optimizer):
            for key, then in before.items():
                if torch.is_tensor(now[key]) and torch.is_tensor(then):
                    yield local(now[key]), then

    def _only_tensors_moved(self, optimizer: torch.optim.Optimizer) -> bool:
        """Tell whether nothing but the values of existing tensors changed."""
        same_weights = optimizer.state.keys() == self.states.keys()
        return same_weights and all(_fixed(now) == _fixed(before) for now, before in self._tables(optimizer))


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a step may only change by waiting: shapes and dtypes of tensors, types and values of the rest."""
    return {
        key: (local(value).shape, value.dtype) if torch.is_tensor(value) else (type(value), value)
        for key, value in values.items()
        if key != "params"
    }


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return all optimizer states as tensors, named WEIGHT.STATE; a number becomes a tensor ().

    A state of a whole group is named groups.N.STATE, where N counts the groups of all optimizers.
    Raises UserError for a state that is neither a tensor nor a number.
    """
    tensors = {
        f"groups.{n}.{key}": _as_tensor(optimizer.param_groups[own][key], None, optimizer, key)
        for n, (optimizer, own) in enumerate(_groups(optimizers))
        for key in sorted(key for number, key in _counters(optimizer) if number == own)
    }
    for optimizer in optimizers:
        for name, (p, state, key) in _states(model, optimizer).items():
            tensors[name] = _as_tensor(state[key], p, optimizer, key)
    return tensors


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, dict[str, Any], str]]:
    """Name the states of weights; each as its weight, and the dict and key that hold it."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": (p, state, key)
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def _groups(optimizers: Optimizers) -> list[tuple[torch.optim.Optimizer, int]]:
    """List all groups in order, as their optimizer and their index in it."""
    return [(optimizer, n) for optimizer in optimizers for n in range(len(optimizer.param_groups))]


def _as_tensor(value: Any, p: Tensor | None, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not torch.is_tensor(value):
        raise UserError(
            f"the optimizer {type(optimizer).__name__} keeps {key!r} as a {type(value).__name__}: a checkpoint can "
            "only hold tensors and numbers"
        )
    if p is None or not _has_rows_of(value, p):
        return value
    from torch.distributed.tensor import DTensor

    shape = torch.Size((p.shape[0], *value.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, p.device_mesh, p.placements, shape=shape, stride=stride)


def _has_rows_of(value: Tensor, p: Tensor) -> bool:
    """Tell whether a plain tensor belongs to this rank's rows of a sharded weight."""
    plain = hasattr(p, "full_tensor") and not hasattr(value, "full_tensor")
    rows = local(p).shape[0] if p.ndim else 0
    return plain and value.ndim > 0 and value.shape[0] == rows and (rows != p.shape[0])


@torch.no_grad()
def begin_states(optimizer: torch.optim.Optimizer) -> None:
    """Create the states that the first step would create, without changing the weights.

    Calls the optimizer's own make_states if it has one; any other optimizer takes a step on zero gradients.
    """
    if hasattr(optimizer, "make_states"):
        optimizer.make_states()
        return
    before, grads = _Copy(optimizer), {p: p.grad for group in optimizer.param_groups for p in group["params"]}
    for p in grads:
        p.grad = torch.zeros_like(p)
    with torch.enable_grad():
        optimizer.step()
    for p, grad in grads.items():
        p.grad = grad
    for now, then in before._pairs(optimizer):
        now.copy_(then)
    for group, options in zip(optimizer.param_groups, before.groups, strict=True):
        group.update({key: value for key, value in options.items() if not torch.is_tensor(value)})


def restore_optimizers(model: nn.Module, optimizers: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Restore the result of optimizer_tensors. All ranks must call it together.

    Raises UserError if it does not fit these optimizers and this model.
    """
    wanted: dict[str, tuple[Tensor, dict[str, Any], str]] = {}
    for optimizer in optimizers:
        before = [set(group) for group in optimizer.param_groups]
        if any(p not in optimizer.state for group in optimizer.param_groups for p in group["params"]):
            begin_states(optimizer)
        if (own := _states(model, optimizer)).keys() & tensors.keys():
            wanted |= own
            continue
        optimizer.state.clear()  # the saved optimizer had taken no step, or keeps no states
        for group, keys in zip(optimizer.param_groups, before, strict=True):
            for key in group.keys() - keys:
                del group[key]
    groups = {str(n): group for n, group in enumerate(_groups(optimizers))}
    counters = {name for name in tensors if name.startswith("groups.") and name.split(".")[1] in groups}
    for key in sorted((tensors.keys() - counters) ^ wanted.keys()):
        who = "this run's" if key in wanted else "the checkpoint's"
        raise UserError(f"only {who} optimizer keeps {key!r}: resume with the same --optimizer and model")
    for name, (p, state, key) in wanted.items():
        _put(tensors[name], p, state, key, name)
    for name in sorted(counters):
        _, n, key = name.split(".", 2)
        _put_counter(tensors[name], *groups[n], key, name)


@torch.no_grad()
def _put_counter(saved: Tensor, optimizer: torch.optim.Optimizer, n: int, key: str, name: str) -> None:
    """Restore a state of a group."""
    group = optimizer.param_groups[n]
    now = group.get(key)
    if saved.shape != (now.shape if torch.is_tensor(now) else ()):
        raise UserError(f"the checkpoint's optimizer state {name!r} does not fit: resume with the same --optimizer")
    if torch.is_tensor(now):
        now.copy_(saved)
    else:
        group[key] = saved.item()
    optimizer.counters = _counters(optimizer) | {(n, key)}


@torch.no_grad()
def _put(saved: Tensor, p: Tensor, state: dict[str, Any], key: str, name: str) -> None:
    """Restore a state of a weight."""
    now = state[key]
    is_tensor = torch.is_tensor(now)
    is_rows = is_tensor and _has_rows_of(now, p)
    shape = (p.shape[0], *now.shape[1:]) if is_rows else now.shape if is_tensor else ()
    is_float = now.is_floating_point() if is_tensor else isinstance(now, float)
    if saved.shape != shape or saved.is_floating_point() != is_float:
        raise UserError(f"the checkpoint's optimizer state {name!r} does not fit its weight of {tuple(p.shape)}")
    if is_tensor:
        local(now).copy_(local(like(saved, p if is_rows else now)))
    else:
        state[key] = type(now)(saved.item())

"""Checks of a public function's arguments, each with an error message that names the argument."""

import numbers

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_tensors(**tensors: object) -> None:
    """Raise TypeError unless each is a dense tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, not {kind(x)}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not {'nested' if x.is_nested else x.layout}")


def check_real(**tensors: Tensor) -> None:
    """Raise TypeError unless each has a supported floating-point dtype."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, not {x.dtype}")


def check_number(name: str, value: object, least: float, most: float, rule: str) -> None:
    """Raise TypeError unless value is a number, ValueError unless it is from least to most; rule says this in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be {rule}, not {kind(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {rule}, not {_shown(value)}")


def check_integer(
    name: str, value: object, least: int = -(2**63), most: int = 2**63 - 1, rule: str = "an int of 64 bits"
) -> None:
    """Raise TypeError unless value is an int, ValueError unless it is from least to most; rule says this in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} must be an int, not {kind(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {rule}, not {_shown(value)}")


def check_switch(name: str, value: object) -> None:
    """Raise TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {kind(value)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        shown = f"{value!r:.80}" if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ValueError(f"unknown {name} {shown}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def as_floats(*values: object) -> tuple[float | None, ...]:
    """Convert real numbers of any type to floats in float32's range, as operators and kernels take them."""
    return tuple(x if x is None or isinstance(x, torch.SymFloat) else in_float32(torch.sym_float(x)) for x in values)


def in_float32(x: float) -> float:
    """Clamp x to float32's range, with 0 for numbers below its smallest normal number."""
    return 0.0 if abs(x) < SMALLEST else max(-LARGEST, min(x, LARGEST))


def _shown(value: object) -> str:
    """Format a number for a message, but not a huge integer."""
    return "a longer integer" if isinstance(value, int) and value.bit_length() > 128 else str(value)


def kind(value: object) -> str:
    """Describe a value of the wrong type for a message."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{name} {value!r:.40}" if isinstance(value, bool | str | complex) else name


def autocasts(device_type: str) -> bool:
    """Say whether autocast is on for a type of device; some, such as meta, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

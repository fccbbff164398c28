"""Checks of a public function's arguments by type: one sentence that names the argument, and no other error."""

import numbers

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_tensors(**tensors: object) -> None:
    """Raise TypeError unless each is a dense tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a tensor, not {kind(x)}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{name} is a dense tensor, not {'nested' if x.is_nested else f'one of layout {x.layout}'}")


def check_real(**tensors: Tensor) -> None:
    """Raise TypeError unless each has a dtype that sums are defined for here."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is float64, float32, float16 or bfloat16, not {x.dtype}")


def check_number(name: str, value: object, least: float, most: float, rule: str) -> None:
    """Raise TypeError unless value is a number, and ValueError unless it lies in least to most; rule: in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} is {rule}, not {kind(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {rule}, not {_shown(value)}")


def check_integer(
    name: str, value: object, least: int = -(2**63), most: int = 2**63 - 1, rule: str = "an int of 64 bits"
) -> None:
    """Raise TypeError unless value is an int, and ValueError unless it lies in least to most; rule: in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} is an int, not {kind(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {rule}, not {_shown(value)}")


def check_switch(name: str, value: object) -> None:
    """Raise TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {kind(value)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        shown = f"{value!r:.80}" if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ValueError(f"{name} {shown} is not one of {', '.join(choices)}")


def as_floats(*values: object) -> tuple[float | None, ...]:
    """The same numbers as operators and kernels take them: a float for any kind of real number."""
    return tuple(x if x is None or isinstance(x, torch.SymFloat) else in_float32(torch.sym_float(x)) for x in values)


def in_float32(x: float) -> float:
    """x where float32 can be asked for it: 0 if it is smaller than its normal numbers, else within its range."""
    return 0.0 if abs(x) < SMALLEST else max(-LARGEST, min(x, LARGEST))


def _shown(value: object) -> str:
    return "a longer integer" if isinstance(value, int) and value.bit_length() > 128 else str(value)


def kind(value: object) -> str:
    """What a message calls a value of the wrong type."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{name} {value!r:.40}" if isinstance(value, bool | str | complex) else name


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for the device; some, such as meta, have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

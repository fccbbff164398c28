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
            raise TypeError(f"{name} is a tensor, not {_kind(x)}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{name} is a dense tensor, not one of layout {x.layout}")


def check_real(**tensors: Tensor) -> None:
    """Raise TypeError unless each has a dtype that sums are defined for here."""
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is float64, float32, float16 or bfloat16, not {x.dtype}")


def check_number(name: str, value: object, least: float, most: float, rule: str) -> None:
    """Raise TypeError unless value is a number, and ValueError unless it lies in least to most; rule: in words."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} is {rule}, not {_kind(value)}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {rule}, not {_shown(value)}")


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless value is an int, and ValueError unless int64 holds it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} is an int, not {_kind(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is an int of 64 bits, not {_shown(value)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        shown = f"{value!r:.80}" if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ValueError(f"{name} {shown} is not one of {', '.join(choices)}")


def _shown(value: object) -> str:
    return "a longer integer" if isinstance(value, int) and value.bit_length() > 128 else str(value)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{kind} {value!r:.40}" if isinstance(value, bool | str | complex) else kind

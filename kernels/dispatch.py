"""Whether the Triton kernels can take a call, and the log line that says which path "auto" chose."""

import contextlib
import logging

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    why_no_triton = None
except ImportError as error:  # macOS and Windows have no triton
    triton = tl = None
    why_no_triton = f"triton does not import here: {error}"

# Whether the kernels run in numpy. Triton decides this when a kernel is defined.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret

log = logging.getLogger("kernels")
_announced: set[tuple[str, str, str | None]] = set()


def why_not_triton(x: Tensor, *head_dims: int) -> str | None:
    """Return why the kernels cannot take x and these head dims; None if they can."""
    if why_no_triton is not None:
        return why_no_triton
    if not runs_on(x.device):
        hint = "" if x.is_cuda else ": to run the kernels there, set TRITON_INTERPRET=1 before triton is imported"
        return f"{x.device} is not a GPU from sm_80 up{hint}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {x.dtype}"
    for D in head_dims:
        if not 8 <= D <= 256:
            return f"the kernels take head dims from 8 to 256, not head_dim {D}"
    return None


def runs_on(device: torch.device) -> bool:
    """Say whether the kernels run on this device: a GPU from sm_80 (or CDNA 3) up, or the interpreter for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8
    return device.type == "cpu" and INTERPRETED


def require_able(impl: str, why_not: str | None) -> None:
    """Raise NotImplementedError with the reason, if there is one, why an explicit `impl` cannot do a call."""
    if why_not is not None:
        raise NotImplementedError(f'impl="{impl}" cannot do this call: {why_not}')


def announce(function: str, choice: str, reason: str | None) -> None:
    """Log what "auto" chose, once for each function, choice and reason."""
    if torch.compiler.is_compiling() or (function, choice, reason) in _announced:
        return
    _announced.add((function, choice, reason))
    log.info("%s runs on %s%s", function, choice, f": {reason}" if reason else "")


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

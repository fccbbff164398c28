"""The Triton path: where it runs, and its operators."""

import contextlib

import torch
import triton
from torch import Tensor

from kernels.attention_backward import backward
from kernels.attention_forward import forward
from kernels.operators import Call, call_of, define
from kernels.problem import Problem

# Whether the kernels run in numpy. The choice fell when they were defined.
INTERPRETED = triton.knobs.runtime.interpret


def why_not_triton(q: Tensor, v: Tensor) -> str | None:
    """Why our kernels cannot do this call; None if they can."""
    if not runs_on(q.device):
        return f"{q.device} is not a GPU from sm_80 up"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {q.dtype}"
    for D in (q.shape[3], v.shape[3]):
        if not 8 <= D <= 256:
            return f"head_dim {D} is not supported: 8 to 256 are"
    return None


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: a GPU from sm_80 (or CDNA 3) up, or the interpreter for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8
    return device.type == "cpu" and INTERPRETED


def attention_triton(q: Tensor, k: Tensor, v: Tensor, **features) -> tuple[Tensor, Tensor]:
    """out (B, Tq, H, Dv) and lse (B, H, Tq): see `kernels.attention`."""
    return _forward(*call_of(q, k, v, **features))


def on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _run_forward(call: Call):
    with on_device_of(call.q):
        return forward(Problem(call))


def _run_backward(call: Call, *args):
    with on_device_of(call.q):
        return backward(Problem(call), *args)


_forward = define("triton_attention", _run_forward, _run_backward)

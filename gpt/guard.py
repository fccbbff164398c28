"""Steps that must not be taken: decided on the device, before the update, without waiting for it; and fp16's scale.

found_inf, 1.0 or 0.0 in a tensor, is how torch's fused optimizers are told: with 1.0 a step changes nothing, neither
weights nor moments nor step counts. gpt.optim.Muon and Average honour it likewise.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.distributed import World, local


@dataclass(frozen=True)
class Reading:
    """What a Guard saw: the last step's loss and gradient norm, and the steps that were skipped."""

    loss: float
    grad_norm: float
    skipped: int
    """since the last reading"""
    in_a_row: int
    """skipped steps up to and with the last one"""
    stopping: bool
    """some rank was asked to stop"""

    @property
    def fault(self) -> str:
        """What was wrong with the last step, which was skipped."""
        return f"gradient's norm is {self.grad_norm}" if math.isfinite(self.loss) else f"loss is {self.loss}"

    def record(self) -> dict[str, float]:
        """What metrics.jsonl says of it: finite numbers, and skipped steps where there were any."""
        numbers = {"train_loss": self.loss, "grad_norm": self.grad_norm}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        return finite | ({"skipped_steps": self.skipped} if self.skipped else {})


class Guard:
    """Skips a step whose loss or gradient norm is not finite, and counts such steps on the device.

    Both must be the same on all ranks, so that all decide alike.
    """

    def __init__(self, device: torch.device):
        self._seen: tuple[Tensor, ...] = tuple(torch.full((3,), math.nan, device=device))
        self._skipped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)

    def update(self, loss: Tensor, grad_norm: Tensor, stopping: Tensor | None = None) -> Tensor:
        """found_inf () of a step with this loss and gradient norm. stopping: above 0 where a rank was asked to stop."""
        self._seen = loss, grad_norm, torch.zeros_like(loss) if stopping is None else stopping
        found_inf = (loss + grad_norm).isfinite().logical_not_().float()
        self._skipped += found_inf
        self._in_a_row = (self._in_a_row + 1) * found_inf
        return found_inf

    def read(self) -> Reading:
        """What was seen since the last reading. Waits for the device, once."""
        values = torch.stack((*self._seen, self._skipped, self._in_a_row)).tolist()
        self._skipped.zero_()
        loss, grad_norm, stopping, skipped, in_a_row = values
        return Reading(loss, grad_norm, int(skipped), int(in_a_row), stopping > 0)


def all_finite(weights: list[Tensor], world: World) -> bool:
    """Whether every weight of every rank is finite. Waits for the device."""
    finite = torch.stack([local(w.detach()).isfinite().all() for w in weights]).all()
    return world.sum(float(finite)) == [world.size]


class LossScale:
    """float16's loss scale, on the device: halved by a step that overflows, doubled after 2,000 that do not in a row.

    (Micikevicius et al. 2018.) Off, it is 1 and stays so.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled
        self.scale = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self._good = torch.zeros((), device=device)  # steps since it last changed

    def update(self, found_inf: Tensor) -> None:
        """Move the scale by what the step found."""
        if not self.enabled:
            return
        self._good = (self._good + 1) * (1 - found_inf)
        grow = (self._good >= self.GROWTH_INTERVAL).float()
        self.scale = self.scale * (1 + grow) * (1 - 0.5 * found_inf)
        self._good = self._good * (1 - grow)

    def state_dict(self) -> dict[str, float]:
        """Empty where it is off. Waits for the device."""
        return {"scale": self.scale.item(), "_growth_tracker": int(self._good.item())} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what state_dict gave; a run that was not in float16 gave nothing."""
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self._good.fill_(state["_growth_tracker"])

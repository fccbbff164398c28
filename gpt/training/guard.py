"""Steps that must not be taken: decided on the device, before the update, without waiting for it; and fp16's scale.

found_inf, 1.0 or 0.0 in a tensor, is how torch's fused optimizers are told: with 1.0 a step changes nothing, neither
weights nor moments nor step counts. Muon and Average honour it likewise, and optimizer_state.take_step
makes any other optimizer do so.
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
    spike: bool = False
    """the last step was skipped though its numbers were finite"""
    spikes_skipped: bool = False
    """such steps are skipped at all"""

    @property
    def fault(self) -> str:
        """What was wrong with the last step, which was skipped."""
        if self.spike:
            return f"loss is {self.loss:.4f}, far above the last ones,"
        return f"gradient's norm is {self.grad_norm}" if math.isfinite(self.loss) else f"loss is {self.loss}"

    def said(self, step: int) -> str | None:
        """A line about the steps that were skipped, if any were."""
        if not self.skipped:
            return None
        why = "loss or gradient was not finite" + ", or the loss far above those before" * self.spikes_skipped
        return f"step {step}: skipped {self.skipped} of the last steps: {why}"

    def record(self, skipped: int) -> dict[str, float]:
        """What metrics.jsonl says of it: finite numbers, and steps skipped since its last line, if any."""
        numbers = {"train_loss": self.loss, "grad_norm": self.grad_norm}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        return finite | ({"skipped_steps": skipped} if skipped else {})


class Guard:
    """Skips a step whose loss or gradient norm is not finite, and counts such steps on the device.

    With a spike_threshold also one whose loss x is finite and far above those of the last steps that were taken: by
    (log x - median) / s > spike_threshold, where median and s = 1.4826 * MAD are of the logarithms of the last WINDOW
    such losses (MAD, the median distance from the median: Iglewicz & Hoaglin 1993) and s is at least FLOOR. Skipped
    losses stay out of the window; until it holds NEEDED, nothing is a spike.
    Loss and norm must be the same on all ranks, so that all decide alike.
    """

    WINDOW, NEEDED, FLOOR = 64, 16, 0.01

    def __init__(self, device: torch.device, spike_threshold: float = 0.0):
        self.spike_threshold = spike_threshold
        self._losses = torch.full((self.WINDOW,), math.inf, device=device)  # logarithms, the newest last; inf: none yet
        self._spike = torch.zeros((), device=device)
        self._seen: tuple[Tensor, ...] = tuple(torch.full((3,), math.nan, device=device))
        self._skipped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)

    def update(self, loss: Tensor, grad_norm: Tensor, stopping: Tensor | None = None) -> Tensor:
        """found_inf () of a step with this loss and gradient norm. stopping: above 0 where a rank was asked to stop."""
        self._seen = loss, grad_norm, torch.zeros_like(loss) if stopping is None else stopping
        found_inf = (loss + grad_norm).isfinite().logical_not_().float()
        if self.spike_threshold:
            found_inf = self._with_spikes(found_inf, loss)
        self._skipped += found_inf
        self._in_a_row = (self._in_a_row + 1) * found_inf
        return found_inf

    def _with_spikes(self, found_inf: Tensor, loss: Tensor) -> Tensor:
        """found_inf, or 1 where the loss is a spike; any other loss joins the window."""
        x, known = loss.clamp(min=1e-30).log(), self._losses.isfinite()
        count = known.sum()
        middle = ((count - 1).clamp(min=0) // 2).view(1)
        median = self._losses.sort().values.gather(0, middle)
        away = torch.where(known, (self._losses - median).abs(), math.inf)
        deviation = 1.4826 * away.sort().values.gather(0, middle)
        spike = (x - median > self.spike_threshold * deviation.clamp(min=self.FLOOR)) & (count >= self.NEEDED)
        self._spike = spike.squeeze(0).float() * (1 - found_inf)
        found_inf = torch.maximum(found_inf, self._spike)
        self._losses = torch.where(found_inf > 0, self._losses, torch.cat((self._losses[1:], x.view(1))))
        return found_inf

    def state_dict(self) -> dict[str, Any]:
        """What decides over the next steps. Waits for the device."""
        return {"in_a_row": int(self._in_a_row), "losses": self._losses[self._losses.isfinite()].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what state_dict gave, or begin anew with nothing."""
        losses = state.get("losses", [])[-self.WINDOW :]
        self._losses.fill_(math.inf)
        self._losses[self.WINDOW - len(losses) :] = torch.tensor(losses, device=self._losses.device)
        self._in_a_row.fill_(state.get("in_a_row", 0))
        self._skipped.zero_()

    def read(self) -> Reading:
        """What was seen since the last reading. Waits for the device, once."""
        values = torch.stack((*self._seen, self._skipped, self._in_a_row, self._spike)).tolist()
        self._skipped.zero_()
        loss, grad_norm, stopping, skipped, in_a_row, spike = values
        return Reading(loss, grad_norm, int(skipped), int(in_a_row), stopping > 0, spike > 0, self.spike_threshold > 0)


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

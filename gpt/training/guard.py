"""Skip bad steps without waiting for the device, and scale the loss for float16.

found_inf is a tensor on the device: if it is 1.0, a step of torch's fused optimizers changes neither weights nor
moments nor step counts. Muon and Average honour it, too, and optimizer_state.take_step makes any other optimizer do so.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.distributed import World, local


@dataclass(frozen=True)
class Reading:
    """A Guard's values: loss and gradient norm of the last step, and the skipped steps."""

    loss: float
    grad_norm: float
    skipped: int
    """since the last reading"""
    in_a_row: int
    """skipped steps in a row, the last step included"""
    stopping: bool
    """a rank was told to stop"""
    spike: bool = False
    """the last step was skipped for its loss, although loss and norm were finite"""
    spikes_skipped: bool = False
    """spikes are skipped"""

    @property
    def fault(self) -> str:
        """What was wrong with the last step, which was skipped."""
        if self.spike:
            return f"loss is {self.loss:.4f}, far above the recent ones,"
        return f"gradient's norm is {self.grad_norm}" if math.isfinite(self.loss) else f"loss is {self.loss}"

    def note(self, step: int) -> str | None:
        """Describe the skipped steps in one line; None if no step was skipped."""
        if not self.skipped:
            return None
        why = "loss or gradient was not finite" + ", or the loss far above the recent ones" * self.spikes_skipped
        return f"step {step}: skipped {self.skipped} of the last steps: {why}"

    def record(self, skipped: int) -> dict[str, float]:
        """Return the values for metrics.jsonl: finite numbers, and the steps skipped since its last line, if any."""
        numbers = {"train_loss": self.loss, "grad_norm": self.grad_norm}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        return finite | ({"skipped_steps": skipped} if skipped else {})


class Guard:
    """Decides on the device to skip a step whose loss or gradient norm is not finite, and counts skipped steps.

    With a spike_threshold it also skips a finite loss x with (log x - median) / s > spike_threshold. The median and s =
    1.4826 * MAD are those of the logarithms of the last WINDOW losses that were not skipped (MAD, the median absolute
    deviation: Iglewicz & Hoaglin 1993); s is at least FLOOR. With fewer than NEEDED losses nothing is a spike. Loss and
    norm must be equal on all ranks, so that all decide alike.
    """

    WINDOW, NEEDED, FLOOR = 64, 16, 0.01

    def __init__(self, device: torch.device, spike_threshold: float = 0.0):
        self.spike_threshold = spike_threshold
        self._losses = torch.full((self.WINDOW,), math.inf, device=device)  # logarithms, newest last; inf: unused
        self._spike = torch.zeros((), device=device)
        self._seen: tuple[Tensor, ...] = tuple(torch.full((3,), math.nan, device=device))
        self._skipped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)

    def update(self, loss: Tensor, grad_norm: Tensor, stopping: Tensor | None = None) -> Tensor:
        """Return found_inf () for this loss and gradient norm. stopping: above 0 if a rank was told to stop."""
        self._seen = loss, grad_norm, torch.zeros_like(loss) if stopping is None else stopping
        found_inf = (loss + grad_norm).isfinite().logical_not_().float()
        if self.spike_threshold:
            found_inf = self._with_spikes(found_inf, loss)
        self._skipped += found_inf
        self._in_a_row = (self._in_a_row + 1) * found_inf
        return found_inf

    def _with_spikes(self, found_inf: Tensor, loss: Tensor) -> Tensor:
        """Return found_inf, or 1 for a spike; a normal loss joins the window."""
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
        """Return the state that decides about later steps. Waits for the device."""
        return {"in_a_row": int(self._in_a_row), "losses": self._losses[self._losses.isfinite()].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict; an empty one starts afresh."""
        losses = state.get("losses", [])[-self.WINDOW :]
        self._losses.fill_(math.inf)
        self._losses[self.WINDOW - len(losses) :] = torch.tensor(losses, device=self._losses.device)
        self._in_a_row.fill_(state.get("in_a_row", 0))
        self._skipped.zero_()

    def read(self) -> Reading:
        """Return the values since the last reading. Waits for the device once."""
        values = torch.stack((*self._seen, self._skipped, self._in_a_row, self._spike)).tolist()
        self._skipped.zero_()
        loss, grad_norm, stopping, skipped, in_a_row, spike = values
        return Reading(loss, grad_norm, int(skipped), int(in_a_row), stopping > 0, spike > 0, self.spike_threshold > 0)


def all_finite(weights: list[Tensor], world: World) -> bool:
    """Tell whether all weights of all ranks are finite. Waits for the device."""
    finite = torch.stack([local(w.detach()).isfinite().all() for w in weights]).all()
    return world.sum(float(finite)) == [world.size]


class LossScale:
    """float16's loss scale, on the device: halved after an overflow, doubled after 2,000 steps in a row without one.

    (Micikevicius et al. 2018.) Always 1 unless enabled.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, *, enabled: bool):
        self.enabled = enabled
        self.scale = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self._good = torch.zeros((), device=device)  # steps since the last change

    def update(self, found_inf: Tensor) -> None:
        """Adjust the scale after a step."""
        if not self.enabled:
            return
        self._good = (self._good + 1) * (1 - found_inf)
        grow = (self._good >= self.GROWTH_INTERVAL).float()
        self.scale = self.scale * (1 + grow) * (1 - 0.5 * found_inf)
        self._good = self._good * (1 - grow)

    def state_dict(self) -> dict[str, float]:
        """Return the state, empty unless enabled. Waits for the device."""
        return {"scale": self.scale.item(), "_growth_tracker": int(self._good.item())} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict; that of a run without float16 is empty."""
        if self.enabled and state:
            self.scale.fill_(state["scale"])
            self._good.fill_(state["_growth_tracker"])

"""Effects that the cases of train.py's options look at, and patches that some cases need."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gpt.training.guard
from gpt.model import GPT
from tests.tokenizer_checks import make_named
from tests.train_observer import OTHER, Observed

EMBED, HEAD, MLP = "embed.weight", "head.weight", "blocks.0.mlp.c_fc.weight"


def near(*values: float) -> Any:
    return pytest.approx(list(values), rel=1e-3)


# Patches.


def small_encodings(patch: pytest.MonkeyPatch) -> None:
    encoding = make_named()
    patch.setattr("tiktoken.get_encoding", lambda name: encoding)


def matrix_units(there: bool) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr("gpt.device.multiplies_bfloat16", lambda device: there)


def losses(change: Callable[[int, torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace the n-th training loss by change(n, loss)."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        true_loss, seen = GPT.loss, []

        def loss(self, *args: Any, **options: Any) -> torch.Tensor:
            value = true_loss(self, *args, **options)
            seen.append(self.training)
            return change(sum(seen), value) if self.training else value

        patch.setattr(GPT, "loss", loss)
        patch.setattr(gpt.training.guard.Guard, "NEEDED", 2)

    return apply


NAN_FROM_3 = losses(lambda n, loss: loss * math.nan if n >= 3 else loss)
SPIKE_AT_4 = losses(lambda n, loss: loss * 100 if n == 4 else loss)


def after_90_seconds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("gpt.stop.process_seconds", lambda: 90.0)


# Effects.


def decayed(name: str) -> Callable[[Observed], float]:
    """Measure how much a weight without gradient shrinks in the first step (any but the head, which is 0)."""
    return lambda seen: (1 - seen.weights[1][name] / seen.weights[0][name]).median().item()


def moment(kind: str, at: str = HEAD) -> Callable[[Observed], float]:
    """Measure the norm of a moment after the first step."""
    return lambda seen: seen.states[1][f"{at}.{kind}"].norm().item()


def clipped(seen: Observed) -> float:
    """Compute the norm of the first step's gradients from the moments."""
    moments = [state for name, state in seen.states[1].items() if name.endswith("exp_avg")]
    return torch.cat([m.flatten() for m in moments]).norm().item() / (1 - 0.9)


def roundness(seen: Observed) -> float:
    """Divide the smallest by the largest singular value of a matrix's first move."""
    values = torch.linalg.svdvals(seen.weights[1][MLP] - seen.weights[0][MLP])
    return (values[-1] / values[0]).item()


def average_of(seen: Observed) -> bool | None:
    """Whether the last checkpoint's average has the decay 0.5; None without an average."""
    path = seen.run_dir / "checkpoints/step_00000003/average.safetensors"
    if not path.exists():
        return None
    expected = seen.weights[0][EMBED]
    for weights in seen.weights[1:]:
        expected = (expected + weights[EMBED]) / 2
    return (load_file(path)[EMBED] - expected).abs().max().item() < 1e-6


def mixed(seen: Observed) -> int:
    """Count the training rows from other.txt."""
    return sum(set(text) <= set(OTHER) for text in seen.text)


def weighted(seen: Observed) -> bool:
    """Whether the validation loss weighs two corpora by 3 and 1."""
    losses = [seen.metrics[-1].get(key, math.nan) for key in ("val_loss", "val_loss_1", "val_loss_2")]
    return losses[0] == pytest.approx((3 * losses[1] + losses[2]) / 4)


def rates(seen: Observed) -> tuple[list[float], list[float]]:
    """Return the logged learning rates, and those of the optimizer."""
    return seen.column("learning_rate"), [groups[0]["lr"] for groups in seen.groups]


def rated(*shares: float, peak: float = 1e-3) -> Callable[..., bool]:
    expected = [peak * share for share in shares]
    return lambda base, look, value: look == (near(*expected), near(*expected))


def sides(seen: Observed) -> list[int]:
    return [seen.corpus[f"{side}_tokens"] for side in ("train", "val")]


def whose(path: str) -> Callable[[Observed], list[str]]:
    """List the folders of the files with this in their path."""
    return lambda seen: sorted({file.split(path)[0] for file in seen.files if path in file})


def outcome(seen: Observed) -> str | list[int]:
    """Return the steps taken, or the error."""
    return seen.error[:40] or seen.steps("train_loss")

"""The progress of a run."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Steps, tokens and evaluations so far, as kept in checkpoints."""

    step: int = 0
    tokens: int = 0
    best: dict[str, Any] | None = None
    """step and val_loss of the lowest validation loss so far"""
    evaluations_since_best: int = 0
    skipped: int = 0
    """skipped steps since the last line of metrics.jsonl"""
    evaluation_due: bool = False
    """this step is not evaluated yet"""

    def load(self, state: dict[str, Any], tokens_per_step: int) -> None:
        """Load a state.json. tokens_per_step: for old checkpoints without `tokens`."""
        self.step, self.best = state["step"], state.get("best")
        self.tokens = state.get("tokens", self.step * tokens_per_step)
        self.evaluations_since_best = state.get("evaluations_since_best", 0)
        self.skipped = state.get("skipped", 0)
        self.evaluation_due = state.get("evaluation_due", False)

    def evaluated(self, val_loss: float) -> bool:
        """Record the validation loss of this step; tell whether it is the lowest so far."""
        self.evaluation_due = False
        if val_loss < (self.best["val_loss"] if self.best else math.inf):
            self.best, self.evaluations_since_best = {"step": self.step, "val_loss": val_loss}, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def is_best(self) -> bool:
        """Whether this step is evaluated and has the lowest validation loss so far."""
        return not self.evaluation_due and (self.best or {}).get("step") == self.step

    def without_progress(self, patience: int) -> bool:
        """Tell whether the last `patience` evaluations gave no lower validation loss; never with a patience of 0."""
        return 0 < patience <= self.evaluations_since_best

    def patience_note(self) -> str:
        """Report the evaluations without a lower validation loss."""
        best = f"{self.best['val_loss']:.4f} of step {self.best['step']}" if self.best else "infinity"
        return f"step {self.step}: {self.evaluations_since_best} evaluations gave no lower validation loss than {best}"

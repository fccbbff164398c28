"""How far a run has come."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """What a checkpoint keeps of a run beside its tensors and its place in the data."""

    step: int = 0
    tokens: int = 0
    best: dict[str, Any] | None = None
    """step and val_loss of the lowest validation loss so far"""
    evaluations_since_best: int = 0
    skipped: int = 0
    """steps that were skipped and are in no line of metrics.jsonl yet"""
    evaluation_due: bool = False
    """the evaluation of this step is still to be made"""

    def load(self, state: dict[str, Any], tokens_per_step: int) -> None:
        """Take what a state.json holds; tokens_per_step: for one that does not tell its tokens."""
        self.step, self.best = state["step"], state.get("best")
        self.tokens = state.get("tokens", self.step * tokens_per_step)
        self.evaluations_since_best = state.get("evaluations_since_best", 0)
        self.skipped = state.get("skipped", 0)
        self.evaluation_due = state.get("evaluation_due", False)

    def evaluated(self, val_loss: float) -> bool:
        """Note the validation loss of this step, which is then no longer due; whether it is the lowest so far."""
        self.evaluation_due = False
        if val_loss < (self.best["val_loss"] if self.best else math.inf):
            self.best, self.evaluations_since_best = {"step": self.step, "val_loss": val_loss}, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def is_best(self) -> bool:
        """Whether this step's evaluation was made and gave the lowest validation loss so far."""
        return not self.evaluation_due and (self.best or {}).get("step") == self.step

    def without_progress(self, patience: int) -> bool:
        """Whether the last `patience` evaluations gave no lower validation loss; never with a patience of 0."""
        return 0 < patience <= self.evaluations_since_best

    def said(self) -> str:
        """How long there was no progress, in words."""
        best = f"{self.best['val_loss']:.4f} of step {self.best['step']}" if self.best else "infinity"
        return f"step {self.step}: {self.evaluations_since_best} evaluations gave no lower validation loss than {best}"

"""Which checkpoint is the best on validation, and when training has stopped getting better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class BestCheckpoint:
    """Follows the precision@1 on validation. `step` and `precision`: of the best weights so far, the earliest of equal
    ones; `evaluations`: since then."""

    keep: Literal["last", "best"] = "last"
    patience: int = 0
    step: int = 0
    precision: float = -1.0
    evaluations: int = 0

    def update(self, step: int, precision: float) -> None:
        """Tell the precision after `step` updates."""
        if precision > self.precision:
            self.step, self.precision, self.evaluations = step, precision, 0
        else:
            self.evaluations += 1

    def is_worth_saving(self, step: int) -> bool:
        """Whether the weights after `step` updates are the best, and those count in the end."""
        return self.keep == "best" and self.step == step

    @property
    def stops(self) -> bool:
        """Whether the last `patience` evaluations were not better."""
        return 0 < self.patience <= self.evaluations

    def sentence(self, *, is_last: bool) -> str:
        """For the log at the end of the training; empty where there is nothing to say."""
        parts = [] if is_last else [f"stopped: {self.patience} evaluations were not better on validation"]
        if self.keep == "best":
            parts.append(f"the weights after {self.step} steps count, the best on validation ({self.precision:.3f})")
        return "; ".join(parts)

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint; None where the last weights count and patience has no end, and before any evaluation."""
        if not self.step or (self.keep == "last" and not self.patience):
            return None
        return {"keep": self.keep, "step": self.step, "precision": self.precision, "evaluations": self.evaluations}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from the state of a checkpoint."""
        if state is not None:
            self.step, self.precision, self.evaluations = state["step"], state["precision"], state["evaluations"]

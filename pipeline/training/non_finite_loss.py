"""Stops a training whose loss becomes NaN or infinite, before it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from convline.errors import ConvlineError
from pipeline.training.distributed import RankGroup

ADVICE = "the last checkpoint is good. Lower optimizer.learning_rate (--set optimizer.learning_rate=…) and train again"


class NonFiniteLossGuard:
    """Zeroes the gradients of steps whose loss is not finite, and remembers the first such step."""

    def __init__(self, device: torch.device, ranks: RankGroup = RankGroup()) -> None:  # noqa: B008  # it is immutable
        self._ranks = ranks
        self._is_simple = device.type == "cpu" and ranks.size == 1
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def mask(self, step: int | Tensor, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Zero the gradients if `loss` is not finite on any rank; does not wait for an accelerator. `step` may be a
        tensor, int64 [], on its device."""
        if self._is_simple and math.isfinite(loss.item()):
            return
        finite = ~self._ranks.any(~loss.detach().isfinite())
        keeps = finite | (self._first_bad_step >= 0)
        self._first_bad_step.copy_(torch.where(keeps, self._first_bad_step, step))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(torch.where(finite, parameter.grad, 0))

    def check(self) -> None:
        """Wait for the device; raises ConvlineError naming the first step whose loss was not finite."""
        if (step := int(self._first_bad_step)) >= 0:
            raise ConvlineError(f"the loss stopped being finite at step {step}; {ADVICE}")

    def check_weights(self, step: int, weights: Iterable[Tensor]) -> None:
        """Raises ConvlineError where weights after `step` updates are not finite: an update may overflow although the
        loss is finite."""
        if not all(weight.isfinite().all() for weight in weights):
            raise ConvlineError(f"the weights stopped being finite before step {step}; {ADVICE}")

"""A non-finite loss never reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from convline.errors import ConvlineError
from pipeline.training.distributed import World

ADVICE = "the last checkpoint is good. Lower optimizer.learning_rate (--set optimizer.learning_rate=…) and train again"


class FiniteGuard:
    """Remembers the first step whose loss was not finite, and drops the gradients of such steps."""

    def __init__(self, device: torch.device, world: World = World()) -> None:  # noqa: B008  # it is immutable
        self._world = world
        self._is_simple = device.type == "cpu" and world.size == 1
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def mask(self, step: int, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Zero the gradients if `loss` is not finite on any rank; on an accelerator without waiting for it."""
        if self._is_simple and math.isfinite(loss.item()):
            return
        finite = ~self._world.any(~loss.detach().isfinite())
        self._bad_step = torch.where(finite | (self._bad_step >= 0), self._bad_step, step)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(torch.where(finite, parameter.grad, 0))

    def check_weights(self, step: int, weights: Iterable[Tensor]) -> None:
        """Raises ConvlineError where an update overflowed although its loss was finite."""
        if not all(weight.isfinite().all() for weight in weights):
            raise ConvlineError(f"the weights stopped being finite before step {step}; {ADVICE}")

    def check(self) -> None:
        """Wait for the device; raises ConvlineError naming the first bad step."""
        if (step := int(self._bad_step)) >= 0:
            raise ConvlineError(f"the loss stopped being finite at step {step}; {ADVICE}")

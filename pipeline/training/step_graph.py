"""A training step as a CUDA graph, which launches all of its kernels at once: launched one by one, those of a small
network take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from convline.console import log

if TYPE_CHECKING:
    from pipeline.training.training_state import Batch, StepResult, TrainingState


class StepGraph:
    """The forward and backward pass and the update of one step, recorded once, then replayed with other batches.

    Dropout masks and the like follow the generator's seed, which torch hands to the graph at each replay.
    """

    def __init__(self, training: TrainingState, batch: Batch, step: int) -> None:
        """Record a step without computing it. Raises RuntimeError where the step waits for the GPU."""
        self._training = training
        self._batch = type(batch).of([tensor.clone() for tensor in batch.tensors()])
        self._step = torch.tensor(step, device=training.device)
        groups = training.optimizer.param_groups
        self._rates = [torch.tensor(float(group["lr"]), device=training.device) for group in groups]
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # the graph has memory of its own
        # thread_local: other threads, such as the one that reads batches, may go on as they like
        recording = torch.cuda.graph(self._graph, capture_error_mode="thread_local")
        with _recordable(training.optimizer, self._rates), recording:
            result = training.compute_gradients(self._batch, self._step)
            self._result = replace(result, gradient_norm=training.update())
        self._gradients = [parameter.grad for parameter in training.parameters]

    @classmethod
    def record(cls, training: TrainingState, batch: Batch, step: int) -> StepGraph | None:
        """The graph of `training`'s steps; None, with a line in the log, where they cannot be recorded."""
        try:
            return cls(training, batch, step)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            log(f"each kernel is launched on its own, as the steps of this network cannot be recorded: {reason}")
            return None

    def replay(self, batch: Batch, step: int) -> StepResult:
        """Compute `step`; the tensors of the result are overwritten by the next replay."""
        for recorded, value in zip(self._batch.tensors(), batch.tensors(), strict=True):
            recorded.copy_(value)
        self._step.fill_(step)
        for rate, group in zip(self._rates, self._training.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()
        for parameter, gradient in zip(self._training.parameters, self._gradients, strict=True):
            parameter.grad = gradient  # a step outside the graph leaves others
        return self._result


@contextmanager
def _recordable(optimizer: Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """In the block the optimiser takes its learning rates from tensors, which a graph can read again at each replay."""
    before = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
    try:
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            group.update(settings)

"""Optimisers and learning-rate schedules, as recipes name them.

A new one is a section here and a member of its union.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.training.recipe_section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


class Sgd(Section):
    """weight -= learning_rate * gradient, with momentum where asked for."""

    name: Literal["sgd"]
    learning_rate: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        from torch.optim import SGD

        return _fused(SGD, parameters, lr=self.learning_rate, momentum=self.momentum, nesterov=self.nesterov)


class Adam(Section):
    """Kingma and Ba, 2015 (arXiv:1412.6980)."""

    name: Literal["adam"]
    learning_rate: PositiveFloat
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: PositiveFloat = 1e-8

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        from torch.optim import Adam as TorchAdam

        betas = (self.beta1, self.beta2)
        return _fused(TorchAdam, parameters, lr=self.learning_rate, betas=betas, eps=self.epsilon)


class AdaGrad(Section):
    """h += gradient²; weight -= learning_rate * gradient / (sqrt(h) + epsilon), ε outside the root.

    "Deep Learning from Scratch" (Saitoh), chapter 6.
    """

    name: Literal["adagrad"]
    learning_rate: PositiveFloat
    epsilon: PositiveFloat = 1e-7

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        from torch.optim import Adagrad

        return _fused(Adagrad, parameters, lr=self.learning_rate, eps=self.epsilon)


OptimizerSection = Annotated[Sgd | Adam | AdaGrad, Field(discriminator="name")]


class Constant(Section):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"

    def factor(self, step: int, steps: int) -> float:  # noqa: ARG002
        """What the learning rate is multiplied with at `step` of `steps`."""
        return 1.0


class Cosine(Section):
    """Half a cosine from 1 to `floor`."""

    name: Literal["cosine"]
    floor: NonNegativeFloat = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` of `steps`."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * step / steps)) / 2


class Exponential(Section):
    """`rate` to the power of step / `every`; with `staircase` of the whole number of them.

    TensorFlow's `tf.train.exponential_decay`.
    """

    name: Literal["exponential"]
    rate: PositiveFloat
    every: PositiveInt
    staircase: bool = True

    def factor(self, step: int, steps: int) -> float:  # noqa: ARG002
        """What the learning rate is multiplied with at `step` of `steps`."""
        return self.rate ** (step // self.every if self.staircase else step / self.every)


class Linear(Section):
    """Up from 0 over `warmup` steps, then down to `floor` at the end, both in straight lines."""

    name: Literal["linear"]
    warmup: NonNegativeInt = 0
    floor: NonNegativeFloat = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with at `step` of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.floor + (1 - self.floor) * (steps - step) / max(1, steps - self.warmup)


ScheduleSection = Annotated[Constant | Cosine | Exponential | Linear, Field(discriminator="name")]


def update(optimizer: Optimizer, learning_rate: float) -> None:
    """One step, without what torch wraps around it: hooks, profiling, and a word with its compiler (see `_fused`)."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def _fused(kind: Callable[..., Optimizer], parameters: Iterable[Tensor], **settings: Any) -> Optimizer:
    """An optimiser that does not import torch's compiler, to ask that it be left alone: 2 s and 160 MB."""
    from torch.optim import Optimizer

    for method in (Optimizer.add_param_group, Optimizer.state_dict, Optimizer.load_state_dict):
        plain = inspect.unwrap(method)
        setattr(plain, "__dynamo_disable", plain)  # what torch._disable_dynamo looks for
    return kind(parameters, fused=True, **settings)

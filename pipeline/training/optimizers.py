"""Optimisers, with the names and options that recipes give them.

To add one, write a section here and add it to `OptimizerSection`. Learning-rate schedules are in schedules.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from pipeline.training.recipe_section import RecipeSection

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

# torch, and what imports it, is imported in `build` alone: a mistake in a recipe is found without waiting for it


class Sgd(RecipeSection):
    """weight -= learning_rate * gradient, optionally with (Nesterov) momentum."""

    name: Literal["sgd"]
    learning_rate: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        from torch.optim import SGD

        from pipeline.training.torch_internals import fused_optimizer

        return fused_optimizer(SGD, parameters, lr=self.learning_rate, momentum=self.momentum, nesterov=self.nesterov)


class Adam(RecipeSection):
    """Kingma and Ba, 2015 (arXiv:1412.6980)."""

    name: Literal["adam"]
    learning_rate: PositiveFloat
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: PositiveFloat = 1e-8

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        from torch.optim import Adam as TorchAdam

        from pipeline.training.torch_internals import fused_optimizer

        betas = (self.beta1, self.beta2)
        return fused_optimizer(TorchAdam, parameters, lr=self.learning_rate, betas=betas, eps=self.epsilon)


class AdaGrad(RecipeSection):
    """h += gradient²; weight -= learning_rate * gradient / (sqrt(h) + epsilon).

    "Deep Learning from Scratch" (Saitoh), chapter 6.
    """

    name: Literal["adagrad"]
    learning_rate: PositiveFloat
    epsilon: PositiveFloat = 1e-7

    def build(self, parameters: Iterable[Tensor]) -> Optimizer:
        from torch.optim import Adagrad

        from pipeline.training.torch_internals import fused_optimizer

        return fused_optimizer(Adagrad, parameters, lr=self.learning_rate, eps=self.epsilon)


OptimizerSection = Annotated[Sgd | Adam | AdaGrad, Field(discriminator="name")]

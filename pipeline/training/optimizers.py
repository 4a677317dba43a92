"""Optimisers, with the names and options that recipes give them.

To add one, write a section here and add it to `OptimizerSection`. Learning-rate schedules are in schedules.py; which
weights decay and learn at which rate is in parameter_groups.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pipeline.training.recipe_section import RecipeSection

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    # parameters, or groups of them with their own settings, as torch.optim takes them
    Parameters = Iterable[Tensor] | list[dict[str, Any]]

# torch, and what imports it, is imported in `build` alone: a mistake in a recipe is found without waiting for it

Momentum = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(RecipeSection):
    """`learning_rate`: of the last layers; the schedule multiplies it. `head_multiplier`: what the head's is multiplied
    by. `bias_multiplier`: what that of biases and of the parameters of norms is multiplied by. `layer_decay`: what each
    layer's is multiplied by for every layer between it and the head (Clark et al., 2020, arXiv:2003.10555)."""

    learning_rate: PositiveFloat
    head_multiplier: PositiveFloat = 1.0
    bias_multiplier: PositiveFloat = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # what BatchNorm normalises, and biases, are left out (see parameter_groups.py)
    weight_decay: NonNegativeFloat = 0.0


class Sgd(_Optimizer):
    """weight -= learning_rate * gradient, optionally with (Nesterov) momentum. `weight_decay` adds weight_decay *
    weight to the gradient; not for biases and norms."""

    name: Literal["sgd"]
    momentum: Momentum = 0.0
    nesterov: bool = False

    def build(self, parameters: Parameters) -> Optimizer:
        from torch.optim import SGD

        from pipeline.training.torch_internals import fused_optimizer

        return fused_optimizer(SGD, parameters, lr=self.learning_rate, momentum=self.momentum, nesterov=self.nesterov)


class Adam(_Optimizer):
    """Kingma and Ba, 2015 (arXiv:1412.6980). `weight_decay` adds weight_decay * weight to the gradient; not for biases
    and norms."""

    name: Literal["adam"]
    beta1: Momentum = 0.9
    beta2: Momentum = 0.999
    epsilon: PositiveFloat = 1e-8

    def build(self, parameters: Parameters) -> Optimizer:
        from torch.optim import Adam as TorchAdam

        from pipeline.training.torch_internals import fused_optimizer

        betas = (self.beta1, self.beta2)
        return fused_optimizer(TorchAdam, parameters, lr=self.learning_rate, betas=betas, eps=self.epsilon)


class AdamW(_Optimizer):
    """Adam with decoupled weight decay, weight -= learning_rate * weight_decay * weight (Loshchilov and Hutter, 2019,
    arXiv:1711.05101); not for biases and norms."""

    name: Literal["adamw"]
    beta1: Momentum = 0.9
    beta2: Momentum = 0.999
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01

    def build(self, parameters: Parameters) -> Optimizer:
        from torch.optim import AdamW as TorchAdamW

        from pipeline.training.torch_internals import fused_optimizer

        betas = (self.beta1, self.beta2)
        return fused_optimizer(
            TorchAdamW, parameters, lr=self.learning_rate, betas=betas, eps=self.epsilon, weight_decay=self.weight_decay
        )


class AdaGrad(_Optimizer):
    """h += gradient²; weight -= learning_rate * gradient / (sqrt(h) + epsilon).

    "Deep Learning from Scratch" (Saitoh), chapter 6.
    """

    name: Literal["adagrad"]
    epsilon: PositiveFloat = 1e-7

    def build(self, parameters: Parameters) -> Optimizer:
        from torch.optim import Adagrad

        from pipeline.training.torch_internals import fused_optimizer

        return fused_optimizer(Adagrad, parameters, lr=self.learning_rate, eps=self.epsilon)


class Muon(_Optimizer):
    """Muon for the convolutions and matrices before the head, SGD with Nesterov momentum for the head, biases and norms
    (see muon.py). `momentum`: of Muon, `sgd_momentum` that of SGD. `iterations`: of the orthogonalisation. `normalize`:
    keep each convolution at the norm √(out channels), for networks in which a norm follows each."""

    name: Literal["muon"]
    momentum: Momentum = 0.95
    sgd_momentum: Momentum = 0.9
    iterations: Annotated[int, Field(ge=1, lt=100)] = 5
    normalize: bool = False

    def build(self, parameters: Parameters) -> Optimizer:
        from pipeline.training.muon import Muon as MuonWithSgd
        from pipeline.training.torch_internals import plain_optimizer

        return plain_optimizer(
            MuonWithSgd,
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            sgd_momentum=self.sgd_momentum,
            iterations=self.iterations,
            normalize=self.normalize,
        )


OptimizerSection = Annotated[Sgd | Adam | AdamW | AdaGrad | Muon, Field(discriminator="name")]

"""Which weights decay, which learn at which rate and which are frozen: groups for the optimiser, and for the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convline.errors import ConvlineError
from pipeline.training.optimizers import OptimizerSection

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

# keys of a group: what the recipe's learning rate is multiplied by for it; whether Muon orthogonalises its updates
RATE, ORTHOGONALIZED = "rate", "orthogonalized"


def parameter_groups(network: nn.Module, head: Sequence[str], optimizer: OptimizerSection) -> list[dict[str, Any]]:
    """The parameters by learning rate and weight decay, as torch's optimisers take them, the lowest rates first.

    Each group has "params", "weight_decay", RATE and ORTHOGONALIZED. Weights decay, but not biases, the parameters of
    norms, and what the network itself exempts (`no_weight_decay` of timm's). `head` names the layers whose rate is
    multiplied by `head_multiplier`, and which Muon leaves to SGD; `layer_decay` counts the layers of timm's
    `group_matcher`.
    Raises ConvlineError where there is a layer_decay and the network does not tell its layers.
    """
    depths = _depths(network) if optimizer.layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    exempt: set[str] = getattr(network, "no_weight_decay", set)()
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        is_head, is_matrix = is_part_of(name, head), parameter.ndim > 1 and not name.endswith(".bias")
        rate = optimizer.layer_decay ** (deepest - depths.get(name, deepest))
        if is_head:
            rate *= optimizer.head_multiplier
        if not is_matrix:
            rate *= optimizer.bias_multiplier
        decay = optimizer.weight_decay if is_matrix and name not in exempt else 0.0
        is_orthogonalized = optimizer.name == "muon" and is_matrix and not is_head
        groups.setdefault((rate, decay, is_orthogonalized), []).append(parameter)
    return [
        {"params": groups[key], RATE: key[0], "weight_decay": key[1], ORTHOGONALIZED: key[2]} for key in sorted(groups)
    ]


def is_part_of(parameter: str, layers: Sequence[str]) -> bool:
    """Whether a parameter, by its name, belongs to one of the `layers`."""
    return any(parameter.startswith(f"{layer}.") for layer in layers)


def _depths(network: nn.Module) -> dict[str, int]:
    """For each parameter the number of its layer, from 0 at the image, by timm's own grouping."""
    group_matcher: Any = getattr(network, "group_matcher", None)
    if group_matcher is None:
        raise ConvlineError(
            "optimizer.layer_decay needs a network that tells its layers, as those of timm do; leave it out, or choose "
            "a network timm/…"
        )
    from timm.models import group_parameters

    depths: dict[str, int] = group_parameters(network, group_matcher(coarse=False), reverse=True)
    return depths


def description(network: nn.Module, head: Sequence[str], recipe: Recipe) -> list[str]:
    """Lines for the log: what is frozen, the learning rates, and what decays."""
    settings, optimizer = recipe.train, recipe.optimizer
    groups = parameter_groups(network, head, optimizer)
    lines = []
    if settings.freeze == "backbone":
        count = sum(p.numel() for name, p in network.named_parameters() if not is_part_of(name, head))
        until = "throughout" if settings.frozen_steps == settings.steps else f"for {settings.frozen_steps:,} steps"
        lines.append(f"frozen {until}: the {count:,} parameters of all layers but {', '.join(head)}")
    if settings.freeze_statistics:
        lines.append("the running statistics of BatchNorm layers are frozen throughout")
    rates = sorted({group[RATE] for group in groups})
    lowest, highest = (optimizer.learning_rate * rate for rate in (rates[0], rates[-1]))
    many = f"from {lowest:.3g} to {highest:.3g}, in {len(rates)} groups of layers"
    lines.append(f"highest learning rate: {highest:.3g}" if len(rates) == 1 else f"highest learning rates: {many}")
    if optimizer.weight_decay:
        decayed = sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"])
        others = sum(p.numel() for p in network.parameters()) - decayed
        lines.append(
            f"weight decay {optimizer.weight_decay:g}: {decayed:,} weights; none for {others:,} biases and parameters "
            "of norms"
        )
    return lines

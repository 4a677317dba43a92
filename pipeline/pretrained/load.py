"""Loads pretrained weights into a new network: every layer must fit, the head is made anew where its classes differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from convline.errors import ConvlineError
from models import TIMM, TORCHVISION, head_layers
from models.served_network import ServedNetwork
from pipeline.pretrained.resolve import resolve_weights
from pipeline.pretrained.timm_conversions import TimmMisfit, converted_by_timm
from pipeline.pretrained.weight_sources import PretrainedWeights
from pipeline.recipe_sections import ModelSection
from pipeline.run import Run

# as torchvision.models.densenet converts its older files, whose names have a dot before the number
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")
# counts batches; older files lack it, and networks that average with a momentum do not use it
OPTIONAL = "num_batches_tracked"
NEW_HEAD_STD = 1e-3


def load_pretrained(
    served: ServedNetwork, model: ModelSection, channels: int, classes: Sequence[str], weights: PretrainedWeights
) -> str:
    """Load `weights` into the network of `model`, for images of so many `channels` and these `classes`. The head is
    made anew, with small weights, unless it was trained for the same classes. Returns what was loaded, for the log.

    Raises ConvlineError, which names the first tensor that does not fit, and then changes nothing.
    """
    network, shape = served.network, (channels, *served.preprocessing.output_size)
    heads = head_layers(model.name, shape, len(classes), **model.options)
    expected = network.state_dict()
    found = _with_the_networks_names(weights.read(), served.network, model, shape, heads, weights)
    in_head = {name for name in expected if name.rpartition(".")[0] in heads}
    body = [name for name in expected if name not in in_head and (name in found or not name.endswith(OPTIONAL))]
    for name in body:
        if name not in found or found[name].shape != expected[name].shape:
            raise _misfit(model, weights, name, found.get(name), expected[name])
    takes_head = weights.source.classes == list(classes) and all(
        name in found and found[name].shape == expected[name].shape for name in in_head
    )
    loaded = [*body, *in_head] if takes_head else body
    with torch.no_grad():
        for name in loaded:
            expected[name].copy_(found[name])
        for name in () if takes_head else in_head:
            _shrink(expected[name])
    return _description(
        network, weights, loaded, sorted(in_head), heads, takes_head, len(found.keys() - expected.keys())
    )


def _shrink(values: Tensor) -> None:
    """Make a new head's weights so small that at first all classes are equally probable, and its biases 0: the networks
    draw them for training from scratch, and their errors would reach into the pretrained layers."""
    if values.ndim > 1:
        values.mul_(NEW_HEAD_STD / values.std().clamp(min=NEW_HEAD_STD))
    else:
        values.zero_()


def load_weights_of_run(served: ServedNetwork, run: Run) -> None:
    """Load the pretrained weights that a run started from, if any, into its new network.

    Raises ConvlineError where they cannot be found any more, or are not the same.
    """
    dataset = run.info["dataset"]
    _, weights = resolve_weights(run.recipe, dataset, run.folder, starts_new=True)
    if weights is None:
        return
    if weights.to_dict() != run.info.get("weights"):
        raise ConvlineError(f"the weights {weights.source.name} are not those any more that {run.folder} started from")
    load_pretrained(served, run.recipe.model, dataset["image"]["channels"], dataset["classes"], weights)


def _with_the_networks_names(
    tensors: dict[str, Tensor],
    network: nn.Module,
    model: ModelSection,
    shape: tuple[int, int, int],
    heads: list[str],
    weights: PretrainedWeights,
) -> dict[str, Tensor]:
    names = list(network.state_dict())
    if weights.source.in_order:
        if len(tensors) != len(names):
            raise ConvlineError(
                f"the weights {weights.source.name} do not fit {model.name}: they have {len(tensors)} tensors, the "
                f"network has {len(names)}; choose weights of this network, or model.weights=none"
            )
        tensors = dict(zip(names, tensors.values(), strict=True))
    if model.name.startswith(TORCHVISION):
        return {OLD_DENSENET.sub(r"\1\2", name): value for name, value in tensors.items()}
    if not model.name.startswith(TIMM):
        return tensors
    try:
        name = model.name.removeprefix(TIMM)
        return converted_by_timm(tensors, name, type(network), shape, heads, weights.source.timm_config)
    except TimmMisfit as error:
        raise _refusal(model, weights, str(error)) from error


def _misfit(
    model: ModelSection, weights: PretrainedWeights, name: str, found: Tensor | None, expected: Tensor
) -> ConvlineError:
    theirs = "is missing in them" if found is None else f"has the shape {list(found.shape)} in them"
    return _refusal(model, weights, f"{name} {theirs} and the shape {list(expected.shape)} in the network")


def _refusal(model: ModelSection, weights: PretrainedWeights, details: str) -> ConvlineError:
    size = weights.source.trained_with.image_size
    trained = f"; they were trained on images of {size[0]}x{size[1]}" if size else ""
    return ConvlineError(
        f"the weights {weights.source.name} do not fit {model.name}: {details}{trained}; choose weights of this "
        "network and prepare images of the size and channels that they were trained with, or set model.weights=none"
    )


def _description(
    network: nn.Module,
    weights: PretrainedWeights,
    loaded: list[str],
    in_head: list[str],
    heads: list[str],
    takes_head: bool,
    unused: int,
) -> str:
    parameters = {name: value.numel() for name, value in network.named_parameters()}

    def count(names: list[str]) -> str:
        return f"{len(names)} tensors with {sum(parameters.get(name, 0) for name in names):,} parameters"

    fate = "taken over" if takes_head else f"made anew ({count(in_head)})"
    head = f", head {', '.join(heads)} {fate}" if heads else ", no head"
    rest = f", {unused} tensors of the file not used" if unused else ""
    file = f"{weights.path.name}, SHA-256 {weights.sha256[:8]}…"
    return f"pretrained weights {weights.source.name} ({file}): {count(loaded)} loaded{head}{rest}"

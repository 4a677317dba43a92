"""Weights that others trained, to begin from."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

from torch import Tensor, nn

from models.zoo import PREFIX
from pipeline.recipe import Model
from serving.console import log
from serving.errors import ConvlineError


def load_pretrained(network: nn.Module, model: Model) -> None:
    """Fill a network of torchvision with the weights that its recipe names, but for the layer that decides
    between the classes; nothing to do for any other. They are fetched once, into torch's own cache.

    Raises ConvlineError where they cannot be fetched, or do not fit.
    """
    name = model.options.get("weights", "none")
    if not model.name.startswith(PREFIX) or name == "none":
        return
    theirs = _fetch(model.name.removeprefix(PREFIX), name)
    mine = network.state_dict()
    differing = sorted(key for key, value in mine.items() if key not in theirs or theirs[key].shape != value.shape)
    layers = {key.rpartition(".")[0] for key in differing}
    if len(layers) > 1:
        raise ConvlineError(
            f"the weights {name} of {model.name} do not fit, different are: {', '.join(sorted(layers))}; "
            "prepare the images in the size they were trained on, or begin with model.weights=none"
        )
    network.load_state_dict({key: theirs[key] for key in mine if key not in differing}, strict=False)
    log(f"beginning from the weights {name} of {model.name}, but for {' '.join(layers) or 'nothing'}")


def _fetch(network: str, name: str) -> dict[str, Tensor]:
    from torchvision import models

    weights: Any = models.get_model_weights(network)
    chosen = weights.DEFAULT if name == "default" else weights[name]
    try:
        # through a network of their own, which knows the names that older files have
        return dict(models.get_model(network, weights=chosen, progress=False).state_dict())
    except (URLError, OSError, RuntimeError) as error:
        raise ConvlineError(
            f"cannot fetch the weights of {network} from {chosen.url}: {error}; try again where there is a network, "
            "or begin with model.weights=none"
        ) from error

"""Weights that others trained, to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from convline.console import log
from convline.errors import ConvlineError
from models import TORCHVISION
from pipeline.recipe import Model


def load_pretrained(network: nn.Module, model: Model) -> None:
    """Fill a network of torchvision with the weights that its recipe names, but for its last layer where the
    classes are others; nothing to do for any other network. They are fetched once, into torch's own cache.

    Raises ConvlineError where they cannot be fetched, or do not fit.
    """
    name = model.options.get("weights", "none")
    if not model.name.startswith(TORCHVISION) or name == "none":
        return
    theirs = _fetch(model.name.removeprefix(TORCHVISION), name)
    mine = network.state_dict()
    last_layer = list(mine)[-1].rpartition(".")[0]
    differing = [key for key, value in mine.items() if key not in theirs or theirs[key].shape != value.shape]
    if beyond := [key for key in differing if key.rpartition(".")[0] != last_layer]:
        raise ConvlineError(
            f"the weights {name} of {model.name} do not fit, different is {beyond[0]}; prepare the images in the size "
            "that they were trained on, or begin with model.weights=none"
        )
    network.load_state_dict({key: theirs[key] for key in mine if key not in differing}, strict=False)


def _fetch(network: str, name: str) -> dict[str, Tensor]:
    from torchvision import models

    weights: Any = models.get_model_weights(network)
    chosen = weights.DEFAULT if name == "default" else weights[name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(chosen.url).path).name
    if not cached.exists():
        log(f"downloading {chosen.url}")
    try:
        # through a network of their own, which knows the names that older files have
        return dict(models.get_model(network, weights=chosen, progress=False).state_dict())
    # what a cut-off download or a damaged file makes urllib, pickle and zipfile raise
    except Exception as error:
        mend = f"delete {cached}" if cached.exists() else "try again where there is a network"
        raise ConvlineError(
            f"cannot load the weights {name} of {network} from {chosen.url} ({type(error).__name__}: {error}); {mend}, "
            "or begin with model.weights=none"
        ) from error

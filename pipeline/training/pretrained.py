"""Pretrained weights: downloads those of a torchvision network and loads them into a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from convline.console import log
from convline.errors import ConvlineError
from models import TORCHVISION
from pipeline.recipe import ModelSection


def load_pretrained(network: nn.Module, model: ModelSection) -> None:
    """Load the pretrained weights that a recipe names into a torchvision network. Its last layer keeps its own weights
    where the classes differ. Other networks have no pretrained weights. torch caches what it has downloaded.

    Raises ConvlineError where the weights cannot be downloaded or do not fit.
    """
    name = model.options.get("weights", "none")
    if not model.name.startswith(TORCHVISION) or name == "none":
        return
    pretrained = _fetch(model.name.removeprefix(TORCHVISION), name)
    initial = network.state_dict()
    last_layer = list(initial)[-1].rpartition(".")[0]
    misfits = [key for key, value in initial.items() if key not in pretrained or pretrained[key].shape != value.shape]
    if wrong := [key for key in misfits if key.rpartition(".")[0] != last_layer]:
        raise ConvlineError(
            f"the weights {name} of {model.name} do not fit the network: {wrong[0]} is missing or has another "
            "shape; prepare the images in the size that the weights were trained on, or start with model.weights=none"
        )
    network.load_state_dict({key: pretrained[key] for key in initial if key not in misfits}, strict=False)


def _fetch(network: str, name: str) -> dict[str, Tensor]:
    from torchvision import models

    weights: Any = models.get_model_weights(network)
    chosen = weights.DEFAULT if name == "default" else weights[name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(chosen.url).path).name
    if not cached.exists():
        log(f"downloading {chosen.url}")
    try:
        # through a network of torchvision, which converts the parameter names of older files
        return dict(models.get_model(network, weights=chosen, progress=False).state_dict())
    # what a cut-off download or a damaged file makes urllib, pickle and zipfile raise
    except Exception as error:
        remedy = f"delete {cached}" if cached.exists() else "try again with a network connection"
        raise ConvlineError(
            f"cannot load the weights {name} of {network} from {chosen.url} ({type(error).__name__}: {error}); "
            f"{remedy}, or start with model.weights=none"
        ) from error

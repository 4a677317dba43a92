"""What `model.weights` of a recipe may say, checked without importing torch or a library of networks.

"none"; "default" or another name that the network's library gives to weights; "hf:ORG/NAME", a repository of the
Hugging Face hub in timm's format; "pip:PACKAGE" (see packages.toml); "run:NAME", a run of one's own; or the
path of a .safetensors or .pth file.
"""

from __future__ import annotations

import re

from models import TIMM, TORCHVISION, weights_of
from pipeline.pretrained.packages import packaged_weights

HUB, PACKAGE, RUN = "hf:", "pip:", "run:"
FILE_ENDINGS = (".safetensors", ".pth", ".pt")


def check_weights(network: str, weights: str) -> None:
    """Raises ValueError for weights that do not exist or are not of this network, as far as their name tells."""
    if weights == "none":
        return
    if weights.startswith(PACKAGE):
        _check_package(network, weights.removeprefix(PACKAGE))
    elif weights.startswith(HUB):
        if not network.startswith(TIMM):
            raise ValueError(f"weights {weights!r}: hf: is for networks of timm, not for {network}")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", weights.removeprefix(HUB)):
            raise ValueError(f"weights {weights!r}: write it as hf:ORG/NAME, such as hf:timm/resnet18.a1_in1k")
    elif weights.startswith(RUN):
        if weights == RUN:
            raise ValueError(f"weights {weights!r}: name the run, as in run:digits")
    elif not weights.endswith(FILE_ENDINGS):
        _check_name(network, weights)


def is_name(weights: str) -> bool:
    """Whether the weights are named as the network's library names them ("default" included)."""
    return weights != "none" and not weights.startswith((HUB, PACKAGE, RUN)) and not weights.endswith(FILE_ENDINGS)


def _check_package(network: str, package: str) -> None:
    known = packaged_weights()
    if package not in known:
        raise ValueError(f"weights 'pip:{package}': the packages with known weights are {', '.join(known)}")
    if network not in known[package].networks:
        raise ValueError(f"weights 'pip:{package}' are for {', '.join(known[package].networks)}, not for {network}")


def _check_name(network: str, weights: str) -> None:
    known = weights_of(network)
    computed = network.startswith(TIMM) and not known  # timm itself has to be asked, when the weights are looked for
    if weights not in (known and ["default", *known]) and not computed:
        names = ["none", *(known and ["default", *known])]
        if network.startswith((TIMM, TORCHVISION)):
            names += [f"{PACKAGE}{each.package}" for each in packaged_weights().values() if network in each.networks]
        if network.startswith(TIMM):
            names.append("hf:ORG/NAME")
        raise ValueError(
            f"{network} has no weights {weights!r}; use one of {', '.join(names)}, run:NAME, or the path of a "
            ".safetensors or .pth file"
        )

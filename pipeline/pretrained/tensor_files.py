"""Reads files of weights without running code that they may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from convline.errors import ConvlineError

# under which training scripts keep the weights beside other values
NESTED_UNDER = ("state_dict", "model")
# what DistributedDataParallel puts before every name
PREFIX = "module."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name, in the order of the file.

    Raises ConvlineError for a file that is missing or damaged, or that holds something else than tensors by name.
    """
    if not path.is_file():
        raise ConvlineError(f"there is no file {path}; set model.weights to the path of a .safetensors or .pth file")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
    # for a damaged file both libraries raise anything
    except Exception as error:
        raise ConvlineError(
            f"{path} is damaged or holds more than tensors ({type(error).__name__}), and code from a file is never "
            "run; delete it if it was downloaded, or choose an intact file of tensors, such as a .safetensors file"
        ) from error
    for key in NESTED_UNDER:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values())):
        raise ConvlineError(
            f"{path} does not hold the weights of a network, which are tensors by name (a state dict, alone or under "
            f"{' or '.join(NESTED_UNDER)}); for a run of your own, set model.weights=run:NAME"
        )
    if all(str(name).startswith(PREFIX) for name in content):
        return {str(name).removeprefix(PREFIX): value for name, value in content.items()}
    return {str(name): value for name, value in content.items()}


def _load_pickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)

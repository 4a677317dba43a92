"""Converts weights with timm's own functions: older names of tensors, position embeddings for other image sizes, the
first convolution for grey images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.timm_networks import create

SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\) from checkpoint, .*?Size\((\[.*?\])\)")
MISSING = re.compile(r'Missing key\(s\) in state_dict: "(\S+?)"')
UNEXPECTED = re.compile(r'Unexpected key\(s\) in state_dict: "(\S+?)"')


class TimmMisfit(Exception):
    """Weights that timm cannot load; the message says why."""


def converted_by_timm(
    tensors: dict[str, Tensor],
    name: str,
    kind: type[nn.Module],
    image_shape: tuple[int, int, int],
    heads: list[str],
    config: Any,
) -> dict[str, Tensor]:
    """The weights with names and shapes of timm's network `name`, of class `kind`, for images of (channels, height,
    width). The head keeps the number of classes that it was trained for. `config` is timm's description of these
    weights, None for weights that timm does not know.

    Raises TimmMisfit for weights that are not of this network.
    """
    import timm
    from timm.models import PretrainedCfg

    if config is not None:
        return _converted(tensors, name, kind, image_shape, config)
    known = timm.get_pretrained_cfg(name) or PretrainedCfg()
    channels = _input_channels(tensors, known) or known.input_size[0]
    known = replace(known, label_offset=None, input_size=(channels, *known.input_size[1:]))
    classes = next((len(tensors[f"{head}.weight"]) for head in heads if f"{head}.weight" in tensors), None)
    if classes is not None:
        return _converted(tensors, name, kind, image_shape, replace(known, num_classes=classes))
    try:  # the head may have an older name
        return _converted(tensors, name, kind, image_shape, known)
    except TimmMisfit as misfit:
        try:  # there may be none
            return _converted(tensors, name, kind, image_shape, replace(known, num_classes=0))
        except TimmMisfit:
            raise misfit from None


def _converted(
    tensors: dict[str, Tensor], name: str, kind: type[nn.Module], image_shape: tuple[int, int, int], config: Any
) -> dict[str, Tensor]:
    config = replace(config, state_dict=dict(tensors), source=None, file=None, custom_load=False)
    try:
        with torch.random.fork_rng(devices=[]), _names_left_out(kind) as left_out:
            network = create(name, image_shape, config.num_classes, pretrained=True, pretrained_cfg=config)
    # what timm's conversions raise for weights of another network
    except Exception as error:
        raise TimmMisfit(_first_misfit(error)) from error
    return {key: value for key, value in network.state_dict().items() if key not in left_out}


def _input_channels(tensors: dict[str, Tensor], config: Any) -> int | None:
    """The channels of the images that the weights were trained on, where the first convolution tells."""
    names = config.first_conv if isinstance(config.first_conv, (list, tuple)) else [config.first_conv]
    weight = tensors.get(f"{names[0]}.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 and weight.shape[1] in (1, 3) else None


@contextmanager
def _names_left_out(kind: type[nn.Module]) -> Iterator[set[str]]:
    """The tensors of networks of this class that `load_state_dict` did not find. timm does not tell: for some networks
    it does not insist on all tensors."""
    left_out: set[str] = set()

    def load_state_dict(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        left_out.update(result.missing_keys)
        return result

    original = kind.load_state_dict
    own = vars(kind).get("load_state_dict")
    kind.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield left_out
    finally:
        if own is None:
            del kind.load_state_dict
        else:
            kind.load_state_dict = own  # type: ignore[method-assign]


def _first_misfit(error: Exception) -> str:
    text = str(error)
    if match := MISSING.search(text):
        return f"{match.group(1)} is missing in them"
    if match := SIZE_MISMATCH.search(text):
        return f"{match.group(1)} has the shape {match.group(2)} in them and the shape {match.group(3)} in the network"
    if match := UNEXPECTED.search(text):
        return f"the network has no {match.group(1)}"
    return f"timm cannot convert them ({type(error).__name__}: {text.strip().partition(chr(10))[0]})"

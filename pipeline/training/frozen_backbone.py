"""Trains the head of a network whose other layers are frozen, on their outputs, computed once for every image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.dataset import Split
from pipeline.device import free_memory
from pipeline.training.distributed import RankGroup

CHUNK = 64  # images whose features are computed together: always the same ones, so that each feature has the same bits


def freeze(network: nn.Module, head: Sequence[str]) -> None:
    """Let only the layers that `head` names learn; all others compute as in inference (dropout, BatchNorm)."""
    network.requires_grad_(False).eval()
    for name in head:
        network.get_submodule(name).requires_grad_(True).train()


def unfreeze(network: nn.Module, *, keep_statistics: bool) -> None:
    """Let all layers learn. With `keep_statistics`, BatchNorm layers go on using their running statistics."""
    network.requires_grad_(True).train()
    if keep_statistics:
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()


def features(
    network: nn.Module, head: Sequence[str], prepare: Callable[[Tensor], Tensor], split: Split, ranks: RankGroup
) -> Tensor | None:
    """What the backbone gives to the head for each image of a split, float32 [images, …], on the network's device.

    `prepare` makes the network's input from stored images. Each rank computes a part. None where the outputs cannot
    be kept: the head is not one layer at the end of the network, or they would fill half of the free memory.
    """
    if len(head) != 1:
        return None
    layer = network.get_submodule(head[0])
    device = next(network.parameters()).device
    seen: list[Tensor] = []  # the inputs of the head

    def compute(start: int) -> Tensor:
        seen.clear()
        logits: Tensor = network(prepare(torch.from_numpy(split.images[split.rows[start : start + CHUNK]]).to(device)))
        split.release_memory()
        return logits

    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        logits = compute(0)
        is_last = len(seen) == 1 and _equal(layer(seen[0]), logits)
        is_small = is_last and seen[0][0].nbytes * len(split) <= free_memory(device) // 2
        if bool(ranks.any(torch.tensor(not is_small))):  # all ranks do the same
            return None
        kept = seen[0].new_zeros((len(split), *seen[0].shape[1:]))
        if ranks.is_main:
            kept[:CHUNK] = seen[0]
        for start in range((ranks.rank or ranks.size) * CHUNK, len(split), ranks.size * CHUNK):
            compute(start)
            kept[start : start + CHUNK] = seen[0]
    return ranks.sum(kept)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))

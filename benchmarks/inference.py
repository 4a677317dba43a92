"""The exported networks in onnxruntime against the same networks in PyTorch, on the same threads.

    python benchmarks/inference.py [RECIPE…] [--batch 64] [--threads 2] [--rounds 9]

Both sides take uint8 images and give probabilities; they alternate, and the medians of all rounds are compared.
Networks with local response normalisation run in PyTorch twice: with torch's own layer, and with convline's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from machine import hardware, versions
from torch import nn

from convline.cpus import usable_cpus
from convline.images import ImageSpec
from models.layers import LocalResponseNorm
from models.served_network import ServedNetwork
from pipeline.exporting.graph import to_onnx
from pipeline.exporting.timing import seconds_per_call
from pipeline.network import build_network
from pipeline.preparing.official_datasets import known_datasets
from pipeline.recipe import load, names
from serving.session import open_session

SECONDS = 0.4  # of each side in a round


def main(
    recipes: Annotated[list[str] | None, typer.Argument(help="Default: all.")] = None,
    batch: int = 64,
    threads: int | None = None,
    rounds: int = 9,
) -> None:
    threads = threads or usable_cpus()
    torch.set_num_threads(threads)
    print(f"{hardware(threads)}; {versions('torch', 'onnxruntime-gpu', 'onnxruntime')}")
    print(f"batch {batch}; images/s, medians of {rounds} rounds")
    print(f"{'recipe':25}{'onnxruntime':>13}{'PyTorch':>10}{'ratio':>7}{'torch LRN':>11}{'ratio':>7}")
    for name in recipes or names():
        sides = contenders(name, batch, threads)
        with torch.inference_mode():
            rates = {side: batch / seconds for side, seconds in seconds_per_call(sides, SECONDS, rounds).items()}
        cells = f"{name:25}{rates['onnxruntime']:13,.0f}"
        for side in list(sides)[1:]:
            width = 10 if side == "PyTorch" else 11
            cells += f"{rates[side]:{width},.0f}{rates['onnxruntime'] / rates[side]:7.2f}"
        print(cells, flush=True)


def contenders(recipe: str, batch: int, threads: int) -> dict[str, Callable[[], object]]:
    """What runs a batch: onnxruntime, PyTorch, and PyTorch with its own LocalResponseNorm where there is one."""
    loaded = load(recipe)
    dataset = known_datasets()[loaded.data.dataset]
    height, width, channels = dataset.image
    spec = ImageSpec(height, width, channels)
    meta = {
        "name": dataset.name,
        "classes": dataset.classes,
        "image": spec.to_dict(),
        "mean": [128.0] * channels,
        "std": [64.0] * channels,
    }
    served = build_network(loaded, meta).eval().requires_grad_(False)
    session, _ = open_session(to_onnx(served, spec).SerializeToString(), "cpu", threads)
    images = np.random.default_rng(0).integers(0, 256, (batch, *dataset.image), np.uint8)
    tensor = torch.from_numpy(images)
    sides: dict[str, Callable[[], object]] = {
        "onnxruntime": lambda: session.run(["probability", "logit"], {"image": images}),
        "PyTorch": lambda: served(tensor),
    }
    if any(isinstance(layer, LocalResponseNorm) for layer in served.modules()):
        idiomatic = with_torch_normalisation(served)
        torch.testing.assert_close(idiomatic(tensor), served(tensor), rtol=1e-4, atol=1e-4)
        sides["torch LRN"] = lambda: idiomatic(tensor)
    return sides


def with_torch_normalisation(served: ServedNetwork) -> ServedNetwork:
    """A copy with `nn.LocalResponseNorm` (whose alpha is divided by the window's size)."""
    served = copy.deepcopy(served)
    for name, layer in served.network.named_children():
        if isinstance(layer, LocalResponseNorm):
            window = int(layer.band.count_nonzero(1).max())
            alpha = float(layer.band.max()) * window
            setattr(served.network, name, nn.LocalResponseNorm(window, alpha, layer.beta, float(layer.bias[0])))
    return served


if __name__ == "__main__":
    typer.run(main)

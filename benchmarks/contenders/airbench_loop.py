"""airbench94 as its author published it: network, data loader, loop and evaluation of the package `airbench`
(`pip install airbench`), on the CPU.

    python airbench_loop.py DATASET EPOCHS SEED THREADS float32|bfloat16

DATASET is a prepared dataset of 32x32 images. The package calls CUDA and computes in float16. Here its calls of CUDA
are answered by the CPU, and it computes in float32, or in bfloat16 by autocast. The last line printed is JSON: the
`seconds` of the training and `right`, the number of test images that are classified correctly, seen as they are and
mirrored (its test-time augmentation of level 1), of `count`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

TTA_LEVEL = 1  # the image and its mirror image, as cifar10-fast


class Clock:
    """What torch.cuda.Event is to the package."""

    def __init__(self, **_: object) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Clock) -> float:
        return 1000 * (other.time - self.time)


def answer_cuda_on_the_cpu() -> None:
    load = torch.load
    replaced: list[tuple[Any, str, Any]] = [
        (torch, "load", lambda path, **_: load(path)),
        (torch.Tensor, "half", torch.Tensor.float),
        (nn.Module, "half", nn.Module.float),
        (nn.Module, "cuda", lambda network: network),
        (torch.cuda, "Event", Clock),
        (torch.cuda, "synchronize", lambda: None),
    ]
    for owner, name, replacement in replaced:
        setattr(owner, name, replacement)


def write_images(dataset: Path) -> None:
    """The images where the package looks for them."""
    Path("cifar10").mkdir()
    classes = json.loads((dataset / "meta.json").read_text())["classes"]
    for split in ("train", "test"):
        arrays = (torch.from_numpy(np.load(dataset / f"{split}.{name}.npy")) for name in ("images", "labels"))
        torch.save(dict(zip(("images", "labels", "classes"), (*arrays, classes), strict=True)), f"cifar10/{split}.pt")


def main(dataset: Path, epochs: float, seed: int, threads: int, precision: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    answer_cuda_on_the_cpu()
    import airbench

    def make_network() -> nn.Module:
        network = airbench.make_net94()
        if precision == "bfloat16":  # not in the statistics of patches, which do not bear it
            network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
        return network

    write_images(dataset)
    start = time.perf_counter()
    network = airbench.train94(epochs=epochs, make_net=make_network, verbose=False)
    seconds = time.perf_counter() - start
    test = airbench.CifarLoader("cifar10", train=False, batch_size=2000)
    accuracy = airbench.evaluate(network, test, tta_level=TTA_LEVEL)
    count = len(test.labels)
    print(json.dumps({"seconds": seconds, "right": round(accuracy * count), "count": count}))


if __name__ == "__main__":
    given = sys.argv
    prepared = Path(given[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(prepared, float(given[2]), int(given[3]), int(given[4]), given[5])

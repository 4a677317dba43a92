"""Trains a few steps as one of several ranks; test_distributed.py compares the results with those of one process.

torchrun --nproc-per-node 2 tests/pipeline/ranks.py DATA_DIR OUTPUT writes an .npz that holds, for each system, the
losses of 15 steps in float64, over all ranks, and the gradients of the first step in float32.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.run import Run
from pipeline.training.distributed import RankGroup, join, rank_process
from pipeline.training.training_state import TrainingState

SYSTEMS = {
    "cifar10, distorted": ("cifar10", "data.dataset=rgb", "train.batch_size=16"),
    "summed loss": ("mlp", "data.dataset=digits", "data.validation=0"),
    "summed loss with dropout": ("deep-mnist", "data.dataset=digits", "data.validation=0", "train.batch_size=16"),
    "independent draws": ("simple-convnet", "data.dataset=rgb", "train.batch_size=16"),
}
FULL = {"cifar10 of 128": ("cifar10", "data.dataset=rgb")}


def compute(data_dir: Path, systems: Mapping[str, tuple[str, ...]], ranks: RankGroup) -> dict[str, np.ndarray]:
    results = {}
    for name, settings in systems.items():
        results[f"{name}/losses"], _ = train(data_dir, settings, ranks, torch.float64, 15)
        _, results[f"{name}/gradients"] = train(data_dir, settings, ranks, torch.float32, 1)
    return results


def train(
    data_dir: Path, settings: tuple[str, ...], ranks: RankGroup, dtype: torch.dtype, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of every step, and the gradients of the last one."""
    recipe = load(settings[0], [*settings[1:], "train.evaluate_every=0"])
    dataset = Dataset.open(data_dir, recipe.data.dataset)
    losses = []
    torch.set_default_dtype(dtype)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(Path(folder) / "run", recipe, dataset)
            network = build_network(recipe, dataset.meta)
            training = TrainingState.create(run, dataset, network, torch.device("cpu"), ranks)
        for step in range(steps):
            images, labels = training.batches.load(step)
            cross_entropy = training.forward(training.prepare(images, step), labels, step)[1]
            penalties = training.backward(cross_entropy)
            losses += ranks.mean([cross_entropy + sum(penalties.values())])
            training.optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    gradients = [parameter.grad.numpy().ravel() for parameter in training.served.network.parameters()]
    return np.array(losses), np.concatenate(gradients)


if __name__ == "__main__":
    with rank_process(), join("cpu") as ranks:
        torch.set_num_threads(1)
        results: dict[str, Any] = compute(Path(sys.argv[1]), FULL if "--full" in sys.argv else SYSTEMS, ranks)
        if ranks.is_main:
            np.savez(sys.argv[2], **results)

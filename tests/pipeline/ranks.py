"""Trains a few steps as one of several ranks; test_distributed.py compares the results with those of one process.

torchrun --nproc-per-node 2 tests/pipeline/ranks.py DATA_DIR OUTPUT writes an .npz that holds, for each system, the
losses of 15 steps in float64, over all ranks, what the network then holds (weights and the statistics of BatchNorm),
and the gradients of the first step in float32.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convline.console import exiting_at_once
from models import head_layers
from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.run import Run
from pipeline.training.distributed import RankGroup, join
from pipeline.training.training_state import TrainingState

# as the recipe photos: 6 steps with a frozen backbone, then all layers, with the frozen statistics of BatchNorm
PHOTOS = ("digits", "data.dataset=rgb", "model.name=timm/test_efficientnet", "model.weights=not-read.safetensors",
    "preprocess.standardize={mean=[0.5,0.5,0.5], std=[0.25,0.25,0.25]}", "train.batch_size=16", "train.freeze=backbone",
    "train.freeze_steps=6", "train.freeze_statistics=true", "train.label_smoothing=0.1", "train.class_weights=balanced",
    "train.clip_norm=0.5", "augment.flip=true", "augment.resized_crop.scale=[0.35,1.0]", "augment.mixup=0.2",
    "augment.cutmix=1.0", "data.sampling=balanced", "optimizer.name=adamw", "optimizer.learning_rate=3e-4",
    "optimizer.head_multiplier=3.0", "optimizer.layer_decay=0.8", "optimizer.weight_decay=0.05",
    "schedule.name=cosine", "schedule.warmup=0.1")  # fmt: skip
# tiny steps: some channels hardly vary, and normalising them amplifies rounding errors a hundredfold from step to step
BATCH_NORM = ("digits", "data.dataset=rgb", "train.batch_size=16", "optimizer.name=sgd", "optimizer.learning_rate=1e-9")
SYSTEMS = {
    "cifar10, distorted": ("cifar10", "data.dataset=rgb", "train.batch_size=16"),
    "summed loss": ("mlp", "data.dataset=digits", "data.validation=0"),
    "summed loss with dropout": ("deep-mnist", "data.dataset=digits", "data.validation=0", "train.batch_size=16"),
    "independent draws": ("simple-convnet", "data.dataset=rgb", "train.batch_size=16"),
    "fine-tuning": PHOTOS,
    "fine-tuning in parts": (*PHOTOS, "train.accumulate=2"),
    "fine-tuning, augmented from the start": (*PHOTOS, "augment.while_frozen=true", "train.loss=sum"),
    "BatchNorm of timm": (*BATCH_NORM, "model.name=timm/test_efficientnet"),
    "BatchNorm of torchvision": (*BATCH_NORM, "model.name=torchvision/resnet18"),
    "BatchNorm, Muon and alternating flips": (
        "cifar10-fast",
        "data.dataset=rgb",
        "model.width=8",
        "train.batch_size=16",
        "train.steps=15",
        "train.precision=float32",
        "optimizer.learning_rate=1e-9",
    ),
}
FULL = {"cifar10 of 128": ("cifar10", "data.dataset=rgb")}


def compute(data_dir: Path, systems: Mapping[str, tuple[str, ...]], ranks: RankGroup) -> dict[str, np.ndarray]:
    results = {}
    for name, settings in systems.items():
        results[f"{name}/losses"], results[f"{name}/state"], _ = train(data_dir, settings, ranks, torch.float64, 15)
        *_, results[f"{name}/gradients"] = train(data_dir, settings, ranks, torch.float32, 1)
    return results


def train(
    data_dir: Path, settings: tuple[str, ...], ranks: RankGroup, dtype: torch.dtype, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of every step, what the network holds after them, and the gradients of the last one."""
    recipe = load(settings[0], [*settings[1:], "train.evaluate_every=0"])
    dataset = Dataset.open(data_dir, recipe.data.dataset)
    image = dataset.meta["image"]
    shape = (image["channels"], *(recipe.preprocess.crop_size or (image["height"], image["width"])))
    head = head_layers(recipe.model.name, shape, len(dataset.classes), **recipe.model.options)
    losses: list[float] = []
    torch.set_default_dtype(dtype)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = Run.create(Path(folder) / "run", recipe, dataset)
            network = build_network(recipe, dataset.meta)
            training = TrainingState.create(run, dataset, network, head, torch.device("cpu"), ranks)
        for step in range(steps):
            if training.phase_begins(step):
                training.begin(step)
            batch = training.load(step)
            training.begin_step(step)
            losses += ranks.mean([training.compute_gradients(batch, step).loss])
            gradients = [p.grad.numpy().ravel() for p in training.parameters if p.grad is not None]
            if step < steps - 1:
                training.update()
    finally:
        torch.set_default_dtype(torch.float32)
    state = [value.double().numpy().ravel() for value in training.served.network.state_dict().values()]
    return np.array(losses), np.concatenate(state), np.concatenate(gradients)


if __name__ == "__main__":
    with exiting_at_once(), join("cpu") as ranks:
        torch.set_num_threads(1)
        results: dict[str, Any] = compute(Path(sys.argv[1]), FULL if "--full" in sys.argv else SYSTEMS, ranks)
        if ranks.is_main:
            np.savez(sys.argv[2], **results)

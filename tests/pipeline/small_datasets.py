"""Small datasets that a network learns in a few steps, written as `pipeline preprocess` writes them; weights for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import models
from convline.images import ImageSpec
from pipeline.dataset import Dataset
from pipeline.preparing.fingerprint import dataset_fingerprint, split_fingerprint

Arrays = tuple[np.ndarray, np.ndarray]
GREY = "preprocess.standardize={mean=[0.5,0.5,0.5], std=[0.25,0.25,0.25]}"


def pictures(counts: Sequence[int], side: int = 32, seed: int = 0) -> Arrays:
    """Noise around a colour of each class, so many images of each, in random order: uint8 [n, side, side, 3], and
    labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    colours = np.random.default_rng(7).integers(40, 216, (len(counts), 3))
    noise = rng.normal(0, 40, (len(labels), side, side, 3))
    return np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8), labels.astype(np.int64)


def write_dataset(data_dir: Path, name: str, splits: Mapping[str, Arrays]) -> Dataset:
    """A prepared dataset with the classes "a", "b", …"""
    folder = data_dir / name
    folder.mkdir(parents=True)
    images = splits["train"][0]
    classes = [chr(ord("a") + label) for label in range(max(labels.max() for _, labels in splits.values()) + 1)]
    image = ImageSpec(images.shape[1], images.shape[2], images.shape[3]).to_dict()
    for split, (pixels, labels) in splits.items():
        np.save(folder / f"{split}.images.npy", pixels)
        np.save(folder / f"{split}.labels.npy", labels)
    fingerprints = {split: split_fingerprint(*arrays) for split, arrays in splits.items()}
    counts = {split: np.bincount(labels, minlength=len(classes)).tolist() for split, (_, labels) in splits.items()}
    meta = {
        "format": 1,
        "name": name,
        "classes": classes,
        "image": image,
        "counts": {split: dict(zip(classes, numbers, strict=True)) for split, numbers in counts.items()},
        "source": {"name": name, "sha256": "0" * 64},
        "rejected": [],
        "mean": images.mean((0, 1, 2), dtype=np.float64).tolist(),
        "std": images.std((0, 1, 2), dtype=np.float64).tolist(),
        "fingerprints": fingerprints,
        "fingerprint": dataset_fingerprint(classes, image, fingerprints),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return Dataset.open(data_dir, name)


def write_weights(path: Path, network: str, classes: int, side: int = 32) -> Path:
    """Weights of `network` as drawn from another seed, with running statistics that are not those of a new network."""
    torch.manual_seed(11)
    made = models.build(network, (3, side, side), classes).train()
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(16, 3, side, side))
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, path)
    return path

"""Fingerprints: SHA-256 of a split's images and labels, and of a whole dataset."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.preparing.mapped_arrays import chunks


def split_fingerprint(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """SHA-256, in hexadecimal, over the shape of the images, their pixels and the labels."""
    digest = hashlib.sha256(f"{images.shape}".encode())
    for chunk in chunks(images):
        digest.update(np.ascontiguousarray(images[chunk]).data)
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def dataset_fingerprint(classes: list[str], image: dict[str, Any], fingerprints: dict[str, str]) -> str:
    """SHA-256, in hexadecimal, over the classes, the image spec and the fingerprints of the splits."""
    return hashlib.sha256(json.dumps([classes, image, fingerprints]).encode()).hexdigest()

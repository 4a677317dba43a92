"""Helpers that tests of the pipeline share: noise images, image folders, archives, folder contents, refusals."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convline.errors import ConvlineError

Size = tuple[int, int]


def png(size: Size = (4, 4), mode: str = "RGB", seed: int = 0) -> bytes:
    """A PNG of noise, (height, width), different for every seed."""
    channels = () if mode == "L" else (3,)
    return encode(np.random.default_rng(seed).integers(0, 256, (*size, *channels), np.uint8))


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def images(counts: Mapping[str, int], size: Size = (4, 4), mode: str = "RGB") -> dict[str, bytes]:
    """PNG files by path: {"train/cat": 2} gives two below train/cat; no two have the same pixels."""
    names = [f"{folder}/{number:03}.png" for folder, count in counts.items() for number in range(count)]
    return {name: png(size, mode, seed) for seed, name in enumerate(names)}


def image_folder(folder: Path, counts: Mapping[str, int], size: Size = (4, 4), mode: str = "RGB") -> Path:
    return write_files(folder, images(counts, size, mode))


def archive(folder: Path, ending: str, top: str = "") -> Path:
    """An archive of `folder`, beside it, as .tar, .tar.gz or .zip; the names of its members begin with `top`."""
    path = folder.with_name(folder.name + ending)
    members = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {member: f"{top}{member.relative_to(folder)}" for member in members}
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for member, name in names.items():
                packed.write(member, name)
    else:
        with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as packed:
            for member, name in names.items():
                packed.add(member, name)
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with its content (None for a folder)."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@contextmanager
def refused(*parts: str, unchanged: Path | None = None) -> Iterator[None]:
    """The block raises ConvlineError with a one-line message that contains all `parts`; the folder `unchanged` stays as
    it was."""
    before = contents(unchanged) if unchanged else None
    with pytest.raises(ConvlineError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert before is None or unchanged is None or contents(unchanged) == before


def dataset_meta(image: tuple[int, int, int], classes: Sequence[str]) -> dict[str, Any]:
    """What a network has to know of a dataset with images of (height, width, channels)."""
    height, width, channels = image
    described = {"height": height, "width": width, "channels": channels}
    statistics = {"mean": [99.0] * channels, "std": [9.0] * channels}
    return {"name": "photographs", "image": described, "classes": list(classes), **statistics}

"""Decoded images become the arrays of the splits in place: no second copy, whatever the order and the rejects."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convline.images import ImageSpec
from pipeline.preparing import split_arrays
from pipeline.preparing.decoded_source import DecodedSource, create_array
from pipeline.preparing.split_arrays import write_splits


def decoded(folder: Path, count: int, channels: int = 3, stored: int = 3) -> tuple[DecodedSource, np.ndarray]:
    """Images of noise on disk, and a copy in memory. Where one channel is stored, all three are equal."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 5, 7, channels), np.uint8)
    pixels[..., 1:] = pixels[..., :1] if stored < channels else pixels[..., 1:]
    images = create_array(folder / "decoded.npy", pixels.shape)
    images[:] = pixels
    spec = ImageSpec(5, 7, stored)
    source = DecodedSource(images, np.zeros(count, np.int64), {}, ["a"], spec, {}, file=folder / "decoded.npy")
    return source, pixels


def random_rows(count: int, seed: int, splits: int, rejects: int) -> dict[str, np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)[: count - rejects]
    parts = np.array_split(order, sorted(np.random.default_rng(seed).integers(1, len(order), splits - 1)))
    names = ("train", "test", "validation")[:splits]
    return {name: np.sort(part) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("chunk", [1, 300, 2**24])
@pytest.mark.parametrize(("channels", "stored"), [(3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize(("splits", "rejects"), [(1, 0), (2, 0), (2, 7), (3, 3)])
def test_each_split_has_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, channels: int, stored: int, splits: int, rejects: int
) -> None:
    monkeypatch.setattr(split_arrays, "CHUNK_BYTES", chunk)
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        source, pixels = decoded(folder, 60 + seed, channels, stored)
        rows = random_rows(60 + seed, seed, splits, rejects)
        arrays = write_splits(folder, source, rows)
        for name, split_rows in rows.items():
            expected = pixels[split_rows][..., :stored]
            np.testing.assert_array_equal(arrays[name], expected)
            np.testing.assert_array_equal(np.load(folder / f"{name}.images.npy"), expected)
        assert {path.name for path in folder.iterdir()} == {f"{name}.images.npy" for name in rows}


def test_files_are_the_same_bytes_as_those_of_copies(tmp_path: Path) -> None:
    rows = random_rows(50, 0, 2, 4)
    for name in ("moved", "copied"):
        (tmp_path / name).mkdir()
        source, pixels = decoded(tmp_path / name, 50)
        if name == "copied":
            source = replace(source, images=pixels, file=None)
        write_splits(tmp_path / name, source, rows)
    for split in rows:
        files = [tmp_path / name / f"{split}.images.npy" for name in ("moved", "copied")]
        assert files[0].read_bytes() == files[1].read_bytes()

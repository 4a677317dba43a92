"""An archive or an image folder -> a prepared dataset: uint8 arrays and `meta.json`.

Everything is written to a folder beside the destination, which is renamed when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from convline.files import new_folder, restore_folder
from pipeline.dataset import FORMAT, Dataset, check_name, stratified
from pipeline.download import download
from pipeline.metadata import fingerprint_of
from pipeline.preparing.image_folder import Options, decode_images
from pipeline.preparing.integrity import fingerprint, moments
from pipeline.preparing.official_archives import READERS
from pipeline.preparing.official_datasets import officials
from pipeline.preparing.prepared import CHUNK, Prepared, create_array

TEST_SHARE = 0.2
TEST_SEED = 0


def preprocess(
    name: str,
    data_dir: Path,
    source: Path | None = None,
    options: Options | None = None,
    mirrors: Sequence[str] = (),
    overwrite: bool = False,
) -> Dataset:
    """Prepare the dataset `name`: embedded, from its official archives, or from `source`, a folder or
    archive of images.

    Raises ConvlineError, with nothing left behind, for a source that will not do.
    """
    if check_name(name, "dataset") == "archives":
        raise ConvlineError("'archives' is no name for a dataset: downloads are kept there; choose another")
    destination = data_dir / name
    restore_folder(destination)
    if destination.exists() and not overwrite:
        raise ConvlineError(f"{destination} exists; --overwrite prepares it again")
    with new_folder(destination) as folder:
        if source is not None:
            prepared = decode_images(source, folder, options or Options())
        else:
            prepared = _official(name, data_dir, mirrors)
        _write(folder, name, prepared)
    return Dataset.open(data_dir, name)


def _official(name: str, data_dir: Path, mirrors: Sequence[str]) -> Prepared:
    table = officials()
    if name not in table:
        known = ", ".join(table)
        raise ConvlineError(
            f"{name} is not one of {known}; images of your own are prepared by "
            f"`pipeline preprocess {name} --source FOLDER|ARCHIVE`"
        )
    official = table[name]
    return READERS[official.format](official, download(official, data_dir, mirrors))


def _write(folder: Path, name: str, prepared: Prepared) -> None:
    rows = prepared.rows if "test" in prepared.rows else _hold_out_test(prepared)
    counts, fingerprints = {}, {}
    for split, selected in rows.items():
        labels = prepared.labels[selected]
        sizes = np.bincount(labels, minlength=len(prepared.classes)).tolist()
        counts[split] = dict(zip(prepared.classes, sizes, strict=True))
        if empty := [label for label, size in counts[split].items() if not size]:
            raise ConvlineError(
                f"{name}: no usable image of class {empty[0]!r} in {split}; add some, or drop the class"
            )
        images = _copy_rows(folder / f"{split}.images.npy", prepared, selected)
        create_array(folder / f"{split}.labels.npy", labels.shape, np.int64)[:] = labels
        fingerprints[split] = fingerprint(images, labels)
        if split == "train":
            mean, std = moments(images)
    meta = {
        "format": FORMAT,
        "name": name,
        "classes": prepared.classes,
        "image": prepared.spec.to_dict(),
        "counts": counts,
        "source": prepared.source,
        "rejected": prepared.rejects,
        "mean": mean,
        "std": std,
        "fingerprints": fingerprints,
        "fingerprint": fingerprint_of(prepared.classes, prepared.spec.to_dict(), fingerprints),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _hold_out_test(prepared: Prepared) -> dict[str, NDArray[np.int64]]:
    log("there is no test split: a fifth of each class, drawn by a fixed seed, becomes test")
    train = prepared.rows["train"]
    test = stratified(prepared.labels[train], TEST_SHARE, TEST_SEED)
    return {"train": np.delete(train, test), "test": train[test]}


def _copy_rows(path: Path, prepared: Prepared, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The selected rows as a file, in bounded memory; grey images stored as RGB keep one channel."""
    spec = prepared.spec
    images = create_array(path, (len(rows), *prepared.images.shape[1:3], spec.channels))
    for start in range(0, len(rows), CHUNK):
        images[start : start + CHUNK] = prepared.images[rows[start : start + CHUNK], ..., : spec.channels]
    return images

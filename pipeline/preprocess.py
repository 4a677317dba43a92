"""Prepares a dataset (uint8 arrays and `meta.json`) from official archives, from an image folder or archive, or
from Parquet files.

Everything is written to a temporary folder, which replaces the destination when it is complete. After a kill, images
that were decoded in it are not decoded again (see `decoding_journal`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convline.console import log
from convline.errors import ConvlineError
from convline.files import exclusive, new_folder, remove_abandoned_folders, restore_folder
from pipeline.dataset import FORMAT, Dataset, check_name
from pipeline.download import download
from pipeline.preparing.channel_statistics import mean_and_std
from pipeline.preparing.decoded_source import DecodedSource, create_array
from pipeline.preparing.decoding_journal import JOURNAL, stop_resuming
from pipeline.preparing.equal_images import compare_splits, first_equal
from pipeline.preparing.fingerprint import dataset_fingerprint, split_fingerprint
from pipeline.preparing.held_out_splits import hold_out_test
from pipeline.preparing.image_folder import ImageFolderOptions, decode_folder
from pipeline.preparing.image_groups import check_groups, merged_groups
from pipeline.preparing.image_sizes import summary_of_sizes
from pipeline.preparing.official_archive_formats import FORMATS
from pipeline.preparing.official_datasets import known_datasets
from pipeline.preparing.paths_and_groups import position_in_split, write_groups, write_paths
from pipeline.preparing.source_location import write_location
from pipeline.preparing.split_arrays import write_splits
from pipeline.recipe import Recipe


def preprocess(
    name: str,
    data_dir: Path,
    source: Path | None = None,
    options: ImageFolderOptions | None = None,
    mirrors: Sequence[str] = (),
    overwrite: bool = False,
) -> Dataset:
    """Prepare the dataset `name` from `source`, a folder or archive of images or Parquet files, or, without a source,
    as a dataset known by name: embedded, or from its official archives, which are downloaded (`mirrors` are tried
    first).

    Images that were decoded before the process was interrupted (SIGKILL, SIGTERM, Ctrl-C) are not decoded again by a
    call with the same arguments.

    Raises ConvlineError for a source that cannot be used, with nothing left behind, and where another process prepares
    the same dataset.
    """
    if check_name(name, "dataset") == "archives":
        raise ConvlineError("invalid dataset name 'archives': downloads are kept in that folder; choose another")
    options = options or ImageFolderOptions()
    if source is None and (options.labels or options.group_by):
        raise ConvlineError("--labels and --group-by are for images of your own: give --source FOLDER|ARCHIVE")
    destination = data_dir / name
    with exclusive(destination.with_name(f".{name}.lock"), destination):
        restore_folder(destination)
        remove_abandoned_folders(destination, JOURNAL)
        if destination.exists() and not overwrite:
            raise ConvlineError(f"{destination} exists; --overwrite prepares it again")
        with new_folder(destination, JOURNAL if source is not None else None) as folder, _resumable(folder):
            if source is not None:
                decoded = decode_folder(source, folder, options)
            else:
                decoded = _read_official(name, data_dir, mirrors)
            _write(folder, name, decoded, allow_leaks=source is None or options.allow_leaks)
    return Dataset.open(data_dir, name)


def image_size_for(recipe: Recipe) -> tuple[int, int] | None:
    """Height and width of the images that a recipe is made for: those of its dataset where that is known by name, else
    its data.image_size, else a seventh more than its crop, so that the crop has room to move, as in the usual 256
    pixels for a crop of 224. None where it does not say."""
    official = known_datasets().get(recipe.data.dataset)
    if official is not None:
        return official.image[0], official.image[1]
    if (side := recipe.data.image_size) is not None:
        return side, side
    crop = recipe.preprocess.crop_size
    return None if crop is None else (crop[0] + crop[0] // 7, crop[1] + crop[1] // 7)


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say at an interruption that the work is kept, if it is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if (folder / JOURNAL).exists():
            log(f"interrupted; the same command goes on with the images that are decoded (they are in {folder})")
        raise


def _read_official(name: str, data_dir: Path, mirrors: Sequence[str]) -> DecodedSource:
    datasets = known_datasets()
    if name not in datasets:
        raise ConvlineError(
            f"{name} is not one of {', '.join(datasets)}; images of your own are prepared by "
            f"`pipeline preprocess {name} --source FOLDER|ARCHIVE`"
        )
    dataset = datasets[name]
    return FORMATS[dataset.format].read(dataset, download(dataset, data_dir, mirrors))


def _write(folder: Path, name: str, decoded: DecodedSource, allow_leaks: bool) -> None:
    first = first_equal(decoded.images)
    unused = np.setdiff1d(np.arange(len(first)), np.concatenate(list(decoded.rows.values())))
    first[unused] = unused  # rejects have no pixels
    groups = merged_groups(first, decoded.groups)
    rows_of_splits = decoded.rows
    if "test" not in rows_of_splits:
        log("there is no test split: a fifth of each class, drawn with a fixed seed, becomes test")
        rows_of_splits = hold_out_test(decoded.labels, decoded.rows["train"], groups)
    paths = decoded.paths or _numbered(rows_of_splits, len(decoded.labels))
    equal_images = compare_splits(first, decoded.labels, rows_of_splits, paths)
    equal_images.check(allow_leaks)
    separated_groups = check_groups(decoded.groups, rows_of_splits, allow_leaks)
    labels = {split: decoded.labels[rows] for split, rows in rows_of_splits.items()}
    counts = _count_classes(name, decoded.classes, labels)
    stop_resuming(folder)
    images = write_splits(folder, decoded, rows_of_splits)
    for split, rows in rows_of_splits.items():
        create_array(folder / f"{split}.labels.npy", (len(rows),), np.int64)[:] = labels[split]
        if decoded.paths:
            write_paths(folder, split, [decoded.paths[row] for row in rows])
    fingerprints = {split: split_fingerprint(images[split], labels[split]) for split in rows_of_splits}
    mean, std = mean_and_std(images["train"])
    meta = {
        "format": FORMAT,
        "name": name,
        "classes": decoded.classes,
        "image": decoded.spec.to_dict(),
        "counts": counts,
        "source": decoded.source,
        "rejected": decoded.rejects,
        **({"sizes": summary_of_sizes(decoded.sizes, decoded.paths)} if decoded.sizes else {}),
        "equal_images": equal_images.to_dict(),
        "groups": write_groups(folder, groups[rows_of_splits["train"]]),
        "separated_groups": separated_groups,
        "mean": mean,
        "std": std,
        "fingerprints": fingerprints,
        "fingerprint": dataset_fingerprint(decoded.classes, decoded.spec.to_dict(), fingerprints),
    }
    if decoded.location is not None:
        write_location(folder, decoded.location)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _count_classes(name: str, classes: list[str], labels: Mapping[str, NDArray[np.int64]]) -> dict[str, dict[str, int]]:
    """The number of images by split and class. Raises ConvlineError for a class that train or test lacks."""
    counts = {}
    for split, of_split in labels.items():
        sizes = np.bincount(of_split, minlength=len(classes)).tolist()
        counts[split] = dict(zip(classes, sizes, strict=True))
        empty = [label for label, size in counts[split].items() if not size]
        if empty and split != "validation":
            raise ConvlineError(
                f"{name}: no usable image of class {empty[0]!r} in {split}; add some, or remove the class (images with "
                "the same pixels, or of one group, are in one split)"
            )
    return counts


def _numbered(rows_of_splits: dict[str, NDArray[np.int64]], count: int) -> list[str]:
    """Names for images without a path: "train 0", …"""
    names = [""] * count
    for split, rows in rows_of_splits.items():
        for number, row in enumerate(rows.tolist()):
            names[row] = position_in_split(split, number)
    return names

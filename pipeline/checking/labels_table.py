"""The table beside the page of `pipeline check`: every image with its label, for `preprocess --labels` once mended."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convline.files import atomic_write
from pipeline.checking.findings import Check, NamedImage
from pipeline.dataset import Dataset
from pipeline.preparing.paths_and_groups import position_in_split, read_groups

COLUMNS = ("path", "label", "split", "group", "found", "suggested", "probability")

Row = dict[str, str]


def write_labels(path: Path, dataset: Dataset, check: Check) -> None:
    """Write all images of a dataset, those with findings first. `group` keeps together what the dataset keeps together;
    `found`, `suggested` and `probability` (of the label) are for the reader, `preprocess` passes over them."""
    found = _findings(check)
    rows = sorted(_rows(dataset), key=lambda row: found.get((row["split"], row["path"]), (len(found), {}))[0])
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | found.get((row["split"], row["path"]), (0, {}))[1])


def _findings(check: Check) -> dict[tuple[str, str], tuple[int, Row]]:
    """By split and path: the place in the order of findings, and what to say of the image."""
    found: dict[tuple[str, str], Row] = {}

    def add(image: NamedImage, finding: str, **more: str) -> None:
        said = found.setdefault((image.split, image.path), {})
        said["found"] = f"{said['found']}; {finding}" if "found" in said else finding
        said.update(more)

    for pair in check.worst_pairs:
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            add(one, f"{'same pixels as' if pair.is_equal else 'near duplicate of'} {other.path} ({other.label})")
    for each in check.doubtful_labels or ():
        add(each.image, "doubtful label", suggested=each.suggested, probability=f"{each.probability:.4f}")
    for image in check.blank:
        add(image, "blank")
    return {key: (place, said) for place, (key, said) in enumerate(found.items())}


def _rows(dataset: Dataset) -> Iterator[Row]:
    groups = read_groups(dataset.folder, dataset.meta)
    is_shared = np.zeros(0, bool) if groups is None else np.bincount(groups)[groups] > 1
    for name in dataset.meta["counts"]:
        split = dataset.split(name)
        paths = dataset.paths(split)
        for row, label in enumerate(split.labels.tolist()):
            path = position_in_split(name, row) if paths is None else paths[row]
            group = str(groups[row]) if groups is not None and name == "train" and is_shared[row] else ""
            yield {"path": path, "label": dataset.classes[label], "split": name, "group": group}

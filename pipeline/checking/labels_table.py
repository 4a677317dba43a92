"""The table beside the page of `pipeline check`: every image with its label, for `preprocess --labels` once mended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from convline.csv_rows import CsvRows
from convline.files import atomic_write
from pipeline.checking.findings import Check, NamedImage
from pipeline.dataset import Dataset
from pipeline.preparing.paths_and_groups import position_in_split, read_groups

COLUMNS = ("path", "label", "split", "group", "found", "suggested", "probability")

Key = tuple[str, str]  # split and path
Row = dict[str, str]


def write_labels(path: Path, dataset: Dataset, check: Check) -> None:
    """Write all images of a dataset, those with findings first. `group` keeps together what the dataset keeps together;
    `found`, `suggested` and `probability` (of the label) are for the reader, `preprocess` passes over them."""
    found = _findings(check)
    named: dict[Key, Row] = {}
    # names that are not UTF-8 keep their bytes
    with atomic_write(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = CsvRows(file)
        table.write(COLUMNS)
        for row in _rows(dataset):
            if (key := (row["split"], row["path"])) in found:
                named[key] = row | found[key]
        others = (row for row in _rows(dataset) if (row["split"], row["path"]) not in found)
        for row in chain((named[key] for key in found), others):
            table.write([row.get(column, "") for column in COLUMNS])


def _findings(check: Check) -> dict[Key, Row]:
    """What to say of images, the worst first."""
    found: dict[Key, Row] = {}

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
    return found


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

"""The datasets known by name (mnist, cifar10, …). To add a dataset, add an entry to official_datasets.toml."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from convline.errors import ConvlineError
from pipeline.preparing.official_archive_formats import FORMATS

TABLE = Path(__file__).with_name("official_datasets.toml")


@dataclass(frozen=True)
class OfficialDataset:
    """A dataset known by name. `files` maps the names of its archives to "algorithm:checksum", in the order in which
    the reader of its format takes them (none where the dataset is embedded); `image` is [height, width, channels]."""

    name: str
    format: str
    classes: list[str]
    mirrors: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    image: list[int] = field(default_factory=list)


def known_datasets() -> dict[str, OfficialDataset]:
    """The datasets known by name. The user's own table, whose path is in CONVLINE_DATASETS, takes precedence.

    Raises ConvlineError where that table is missing or invalid.
    """
    known = _read_table(TABLE)
    if own_table := os.environ.get("CONVLINE_DATASETS"):
        known |= _read_table(Path(own_table))
    return known


def _read_table(path: Path) -> dict[str, OfficialDataset]:
    try:
        table = {name: OfficialDataset(name, **fields) for name, fields in tomllib.loads(path.read_text()).items()}
        for name, dataset in table.items():
            if dataset.format not in FORMATS:
                raise ValueError(f"{name} has format {dataset.format!r}; known formats are {', '.join(FORMATS)}")
            if len(dataset.files) != (count := FORMATS[dataset.format].archive_count):
                raise ValueError(f"{name} has {len(dataset.files)} files; format {dataset.format} needs {count}")
            if len(dataset.image) != 3:
                raise ValueError(f"image of {name} must be [height, width, channels]")
        return table
    except (OSError, ValueError, TypeError) as error:
        raise ConvlineError(f"the table of datasets {path} cannot be read: {error}") from error

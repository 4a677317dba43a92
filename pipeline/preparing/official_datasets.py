"""The datasets known by name. A new one is an entry of official_datasets.toml."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from convline.errors import ConvlineError

TABLE = Path(__file__).with_name("official_datasets.toml")
FORMATS = {"idx": 4, "cifar-binary": 1, "svhn-mat": 2, "embedded-digits": 0}  # and how many archives they have


@dataclass(frozen=True)
class OfficialDataset:
    """A dataset known by name: `files`, its official archives, map name to "algorithm:checksum", in the order
    of its reader (none where it is embedded); `image` is [height, width, channels]."""

    name: str
    format: str
    classes: list[str]
    mirrors: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    image: list[int] = field(default_factory=list)


def officials() -> dict[str, OfficialDataset]:
    """The datasets known by name; those of a table of the user's own, named by CONVLINE_DATASETS, come first.

    Raises ConvlineError where that table is not one.
    """
    known = _read_table(TABLE)
    if own := os.environ.get("CONVLINE_DATASETS"):
        known |= _read_table(Path(own))
    return known


def _read_table(path: Path) -> dict[str, OfficialDataset]:
    try:
        table = {name: OfficialDataset(name, **fields) for name, fields in tomllib.loads(path.read_text()).items()}
        for name, dataset in table.items():
            if FORMATS.get(dataset.format) != len(dataset.files):
                raise ValueError(f"{name} is no format of {FORMATS} with as many files")
            if len(dataset.image) != 3:
                raise ValueError(f"image of {name} is [height, width, channels]")
        return table
    except (OSError, ValueError, TypeError) as error:
        raise ConvlineError(f"the table of datasets {path} cannot be read: {error}") from error

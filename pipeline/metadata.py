"""What the JSON files that describe a dataset (`meta.json`) and a run (`run.json`) must hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from convline.errors import ConvlineError
from convline.images import ImageSpec

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]


class _Fields(BaseModel):
    """Fields that are not declared may be there: a newer convline may have written them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Images(_Fields):
    """What a run keeps of its dataset's description: `mean` and `std` by channel, in 0 to 255; the `fingerprint` is
    that of classes, image and the `fingerprints` of the splits."""

    name: Name
    classes: Annotated[list[Name], Field(min_length=1)]
    image: dict[str, Any]
    mean: list[Annotated[float, Field(ge=0, le=255)]]
    std: list[Annotated[float, Field(ge=0, le=255)]]
    fingerprints: dict[str, str]
    fingerprint: str

    @model_validator(mode="after")
    def _check(self) -> Images:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("it names a class twice")
        try:
            spec = ImageSpec.from_dict(self.image)
        except ConvlineError as error:
            raise ValueError(str(error)) from error
        if spec.height is None or not len(self.mean) == len(self.std) == spec.channels:
            raise ValueError("the image has no size, or mean and std are not one a channel")
        if not {"train", "test"} <= self.fingerprints.keys():
            raise ValueError("a split is missing")
        if self.fingerprint != fingerprint_of(self.classes, self.image, self.fingerprints):
            raise ValueError("the dataset's fingerprint is not that of its classes, image and splits")
        return self


class DatasetFields(Images):
    """`meta.json`; `counts` by split and class."""

    counts: dict[str, dict[str, Count]]
    source: dict[str, Any]
    rejected: list[dict[str, str]]

    @model_validator(mode="after")
    def _check_counts(self) -> DatasetFields:
        if self.counts.keys() != self.fingerprints.keys():
            raise ValueError("counts and fingerprints are of different splits")
        if any(list(counts) != self.classes for counts in self.counts.values()):
            raise ValueError("the counts are of other classes")
        return self


class RunFields(_Fields):
    """`run.json`."""

    id: Name
    dataset: Images


def fingerprint_of(classes: list[str], image: dict[str, Any], fingerprints: dict[str, str]) -> str:
    """A dataset's fingerprint, of those of its splits: SHA-256, in hexadecimal."""
    return hashlib.sha256(json.dumps([classes, image, fingerprints]).encode()).hexdigest()


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, and ConvlineError, which ends with `remedy`, for a file that
    holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvlineError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(fields, dict):
        raise ConvlineError(f"{path} is damaged (it holds no JSON object); {remedy}")
    return fields


def read_described(path: Path, schema: type[BaseModel], version: int, remedy: str) -> dict[str, Any]:
    """As `read_object`, of format `version` and with the fields of `schema`."""
    fields = read_object(path, remedy)
    if fields.get("format") != version:
        raise ConvlineError(f"{path.parent} has format {fields.get('format')}, this convline reads {version}; {remedy}")
    try:
        schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ConvlineError(
            f"{path} is damaged ({where}{first['msg'].removeprefix('Value error, ')}); {remedy}"
        ) from error
    return fields

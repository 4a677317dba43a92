"""The schemas of `meta.json` (a prepared dataset) and `run.json` (a run), and how these files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from convline.errors import ConvlineError
from convline.images import ImageSpec
from pipeline.preparing.fingerprint import dataset_fingerprint

Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Side = Annotated[int, Field(ge=1)]
Size = Annotated[list[Side], Field(min_length=2, max_length=2)]
PixelValue = Annotated[float, Field(ge=0, le=255)]


class _Fields(BaseModel):
    """Other fields than the declared ones are accepted: a newer convline may have written them."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class DatasetFields(_Fields):
    """The fields of `meta.json` that a run copies into its `run.json`.

    `mean` and `std` are per channel, of the training images, in 0 to 255; `fingerprint` covers `classes`, `image` and
    the `fingerprints` of the splits.
    """

    name: Name
    classes: Annotated[list[Name], Field(min_length=1)]
    image: dict[str, Any]
    mean: list[PixelValue]
    std: list[PixelValue]
    fingerprints: dict[str, str]
    fingerprint: str

    @model_validator(mode="after")
    def _check(self) -> DatasetFields:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        try:
            spec = ImageSpec.from_dict(self.image)
        except ConvlineError as error:
            raise ValueError(str(error)) from error
        if spec.height is None:
            raise ValueError("the image has no size")
        if not len(self.mean) == len(self.std) == spec.channels:
            raise ValueError("mean and std must have one value per channel")
        if not {"train", "test"} <= self.fingerprints.keys():
            raise ValueError("a split is missing")
        if self.fingerprint != dataset_fingerprint(self.classes, self.image, self.fingerprints):
            raise ValueError("the dataset's fingerprint does not match its classes, image and splits")
        return self


class OddImage(_Fields):
    path: str
    height: Side
    width: Side


class OddImages(_Fields):
    """`images`: the first of them."""

    count: Count
    images: Annotated[list[OddImage], Field(min_length=1)]


class SizesFields(_Fields):
    """The sizes of a source's images, upright and before they were resized, as [height, width]; `odd`, by kind, those
    that are unlike the others."""

    smallest: Size
    largest: Size
    median: Size
    different: Count
    odd: dict[str, OddImages]


class MetaFields(DatasetFields):
    """All fields of `meta.json`. `counts` are numbers of images by split and class; `sizes` are missing where the
    source has no image files, and in datasets of older versions."""

    sizes: SizesFields | None = None
    counts: dict[str, dict[str, Count]]
    source: dict[str, Any]
    rejected: list[dict[str, str]]

    @model_validator(mode="after")
    def _check_counts(self) -> MetaFields:
        if self.counts.keys() != self.fingerprints.keys():
            raise ValueError("counts and fingerprints name different splits")
        if any(list(counts) != self.classes for counts in self.counts.values()):
            raise ValueError("the counts are of other classes")
        return self


class RunFields(_Fields):
    """The fields of `run.json`."""

    id: Name
    dataset: DatasetFields
    weights: dict[str, Any] | None = None


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, and ConvlineError, whose message ends with `remedy`, for a
    file that holds something else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvlineError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(fields, dict):
        raise ConvlineError(f"{path} is damaged (it does not hold a JSON object); {remedy}")
    return fields


def read_validated(path: Path, schema: type[BaseModel], version: int, remedy: str) -> dict[str, Any]:
    """As `read_json_object`; also raises ConvlineError for another format than `version`, and for fields that do not
    match `schema`."""
    fields = read_json_object(path, remedy)
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

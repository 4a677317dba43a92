"""Small builders and readers that the serving tests share."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.classify import classify, classify_in_batches
from serving.job import Job
from serving.predict import PredictBatches

RNG = np.random.default_rng(0)


def noise(*shape: int) -> NDArray[np.uint8]:
    """Pixels that no two images share."""
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image | NDArray[Any], format: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def slow_jpeg(side: int = 1000, scans: int = 1000) -> bytes:
    """A small JPEG whose last progressive scan is repeated: it takes 1.5 s to decode, longer with more scans."""
    data = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scans * scan + data[-2:]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def altered(model: Path, target: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """A copy of an ONNX file after `edit`."""
    proto = onnx.load(model)
    edit(proto)
    onnx.save(proto, target)
    return target


def resealed(model: Path, target: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """As `altered`, with a forged proof that has the hash of the changed file."""
    proto = onnx.load(model)
    edit(proto)
    kept = {entry.key: entry.value for entry in proto.metadata_props}
    proof = json.loads(kept.pop("convline.parity"))
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, kept)
    proof["sha256_without_parity"] = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    onnx.helper.set_model_props(proto, {**kept, "convline.parity": json.dumps(proof)})
    target.write_bytes(proto.SerializeToString())
    return target


def set_metadata(key: str, value: str | None) -> Callable[[onnx.ModelProto], None]:
    """An edit for `altered`: convline.<key> becomes `value`, or is dropped."""

    def edit(proto: onnx.ModelProto) -> None:
        kept = {entry.key: entry.value for entry in proto.metadata_props}
        del kept[f"convline.{key}"], proto.metadata_props[:]
        onnx.helper.set_model_props(proto, kept if value is None else {**kept, f"convline.{key}": value})

    return edit


def interrupted(job: Job, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run a job, and end it after `after` batches, as Ctrl-C does."""

    def stopping(predict: PredictBatches, *arguments: object) -> object:
        for number, batch in enumerate(classify_in_batches(predict, *arguments)):  # type: ignore[arg-type]
            if number == after:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr("serving.classify.classify_in_batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            classify(job)

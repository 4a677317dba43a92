"""Where a model comes from, and what is refused before anything is built of it.

An ONNX file may name other files that hold its weights ("external data"): a file from elsewhere could name any file
of this machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message
from onnx.external_data_helper import load_external_data_for_tensor

from convline.errors import ModelError
from convline.mlflow_client import SCHEME, read_registered

FORMAT = 1
PREFIX = "convline."
REQUIRED = {
    "format": int,
    "classes": list,
    "image": dict,
    "recipe": dict,
    "dataset": dict,
    "weights": str,
    "run": dict,
    "evaluation": dict,
    "parity": dict,
    "probe": dict,
    "versions": dict,
}
# what must stand in them: whoever asks where a file came from finds an answer
FILLED: dict[str, dict[str, type]] = {
    "dataset": {"name": str, "fingerprint": str},
    "run": {"id": str, "seed": int, "step": int},
    "evaluation": {"split": str, "fingerprint": str, "count": int, "precision_at_1": float},
}
PROOF = ("evaluation", "parity")  # what a file that is still to be proven lacks

MODEL = "model.onnx"  # of a run's folder
MAX_BYTES = 2**31 - 1  # what protocol buffers can hold; external data counts too


def read_model(name: Path | str) -> bytes:
    """The bytes of a file, or of a model in MLflow's registry. Raises ModelError where it is missing or too large."""
    if str(name).startswith(SCHEME):
        return read_registered(str(name))
    path = Path(name)
    if not path.is_file():
        if (path / MODEL).is_file():
            raise ModelError(f"{path} is a folder; did you mean {path / MODEL}?")
        run = path.parent.name if path.name == MODEL else ""
        raise ModelError(f"no model at {path}; `pipeline export {run or 'RUN'}` makes one")
    _check_size(path, path.stat().st_size)
    return path.read_bytes()


def parse_model(data: bytes, name: Path | str) -> onnx.ModelProto:
    """The model's structure. Raises ModelError for bytes that are none."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(f"{name} is no ONNX file, or a damaged copy of one; take a whole one") from error
    if not model.graph.node:
        raise ModelError(f"{name} is no ONNX file, or an empty one; take a whole one")
    return model


def read_metadata(model: onnx.ModelProto, name: Path | str, absent: Collection[str] = ()) -> dict[str, Any]:
    """The `convline.` metadata, parsed; some may be `absent`. Raises ModelError for missing, damaged or newer ones."""
    stored = {entry.key: entry.value for entry in model.metadata_props}
    metadata = {
        key.removeprefix(PREFIX): _parsed(value, f"{name} has damaged metadata {key}")
        for key, value in stored.items()
        if key.startswith(PREFIX)
    }
    if not metadata:
        raise ModelError(
            f"{name} was not exported by convline: it has no convline metadata; to classify with it all the same, name "
            "its --classes FILE and how it takes pixels by --preprocess"
        )
    if len(stored) != len(model.metadata_props):
        raise ModelError(f"{name} has metadata twice; export it again")
    version = metadata.get("format")
    if type(version) is int and not 1 <= version <= FORMAT:  # first: another format may hold other things
        raise ModelError(f"{name} has format {version}, this convline reads {FORMAT}; upgrade convline")
    told = {key: kind for key, kind in REQUIRED.items() if key in metadata or key not in absent}
    wrong = [key for key, kind in told.items() if type(metadata.get(key)) is not kind]
    classes = metadata.get("classes")
    if isinstance(classes, list) and not (classes and all(isinstance(label, str) for label in classes)):
        wrong.append("classes")
    wrong += [f"{key}.{field}" for key in told for field in _unfilled(metadata.get(key), key)]
    if wrong:
        raise ModelError(f"{name} lacks the metadata {', '.join(wrong)}, or they are damaged; export it again")
    if len(set(metadata["classes"])) != len(metadata["classes"]):
        raise ModelError(f"{name} names a class twice; export it again")
    return metadata


def _parsed(text: str, damaged: str) -> Any:
    """Of JSON. Raises ModelError for anything else, NaN and numbers without bound among it."""

    def number(text: str) -> float:
        if not isfinite(value := float(text)):
            raise ValueError(f"{text} is no number of JSON")
        return value

    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{damaged} ({error}); export it again") from error


def _unfilled(table: Any, key: str) -> list[str]:
    """The fields of a table that are missing, empty, of another type, or numbers that cannot be."""

    def is_filled(value: Any, kind: type) -> bool:
        if kind is float:
            return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1
        return type(value) is kind and (not isinstance(value, int) or value >= 0) and value != ""

    fields = FILLED.get(key, {}) if isinstance(table, dict) else {}
    return [field for field, kind in fields.items() if not is_filled(table.get(field), kind)]


def problem_with_proof(proto: onnx.ModelProto, metadata: dict[str, Any]) -> str | None:
    """Why the file is not the one that its proof is about. Takes the proof out of `proto`."""
    parity = metadata["parity"]
    if parity.get("passed") is not True or metadata["weights"] != "averaged":
        return "did not pass its proof, or does not hold averaged weights"
    del proto.metadata_props[[entry.key for entry in proto.metadata_props].index(f"{PREFIX}parity")]
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    if (told := parity.get("sha256_without_parity")) is None:
        return "has a proof that does not say of which file it is (sha256_without_parity)"
    return None if told == digest else "was changed after its proof: it is not the model that was proven"


def check_has_no_external_data(model: onnx.ModelProto, name: Path | str) -> None:
    """Raises ModelError where a convline file, which holds all its weights itself, names another file."""
    for tensor in external_tensors(model):
        raise ModelError(
            f"{name} keeps {tensor.name} in another file ({_location(tensor)}), as no file of convline does; "
            "export it again"
        )


def load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Take in the weights that are kept in files beside `path`.

    Raises ModelError for a file that is missing, too large, or outside that folder.
    """
    folder = path.resolve().parent
    total = path.stat().st_size
    for tensor in external_tensors(model):
        location = _location(tensor)
        try:
            file = (folder / location).resolve()
            if not file.is_relative_to(folder) or not file.is_file():
                raise ModelError(
                    f"{path} keeps {tensor.name} in {location!r}, which is no file in {folder}; it is refused"
                )
            told = {entry.key: entry.value for entry in tensor.external_data}
            total += int(told.get("length") or file.stat().st_size)
            _check_size(path, total)
            load_external_data_for_tensor(tensor, str(folder))
        except (ValueError, OSError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{path} keeps {tensor.name} in {location!r}, which cannot be read: {error}") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def external_tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Tensors whose data is in other files, wherever in the model they are."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                yield from external_tensors(inner)


def _location(tensor: onnx.TensorProto) -> str:
    return {entry.key: entry.value for entry in tensor.external_data}.get("location", "")


def _check_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise ModelError(f"{path} takes {size} bytes, the limit is {MAX_BYTES}; it is refused")

"""Read an ONNX file and its `convline.` metadata, and refuse damaged or untrusted files before they are loaded.

An ONNX file may keep its weights in other files ("external data"). A malicious one could name any file of this machine.
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
OPTIONAL = {"decision": dict, "unfamiliar": dict}  # made by options of `pipeline export`
# fields that must not be empty: they say where a file comes from
REQUIRED_FIELDS: dict[str, dict[str, type]] = {
    "dataset": {"name": str, "fingerprint": str},
    "run": {"id": str, "seed": int, "step": int},
    "evaluation": {"split": str, "fingerprint": str, "count": int, "precision_at_1": float},
    "decision": {"threshold": float},
}
PROOF = ("evaluation", "parity")  # metadata that a file gets with its proof
CONSTANT_PREFIX = "constant."  # begins the names of weights that are computed, not trained

MODEL = "model.onnx"  # in the folder of a run
MAX_PROTOBUF_BYTES = 2**31 - 1  # the limit of protocol buffers; external data counts as well


def read_model(name: Path | str) -> bytes:
    """The bytes of a file or of a model in MLflow's registry. Raises ModelError if it is missing or too large."""
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
    """The parsed model. Raises ModelError for bytes that are not an ONNX file."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(f"{name} is not an ONNX file, or a damaged one; use an intact file") from error
    if not model.graph.node:
        raise ModelError(f"{name} is not an ONNX file, or an empty one; use an intact file")
    return model


def has_convline_metadata(model: onnx.ModelProto) -> bool:
    """Whether the file was exported by convline; the metadata may be damaged."""
    return any(entry.key.startswith(PREFIX) for entry in model.metadata_props)


def read_metadata(model: onnx.ModelProto, name: Path | str, optional: Collection[str] = ()) -> dict[str, Any]:
    """The parsed `convline.` metadata; the keys in `optional` may be missing.

    Raises ModelError for missing or damaged metadata, and for those of a newer format.
    """
    stored = {entry.key: entry.value for entry in model.metadata_props}
    metadata = {
        key.removeprefix(PREFIX): _parse_json(value, f"{name} has damaged metadata {key}")
        for key, value in stored.items()
        if key.startswith(PREFIX)
    }
    if not metadata:
        raise ModelError(
            f"{name} was not exported by convline: it has no convline metadata; to classify with it, give its class "
            "names by --classes FILE and describe its input by --preprocess"
        )
    if len(stored) != len(model.metadata_props):
        raise ModelError(f"{name} has duplicate metadata; export it again")
    version = metadata.get("format")
    if type(version) is int and not 1 <= version <= FORMAT:  # checked first: another format may have other keys
        raise ModelError(f"{name} has format {version}, this convline reads {FORMAT}; upgrade convline")
    optional = {*OPTIONAL, *optional}
    expected = {key: kind for key, kind in (REQUIRED | OPTIONAL).items() if key in metadata or key not in optional}
    wrong = [key for key, kind in expected.items() if type(metadata.get(key)) is not kind]
    classes = metadata.get("classes")
    if isinstance(classes, list) and not (classes and all(isinstance(label, str) for label in classes)):
        wrong.append("classes")
    wrong += [f"{key}.{field}" for key in expected for field in _wrong_fields(metadata.get(key), key)]
    if wrong:
        raise ModelError(f"{name} has missing or damaged metadata: {', '.join(wrong)}; export it again")
    if len(set(metadata["classes"])) != len(metadata["classes"]):
        raise ModelError(f"{name} has two classes of the same name; export it again")
    return metadata


def _parse_json(text: str, problem: str) -> Any:
    """Raises ModelError, which begins with `problem`, for invalid JSON, NaN and infinity included."""

    def number(text: str) -> float:
        if not isfinite(value := float(text)):
            raise ValueError(f"{text} is not a JSON number")
        return value

    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{problem} ({error}); export it again") from error


def _wrong_fields(table: Any, key: str) -> list[str]:
    """The required fields of a table that are missing, empty, of another type, or out of range."""

    def is_valid(value: Any, kind: type) -> bool:
        if kind is float:
            return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1
        return type(value) is kind and (not isinstance(value, int) or value >= 0) and value != ""

    fields = REQUIRED_FIELDS.get(key, {}) if isinstance(table, dict) else {}
    return [field for field, kind in fields.items() if not is_valid(table.get(field), kind)]


def problem_with_proof(proto: onnx.ModelProto, metadata: dict[str, Any]) -> str | None:
    """Why the proof in the metadata does not hold for this file; None if it does. Removes the proof from `proto`."""
    parity = metadata["parity"]
    if parity.get("passed") is not True or metadata["weights"] != "averaged":
        return "did not pass its proof, or does not hold averaged weights"
    del proto.metadata_props[[entry.key for entry in proto.metadata_props].index(f"{PREFIX}parity")]
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    if (proven := parity.get("sha256_without_parity")) is None:
        return "has a proof without the hash of the proven file (sha256_without_parity)"
    return None if proven == digest else "was changed after its proof: it is not the model that was proven"


def check_has_no_external_data(model: onnx.ModelProto, name: Path | str) -> None:
    """Raises ModelError for a file with weights in other files: a convline file holds all its weights."""
    for tensor in external_tensors(model):
        raise ModelError(
            f"{name} keeps {tensor.name} in another file ({_location(tensor)}), which convline never does; "
            "export it again"
        )


def load_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Load the weights that are stored in other files in the folder of `path` into `model`.

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
                    f"{path} keeps {tensor.name} in {location!r}, which is not a file in {folder}; it is refused"
                )
            attributes = {entry.key: entry.value for entry in tensor.external_data}
            total += int(attributes.get("length") or file.stat().st_size)
            _check_size(path, total)
            load_external_data_for_tensor(tensor, str(folder))
        except (ValueError, OSError, onnx.checker.ValidationError) as error:
            raise ModelError(f"{path} keeps {tensor.name} in {location!r}, which cannot be read: {error}") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def external_tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors of a model whose data is in other files, also those in inner graphs."""
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
    if size > MAX_PROTOBUF_BYTES:
        raise ModelError(f"{path} takes {size} bytes, the limit is {MAX_PROTOBUF_BYTES}; it is refused")

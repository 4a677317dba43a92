"""Where a model comes from, and what is refused before anything is built of it.

An ONNX file may name other files that hold its weights ("external data"): a file from elsewhere could name any file
of this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx.external_data_helper import load_external_data_for_tensor

from serving.errors import ModelError
from serving.registry import SCHEME, read_registered

MAX_BYTES = 2**31 - 1  # what protocol buffers can hold; external data counts too


def read_model(name: Path | str) -> bytes:
    """The bytes of a file, or of a model in MLflow's registry. Raises ModelError where it is missing or too large."""
    if str(name).startswith(SCHEME):
        return read_registered(str(name))
    path = Path(name)
    if not path.is_file():
        raise ModelError(f"no model at {path}; `pipeline export` makes one")
    _check_size(path, path.stat().st_size)
    return path.read_bytes()


def parse_model(data: bytes, name: Path | str) -> onnx.ModelProto:
    """The model's structure. Raises ModelError for bytes that are none."""
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelError(f"{name} is no ONNX file, or a damaged one; export it again") from error
    if not model.graph.node:
        raise ModelError(f"{name} is no ONNX file, or an empty one; export it again")
    return model


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

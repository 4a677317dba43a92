"""`--classes FILE`: read class names for an external model (lines, JSON list, Keras and Hugging Face indices)."""

from __future__ import annotations

import ast
import codecs
import json
import re
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError

EXPECTED = "class names, one per line or a JSON list"
INDEX = re.compile(r"0|[1-9]\d*")
JSON_START = re.compile(r"""\{|\[\s*["'\d\[{\]]""")  # does not match "[unknown]", which may be a name


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in the order of the scores: one per line, a JSON list, or an object from index to name or name to
    index, as Keras and Hugging Face write them. Raises ConvlineError for anything else.
    """
    try:
        names = _names(_decode_text(path.read_bytes()))
    except OSError as error:
        raise ConvlineError(f"{path} does not hold {EXPECTED}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConvlineError(f"{path} does not hold {EXPECTED}: {error}") from error
    first_numbers: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if first_numbers.setdefault(name, number) != number:
            raise ConvlineError(
                f"{path} names the class {name!r} twice (as number {first_numbers[name]} and {number}); "
                "give each class a name of its own"
            )
    return tuple(names)


def _decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 as PowerShell writes it. Raises ValueError for anything else."""
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it has NUL characters, so it is not UTF-8 text; save it as UTF-8")
    return text.strip()


def _names(text: str) -> list[str]:
    """Raises ValueError, which says why, for text without names."""
    content = _parse_list_or_object(text)
    if content is None:
        names = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
        if "" in names:
            raise ValueError(f"line {names.index('') + 1} is empty" if text else "it is empty")
        return names
    if isinstance(content, dict):
        content = _names_by_index(content)
    if not isinstance(content, list) or not content:
        raise ValueError("it contains no list")
    for entry in content:
        if not isinstance(entry, str) or not entry.strip():
            raise ValueError(f"{entry!r} is not a name")
    return content


def _parse_list_or_object(text: str) -> Any:
    """A list or an object, in JSON or as Python prints it; None for plain lines."""
    if not JSON_START.match(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError("it begins as JSON, but is damaged")


def _names_by_index(table: dict[Any, Any]) -> list[Any]:
    """The names, in order, of an object from index to name or from name to index."""
    for key in ("id2label", "label2id"):  # Hugging Face's config.json
        if isinstance(table.get(key), dict):
            table = table[key]
            break
    if not all(map(_is_index, table)):
        table = _inverted(table)
    named = {int(key): name for key, name in table.items()}
    if not named or sorted(named) != list(range(len(named))):
        raise ValueError("its object does not map 0, 1, 2, … to names, or names to these")
    # Keras' imagenet_class_index.json has ["n01440764", "tench"]
    return [" ".join(name) if _is_list_of_strings(name) else name for _, name in sorted(named.items())]


def _inverted(table: dict[Any, Any]) -> dict[Any, Any]:
    """An object from name to index as one from index to name; empty for any other object."""
    inverted = {index: name for name, index in table.items() if _is_index(index)}
    return inverted if len(inverted) == len(table) else {}


def _is_index(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and bool(INDEX.fullmatch(value)))


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)

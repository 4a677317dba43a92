"""The file of class names of a model made elsewhere, in the forms in which such files come."""

from __future__ import annotations

import ast
import codecs
import json
import re
from pathlib import Path
from typing import Any

from convline.errors import ConvlineError

FORMS = "class names, a line each or a JSON list"
INDEX = re.compile(r"0|[1-9]\d*")
BEGINS_AS_JSON = re.compile(r"""\{|\[\s*["'\d\[{\]]""")  # not "[unknown]", which may be a name


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, that of score 0 first: a line each, a JSON list, or an object from index to name or name to index,
    as Keras and Hugging Face write them. Raises ConvlineError for anything else.
    """
    try:
        names = _names(_decoded(path.read_bytes()))
    except OSError as error:
        raise ConvlineError(f"{path} does not hold {FORMS}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConvlineError(f"{path} does not hold {FORMS}: {error}") from error
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if first.setdefault(name, number) != number:
            raise ConvlineError(
                f"{path} names the class {name!r} twice (as number {first[name]} and {number}); tell them apart"
            )
    return tuple(names)


def _decoded(data: bytes) -> str:
    """UTF-8, or UTF-16 as PowerShell writes it. Raises ValueError for anything else."""
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is no text in UTF-8; save it as such") from error
    if "\0" in text:
        raise ValueError("it has NUL characters, so it is no text in UTF-8; save it as such")
    return text.strip()


def _names(text: str) -> list[str]:
    """Raises ValueError, saying why, for text that holds no names."""
    content = _parsed(text)
    if content is None:
        names = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
        if "" in names:
            raise ValueError(f"line {names.index('') + 1} is empty" if text else "it is empty")
        return names
    if isinstance(content, dict):
        content = _in_order(content)
    if not isinstance(content, list) or not content:
        raise ValueError("there is no list in it")
    for entry in content:
        if not isinstance(entry, str) or not entry.strip():
            raise ValueError(f"{entry!r} is no name")
    return content


def _parsed(text: str) -> Any:
    """A list or an object in JSON, or as Python prints it; None for plain lines."""
    if not BEGINS_AS_JSON.match(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ValueError("it begins as JSON, and is damaged")


def _in_order(table: dict[Any, Any]) -> list[Any]:
    """The names of an object from index to name, or from name to index."""
    for key in ("id2label", "label2id"):  # Hugging Face's config.json
        if isinstance(table.get(key), dict):
            table = table[key]
            break
    if not all(map(_is_index, table)):
        table = _inverted(table)
    named = {int(key): name for key, name in table.items()}
    if not named or sorted(named) != list(range(len(named))):
        raise ValueError("its object is not from 0, 1, 2, … to names, or the other way round")
    # Keras' imagenet_class_index.json has ["n01440764", "tench"]
    return [" ".join(name) if _is_words(name) else name for _, name in sorted(named.items())]


def _inverted(table: dict[Any, Any]) -> dict[Any, Any]:
    """From index to name, of a table from name to index; nothing of any other."""
    inverted = {index: name for name, index in table.items() if _is_index(index)}
    return inverted if len(inverted) == len(table) else {}


def _is_index(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and bool(INDEX.fullmatch(value)))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)

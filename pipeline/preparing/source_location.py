"""Where a dataset's source was when it was prepared: source.json, beside meta.json.

It is no part of what describes the dataset, nor of its fingerprint: a dataset that was moved, or whose source is gone,
opens as before. Runs and ONNX files do not copy it.
"""

from __future__ import annotations

import json
from pathlib import Path

NAME = "source.json"


def write_location(folder: Path, source: Path) -> None:
    """Write the absolute path of `source`, a folder or archive, into the dataset's `folder`."""
    text = json.dumps({"location": str(source.absolute())}, indent=2)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_location(folder: Path) -> Path | None:
    """The path of the dataset's source, where nothing may be any more; None where it is not known."""
    try:
        return Path(json.loads((folder / NAME).read_text(encoding="utf-8"))["location"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None

"""Read what `pipeline evaluate` and `pipeline export` wrote about a run: evaluation.json and parity.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convline.console import log


def read_result_file(path: Path) -> dict[str, Any]:
    """The fields of the file; empty if there is no such file, or, with a warning, if it is damaged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        log(f"warning: {path} is damaged and ignored; run the command that wrote it again")
        return {}
    return fields

"""What other commands wrote about a run: evaluation.json and parity.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convline.console import log


def read_findings(path: Path) -> dict[str, Any]:
    """The fields of such a file; none of one that is not there, or, with a warning, damaged."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        log(f"warning: {path} is damaged and left out; the command that wrote it writes it again")
        return {}
    return fields

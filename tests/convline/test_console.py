"""What commands print."""

from __future__ import annotations

import json

from convline.console import as_json


def test_reports_are_json_whatever_they_hold() -> None:
    report = {"a": float("nan"), "b": [1.5, float("-inf"), {"c": (float("inf"), "NaN", None, True)}]}
    text = as_json(report)
    assert "NaN," not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True]}]}

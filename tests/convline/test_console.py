"""The terminal output of commands."""

from __future__ import annotations

import json

from convline.console import as_json


def test_reports_with_nan_and_infinities_are_valid_json() -> None:
    report = {"a": float("nan"), "b": [1.5, float("-inf"), {"c": (float("inf"), "NaN", None, True)}]}
    text = as_json(report)
    assert "NaN," not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True]}]}

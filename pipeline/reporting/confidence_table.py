"""What an exported file's metadata say of its temperature and threshold, as a table."""

from __future__ import annotations

from typing import Any

from convline.html import Html, HtmlContent, table
from pipeline.exporting.confidence import SPLITS, with_interval


def confidence_table(metadata: dict[str, Any]) -> Html | None:
    """Calibration error before and after, precision and coverage, each on validation and test with its 95% interval.

    None for a file that has neither a temperature nor a threshold.
    """
    rows: list[list[HtmlContent]] = []
    if calibration := metadata.get("calibration"):
        errors = calibration["errors"]
        for name, when in (
            ("without temperature", "before"),
            (f"temperature {calibration['temperature']:.4g}", "after"),
        ):
            cells = (with_interval(errors[split][when]["error"], errors[split][when]["interval"]) for split in SPLITS)
            rows.append([f"calibration error, {name}", *cells])
    if decision := metadata.get("decision"):
        for key in ("precision", "coverage"):
            cells = (with_interval(decision[split][key], decision[split][f"{key}_interval"]) for split in SPLITS)
            rows.append([f"{key} from the threshold {decision['threshold']:.4g} on", *cells])
    return table(("", *SPLITS), rows, "Temperature and threshold of model.onnx") if rows else None

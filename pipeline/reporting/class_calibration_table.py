"""What the answers of each class claim and how often they are right, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from convline.html import HtmlContent, display_name, element, long_table, muted
from pipeline.calibration import ABOUT_VERDICTS, ClassCalibration


def class_calibration_table(classes: Sequence[str], found: Sequence[ClassCalibration]) -> HtmlContent:
    """A row for each class, those outside the interval marked in words."""
    rows = [
        (display_name(name), f"{one.answers:,}", *_figures(one), _verdict(one))
        for name, one in zip(classes, found, strict=True)
    ]
    header = ("class", "answers", "mean probability", "right", "verdict")
    return [muted(ABOUT_VERDICTS), long_table(header, rows, "What the answers of each class claim", "classes")]


def _figures(found: ClassCalibration) -> tuple[str, str]:
    if found.precision is None:
        return "-", "-"
    lowest, highest = found.precision_interval
    return f"{found.mean_probability:.1%}", f"{found.precision:.1%} ({lowest:.0%} to {highest:.0%})"


def _verdict(found: ClassCalibration) -> HtmlContent:
    is_outside = found.verdict.startswith("claims")
    return element("span", found.verdict or "-", **({"class_": "wrong"} if is_outside else {}))

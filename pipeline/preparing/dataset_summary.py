"""What `pipeline preprocess` prints of a dataset: images by class and split, sizes, unusable files, copies, groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from convline.html import elide_middle
from pipeline.preparing.image_sizes import lines_about_sizes

MAX_ROWS = 20  # of more classes, only the largest and the smallest are shown
MAX_NAME_WIDTH = 40  # characters


def class_counts_table(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The lines of the table: a header and a row per class, from {"train": {"cat": 4, …}, "test": {"cat": 1, …}}."""
    splits = list(counts)
    sizes = {label: [counts[split][label] for split in splits] for label in counts[splits[0]]}
    omitted = len(sizes) - MAX_ROWS
    shown = list(sizes)
    if omitted > 0:
        shown.sort(key=lambda label: -sum(sizes[label]))
        shown = shown[: MAX_ROWS // 2] + shown[-MAX_ROWS // 2 :]
    name_width = min(MAX_NAME_WIDTH, max(map(len, ["class", *shown])))
    widths = [max(map(len, [split, *(str(size) for size in counts[split].values())])) for split in splits]
    rows = [["class", *splits], *([label, *map(str, sizes[label])] for label in shown)]
    for number, (label, *cells) in enumerate(rows):
        if omitted > 0 and number == 1 + MAX_ROWS // 2:
            yield f"… {omitted} classes of sizes between these"
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([f"{elide_middle(label, MAX_NAME_WIDTH):{name_width}}", *padded])


def findings(meta: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing about a prepared dataset, given its meta.json, that its user should know."""
    if sizes := meta.get("sizes"):
        yield from lines_about_sizes(sizes)
    if rejects := Counter(reject["reason"] for reject in meta["rejected"]):
        yield f"unusable files: {', '.join(f'{count} {reason}' for reason, count in rejects.most_common())}"
    equal = meta["equal_images"]
    if equal["copies"]:
        two_labels, leaks = equal["two_labels"]["count"], equal["leaks"]["count"]
        yield (
            f"copies: {equal['copies']} images have the same pixels as another one, {two_labels} of them under another "
            f"label, {leaks} in another split"
        )
    if separated := len(meta["separated_groups"]):
        yield f"groups in two splits: {separated}"

"""The classes of a prepared dataset and how many images each has, as lines for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from convline.html import elide_middle

SHOWN = 20  # classes; of more, the largest and the smallest
WIDTH = 40  # characters of a name


def class_table(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """A line a class, from the counts of each split by class: {"train": {"cat": 4, …}, "test": …}."""
    splits = list(counts)
    sizes = {label: [counts[split][label] for split in splits] for label in counts[splits[0]]}
    left_out = len(sizes) - SHOWN
    shown = list(sizes)
    if left_out > 0:
        shown.sort(key=lambda label: -sum(sizes[label]))
        shown = shown[: SHOWN // 2] + shown[-SHOWN // 2 :]
    width = min(WIDTH, max(map(len, ["class", *shown])))
    widths = [max(map(len, [split, *(str(size) for size in counts[split].values())])) for split in splits]
    rows = [["class", *splits], *([label, *map(str, sizes[label])] for label in shown)]
    for number, (label, *cells) in enumerate(rows):
        if left_out > 0 and number == 1 + SHOWN // 2:
            yield f"… {left_out} classes of sizes between these"
        yield "  ".join(
            [
                f"{elide_middle(label, WIDTH):{width}}",
                *(f"{cell:>{wide}}" for cell, wide in zip(cells, widths, strict=True)),
            ]
        )

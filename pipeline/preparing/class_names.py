"""Checks class names: printable, at least two classes, the same ones in train and test, misspellings pointed out."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from convline.console import log
from convline.errors import ConvlineError

MIN_SIMILARITY = 0.75  # difflib's ratio from which two names may be one, misspelled


def check_classes(source: Path, splits: Mapping[str, Collection[str]]) -> list[str]:
    """The sorted class names, given those of each split ("train", and "test" and "validation" where there are any).

    Raises ConvlineError for an unprintable name, for fewer than two classes, for a class that train or test lacks.
    """
    names = sorted({name for labels in splits.values() for name in labels})
    for name in names:
        if not name.isprintable():
            raise ConvlineError(f"{source}: invalid class name {name!r} (not UTF-8, or unprintable); rename the folder")
    if len(splits["train"]) < 2:
        raise ConvlineError(f"{source} has only one class, {min(splits['train'])!r}; a classifier needs two or more")
    for split, other in (("train", "test"), ("test", "train"), ("validation", "train")):
        if {split, other} <= splits.keys() and (missing := sorted(set(splits[split]) - set(splits[other]))):
            similar = _most_similar(missing[0], sorted(set(splits[other]) - set(splits[split])))
            more = f" (nor are {len(missing) - 1} others)" if len(missing) > 1 else ""
            advice = "; add or remove it"
            if similar:
                advice = f", which has {similar!r}: are they one class? Then rename one; otherwise add or remove it"
            raise ConvlineError(f"{source}: class {missing[0]!r} is in {split} but not in {other}{more}{advice}")
    _log_lookalikes(names)
    return names


def _log_lookalikes(names: list[str]) -> None:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_simplified(name), []).append(name)
    for group in groups.values():
        if len(group) > 1:
            log(f"{' and '.join(map(repr, group))} look alike; they are {len(group)} separate classes")


def _most_similar(name: str, others: list[str]) -> str | None:
    """The other name that is most similar to this one; None where none is similar."""
    simplified = {_simplified(other): other for other in others}
    matches = difflib.get_close_matches(_simplified(name), simplified, n=1, cutoff=MIN_SIMILARITY)
    return simplified[matches[0]] if matches else None


def _simplified(name: str) -> str:
    """A name without what is easily overlooked: case, full-width letters, spaces, underscores and hyphens."""
    letters = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]", "", letters) or name

"""The names of classes: the same ones in every split, fit to be shown, and told apart by the eye."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from convline.console import log
from convline.errors import ConvlineError

LIKENESS = 0.75  # of two names, from where on one is asked to be the other, misspelled


def check_classes(source: Path, splits: Mapping[str, Collection[str]]) -> list[str]:
    """The sorted names of the classes, given those of each split ("train", and "test" where there is one).

    Raises ConvlineError for less than two, for a name that cannot be shown, and for a class that a split lacks.
    """
    names = sorted({name for labels in splits.values() for name in labels})
    for name in names:
        if not name.isprintable():
            raise ConvlineError(f"{source}: {name!r} is no name for a class (not UTF-8, or unprintable); rename it")
    if len(splits["train"]) < 2:
        raise ConvlineError(f"{source} has only the class {min(splits['train'])!r}; a classifier needs two or more")
    for here, there in (("train", "test"), ("test", "train")):
        if "test" in splits and (missing := sorted(set(splits[here]) - set(splits[there]))):
            near = _nearest(missing[0], sorted(set(splits[there]) - set(splits[here])))
            question = f", which has {near!r}: are they one? Then give them one name" if near else ""
            more = f" (nor are {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise ConvlineError(
                f"{source}: class {missing[0]!r} is in {here} but not in {there}{more}{question}; add or remove it"
            )
    _tell_lookalikes(names)
    return names


def _tell_lookalikes(names: list[str]) -> None:
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_plain(name), []).append(name)
    for several in alike.values():
        if len(several) > 1:
            log(f"are {' and '.join(map(repr, several))} one class? They are taken for {len(several)}")


def _nearest(name: str, others: list[str]) -> str | None:
    """The other name that is most like this one, where one is."""
    plain = {_plain(other): other for other in others}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=LIKENESS)
    return plain[near[0]] if near else None


def _plain(name: str) -> str:
    """A name without what the eye passes over: case, wide letters, what stands between words."""
    letters = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]", "", letters) or name

"""`pipeline check --report FILE.html`: a page that shows pairs side by side, doubtful labels and blank images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from convline.files import atomic_write
from convline.html import (
    Html,
    HtmlContent,
    cards,
    display_name,
    element,
    key_figures,
    muted,
    page,
    picture_tile,
    tiles,
)
from pipeline.checking.findings import Check, DoubtfulLabel, NamedImage, Pair
from pipeline.dataset import Dataset
from pipeline.preparing.image_sizes import lines_about_odd_sizes
from pipeline.reporting.image_grid import to_pil
from pipeline.reporting.source_thumbnails import source_thumbnails

SHOWN_PAIRS, SHOWN_LABELS, SHOWN_BLANK = 60, 240, 24  # of each section

Picture = Callable[[NamedImage], Image.Image]


def write_page(path: Path, dataset: Dataset, check: Check, labels_file: Path) -> None:
    """Write the page, with a section for each kind of finding. `labels_file`: see labels_table.py."""
    leaks = [pair for pair in check.pairs if pair.is_leak]
    two_labels = [pair for pair in check.pairs if pair.has_two_labels and not pair.is_leak]
    copies = [pair for pair in check.pairs if not (pair.has_two_labels or pair.is_leak)]
    doubtful = check.doubtful_labels or []
    pairs = [*leaks[:SHOWN_PAIRS], *two_labels[:SHOWN_PAIRS], *copies[:SHOWN_PAIRS]]
    shown = [image for pair in pairs for image in (pair.first, pair.second)]
    shown += [each.image for each in doubtful[:SHOWN_LABELS]] + check.blank[:SHOWN_BLANK]
    picture = _pictures(dataset, shown)
    too_good = "figures on test are too good where test shows training images"
    found: list[tuple[str, HtmlContent | None]] = [
        ("In two splits", _pair_section(leaks, picture, too_good)),
        ("Under two labels", _pair_section(two_labels, picture, "at most one of the labels is right")),
        ("Doubtful labels", _label_section(check, picture)),
        ("Copies in one split", _pair_section(copies, picture, "they count more than once")),
        ("Blank images and odd sizes", _other_section(check, picture)),
    ]
    sections = [(title, content) for title, content in found if content is not None]
    not_found = [title.lower() for title, content in found if content is None]
    has_files = dataset.paths(dataset.split("train")) is not None
    head = [_head(check, labels_file, has_files), muted(f"Nothing found: {', '.join(not_found)}.") if not_found else []]
    text = page(f"{check.dataset}: check of the dataset", head, sections)
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def _head(check: Check, labels_file: Path, has_files: bool) -> HtmlContent:
    doubtful = "not judged" if check.doubtful_labels is None else f"{len(check.doubtful_labels):,}"
    figures: list[tuple[str, HtmlContent]] = [
        ("images", f"{check.images:,}"),
        ("pairs in two splits", f"{sum(pair.is_leak for pair in check.pairs):,}"),
        ("pairs under two labels", f"{sum(pair.has_two_labels for pair in check.pairs):,}"),
        ("doubtful labels", doubtful),
        ("blank images", f"{len(check.blank):,}"),
    ]
    advice = f"{labels_file.name}, beside this page, lists every image, those found first."
    if has_files:
        advice += (
            " Correct labels there, remove the lines of images that should not be used, and prepare the dataset again: "
            f"pipeline preprocess NAME --source … --labels {labels_file.name}"
        )
    return [key_figures(figures), muted(advice)]


def _pictures(dataset: Dataset, shown: Iterable[NamedImage]) -> Picture:
    """From the files of the source where they are still there, else as stored."""
    pictures: dict[tuple[str, int], Image.Image] = {}
    by_split: dict[str, dict[int, str]] = {}
    for image in shown:
        by_split.setdefault(image.split, {})[image.row] = image.path
    for name, paths in by_split.items():
        split = dataset.split(name)
        thumbnails = source_thumbnails(dataset, split, paths)
        for row in paths:
            pictures[name, row] = thumbnails.get(row) or to_pil(split.images[row])
    return lambda image: pictures[image.split, image.row]


def _pair_section(pairs: list[Pair], picture: Picture, why: str) -> HtmlContent | None:
    if not pairs:
        return None
    shown = [
        element(
            "figure",
            element("p", "same pixels" if pair.is_equal else "near duplicates", class_="title"),
            tiles(_tile(image, picture, image.split, display_name(image.label)) for image in (pair.first, pair.second)),
            class_="card pair",
        )
        for pair in pairs[:SHOWN_PAIRS]
    ]
    count = "1 pair" if len(pairs) == 1 else f"{len(pairs):,} pairs"
    return [muted(f"{count}: {why}.{_cut(pairs, SHOWN_PAIRS)}"), cards(*shown)]


def _label_section(check: Check, picture: Picture) -> HtmlContent | None:
    if check.doubtful_labels is None:
        return muted("Labels were not judged (--quick).")
    if not check.doubtful_labels:
        return None
    explanation = (
        "A classifier that has not seen the labels of these images would give them others. The least probable labels "
        f"come first.{_cut(check.doubtful_labels, SHOWN_LABELS)}"
    )
    return [
        muted(explanation),
        tiles((_label_tile(each, picture) for each in check.doubtful_labels[:SHOWN_LABELS]), large=True),
    ]


def _label_tile(doubtful: DoubtfulLabel, picture: Picture) -> Html:
    given = [display_name(doubtful.image.label), f" {doubtful.probability:.0%}"]
    suggested = ["rather ", display_name(doubtful.suggested), f" {doubtful.suggested_probability:.0%}"]
    return _tile(doubtful.image, picture, element("span", given, class_="wrong"), suggested)


def _other_section(check: Check, picture: Picture) -> HtmlContent | None:
    blank = [_tile(image, picture, image.split, display_name(image.label)) for image in check.blank[:SHOWN_BLANK]]
    count = "1 blank image" if len(check.blank) == 1 else f"{len(check.blank):,} blank images"
    sizes = [muted(line) for line in lines_about_odd_sizes(check.odd_sizes)]
    if not (blank or sizes):
        return None
    return [[muted(f"{count}."), tiles(blank)] if blank else [], sizes]


def _tile(image: NamedImage, picture: Picture, *lines: HtmlContent) -> Html:
    return picture_tile(picture(image), image.path, *lines, display_name(image.path))


def _cut(found: Sequence[object], most: int) -> str:
    return f" The first {most} of them." if len(found) > most else ""

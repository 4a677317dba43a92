"""`--report FILE.html`: an HTML page that shows the classified images by class and by confidence, with thumbnails."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convline.files import atomic_write
from convline.html import (
    Html,
    HtmlContent,
    display_name,
    element,
    key_figures,
    linked,
    long_table,
    muted,
    page,
    table,
    tile,
    tiles,
)
from convline.inputs.input_file import InputFile
from serving.records import UNSURE, Entry, Reject
from serving.report_filters import Filters
from serving.report_images import Row, RowOfEachClass, ShownImage, absolute, link_to, random_key, thumbnail

if TYPE_CHECKING:
    from serving.summary import Summary, Tally

# 3 * 224 + 200 + 40 + 10 * 7 images of 14,000 bytes at most, with their names, stay below 15 MB
LARGEST_PAGE = 15_000_000  # bytes
IMAGES_PER_KIND = 224  # of one kind of row, all classes together; with many classes, rows are shorter or left out
UNSURE_IMAGES = 200  # all classes together
UNFAMILIAR_IMAGES = 40
IMAGES_PER_CLASS_ROW = 14  # at most
IMAGES_PER_TENTH = 7  # of the probability
MAX_REJECTS = 100  # that are listed
LONGEST_NAME = 40  # characters of a name below a thumbnail


class HtmlReport:
    """Chooses the images of a job that are worth a look while they are classified; memory does not grow with their
    number.

    A file is read again only if it is among the best so far. A random choice depends on the names of the files alone,
    so a job that was resumed ends with the same page. The page has at most LARGEST_PAGE bytes, unless names are long.
    """

    def __init__(self, path: Path, inputs: Sequence[str], model: str) -> None:
        self._path = path
        self._folder = absolute(str(path.parent))
        self._inputs = inputs
        self._model = model
        self._kinds = {
            "least confident": RowOfEachClass(
                IMAGES_PER_KIND, IMAGES_PER_CLASS_ROW, lambda entry: entry.probabilities[0]
            ),
            "most confident": RowOfEachClass(
                IMAGES_PER_KIND, IMAGES_PER_CLASS_ROW, lambda entry: -entry.probabilities[0]
            ),
            "random": RowOfEachClass(IMAGES_PER_KIND, IMAGES_PER_CLASS_ROW, random_key),
        }
        self._rows_by_confidence = [Row(IMAGES_PER_TENTH, random_key) for _ in range(10)]
        self._unsure = RowOfEachClass(UNSURE_IMAGES, UNSURE_IMAGES, random_key)
        self._unsure_counts: Counter[str] = Counter()  # by class
        self._unfamiliar = Row(UNFAMILIAR_IMAGES, lambda entry: -(entry.unfamiliar or 0))
        self._confidence_sums: defaultdict[str, float] = defaultdict(float)  # by class
        self._rejects: list[tuple[Reject, str | None]] = []  # with the link to its file

    def add(self, file: InputFile, entry: Entry) -> None:
        if isinstance(entry, Reject):
            if len(self._rejects) < MAX_REJECTS:
                self._rejects.append((entry, link_to(file, self._folder)))
            return
        label, probability = entry.labels[0], entry.probabilities[0]
        self._confidence_sums[label] += probability
        rows = [*(of_class[label] for of_class in self._kinds.values()), self._rows_by_confidence[_tenth(probability)]]
        if entry.decision == UNSURE:
            self._unsure_counts[label] += 1
            rows.append(self._unsure[label])
        if entry.is_unfamiliar:
            rows.append(self._unfamiliar)
        if accepting := [row for row in rows if row.accepts(entry)]:
            image = ShownImage(entry, thumbnail(file), link_to(file, self._folder))
            for row in accepting:
                row.add(image)

    def finish(self, summary: Summary) -> None:
        """Write the page; it appears complete or not at all."""
        with atomic_write(self._path, "w", encoding="utf-8") as file:
            file.write(self._page(summary))

    def _page(self, summary: Summary) -> str:
        tally = summary.tally
        labels = [label for label, _ in tally.labels.most_common(IMAGES_PER_KIND)]
        unsure = [label for label, _ in self._unsure_counts.most_common(UNSURE_IMAGES)]
        filters = Filters(list({*labels, *unsure}), tally.unsure is not None)
        sections: list[tuple[str, HtmlContent]] = []
        if tally.classified:
            sections += [
                ("Classes", self._classes(tally)),
                *([("Unsure", self._unsure_images(unsure, filters))] if unsure else []),
                *([("Unfamiliar", self._unfamiliar_images(tally.unfamiliar, filters))] if tally.unfamiliar else []),
                ("By confidence", self._by_confidence(filters)),
                ("By class", self._by_class(labels, tally, filters)),
            ]
        if tally.rejected:
            sections.append(("Rejected", self._rejected(tally)))
        inputs = [[", " if number else "", display_name(path)] for number, path in enumerate(self._inputs)]
        head = [
            element("p", "Images of ", inputs, ", classified by ", display_name(self._model), "."),
            key_figures(_facts(summary)),
        ]
        return page("Classified images", head, sections, toolbar=filters.toolbar(), style=filters.style())

    def _classes(self, tally: Tally) -> Html:
        def row(label: str, images: int) -> list[HtmlContent]:
            share = images / tally.classified
            bar = element("meter", min=0, max=1, value=f"{share:.4f}", aria_label=f"{share:.1%}")
            unsure = [f"{self._unsure_counts[label]:,}"] if tally.unsure is not None else []
            confidence = f"{self._confidence_sums[label] / images:.3f}"
            return [display_name(label), f"{images:,}", *unsure, [bar, f" {share:.1%}"], confidence]

        header = ("class", "images", *(["unsure"] if tally.unsure is not None else []), "share", "mean confidence")
        rows = [row(label, images) for label, images in tally.labels.most_common()]
        return long_table(header, rows, "Images of each class", "classes")

    def _unsure_images(self, labels: Sequence[str], filters: Filters) -> HtmlContent:
        def group(label: str) -> Html:
            row, count = self._unsure[label], self._unsure_counts[label]
            shown = f"{count:,} images" if len(row) == count else f"{len(row):,} of {count:,} images"
            return _group(row, filters, element("h3", display_name(label), f": {shown}"))

        text = "Images whose most probable class is less probable than the threshold, by that class."
        if omitted := len(self._unsure_counts) - len(labels):
            text += f" The {omitted:,} rarest classes are left out."
        return [muted(text), element("div", map(group, labels), class_="side-by-side")]

    def _unfamiliar_images(self, count: int, filters: Filters) -> HtmlContent:
        row = self._unfamiliar
        shown = f"{count:,}" if len(row) == count else f"{len(row):,} of {count:,}"
        text = "images further away from the training images than 99 of 100 validation images, the furthest first."
        return _group(row, filters, muted(f"{shown} {text}"))

    def _by_confidence(self, filters: Filters) -> HtmlContent:
        text = f"Up to {IMAGES_PER_TENTH} random images for each tenth of the probability."
        rows = [
            _group(row, filters, element("h3", f"{10 * tenth} to {10 * tenth + 10}%"))
            for tenth, row in enumerate(self._rows_by_confidence)
            if row
        ]
        return [muted(text), rows]

    def _by_class(self, labels: Sequence[str], tally: Tally, filters: Filters) -> HtmlContent:
        longest = self._kinds["random"].row_length
        each = f"{longest} images" if longest > 1 else "1 image"
        text = f"A sample of each class, up to {each} of each kind."
        if omitted := len(tally.labels) - len(labels):
            text += f" The {omitted:,} rarest classes are left out."
        groups = [self._class_group(label, tally.labels[label], longest, filters) for label in labels]
        return [muted(text), element("div", groups, class_="side-by-side")]

    def _class_group(self, label: str, images: int, longest: int, filters: Filters) -> Html:
        rows = {title: of_class[label] for title, of_class in self._kinds.items()}
        if images <= longest:  # then all rows have the same images
            rows = {"least confident first": rows["least confident"]}
        groups = [_group(row, filters, muted(title)) for title, row in rows.items()]
        entries = [image.entry for row in rows.values() for image in row]
        title = element("h3", display_name(label), f": {images:,} images")
        css_classes = " ".join(["group", *filters.css_classes(entries)])
        return element("div", title, element("div", groups, class_="side-by-side"), class_=css_classes)

    def _rejected(self, tally: Tally) -> HtmlContent:
        counts = [(reason, f"{files:,}") for reason, files in tally.reasons.most_common()]
        rows = [
            (linked(display_name(reject.path), link), reject.reason, display_name(reject.detail))
            for reject, link in self._rejects
        ]
        is_all = len(rows) == tally.rejected
        return [
            table(("reason", "files"), counts, "Reasons"),
            muted("All rejected files:" if is_all else f"The first {len(rows)} of {tally.rejected:,} rejected files:"),
            table(("file", "reason", "detail"), rows, "Rejected files"),
        ]


def _facts(summary: Summary) -> list[tuple[str, HtmlContent]]:
    tally = summary.tally
    facts: list[tuple[str, HtmlContent]] = [
        ("files found", f"{tally.found:,}"),
        ("classified", f"{tally.classified:,}"),
        ("rejected", f"{tally.rejected:,}"),
        *([("unsure", f"{tally.unsure:,}")] if tally.unsure is not None else []),
        *([("unfamiliar", f"{tally.unfamiliar:,}")] if tally.unfamiliar is not None else []),
    ]
    if summary.images_per_second:
        facts.append(("images/s", f"{summary.images_per_second:,.0f} on {summary.provider}"))
    return facts


def _tenth(probability: float) -> int:
    """0 to 9, also for the scores of external models, which may lie outside 0 to 1."""
    return max(0, min(9, int(10 * probability)))


def _group(row: Row, filters: Filters, title: Html) -> Html:
    """A row of images below its title."""
    images = list(row)
    css_classes = " ".join(["group", *filters.css_classes(image.entry for image in images)])
    members = tiles((_image_tile(image, filters) for image in images), large=True)
    return element("div", title, members, class_=css_classes)


def _image_tile(image: ShownImage, filters: Filters) -> Html:
    entry = image.entry
    label, percent = entry.labels[0], f"{entry.probabilities[0]:.1%}"
    is_photograph = image.thumbnail.startswith("data:image/jpeg")
    lines = [display_name(label, LONGEST_NAME), f" {percent}"], display_name(entry.path, LONGEST_NAME)
    alt = f"{label}, {percent}: {entry.path}"
    css_classes = filters.css_classes([entry])
    return tile(image.thumbnail, alt, *lines, smooth=is_photograph, link=image.link, classes=css_classes)

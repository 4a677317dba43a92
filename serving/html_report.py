"""`--report FILE.html`: an HTML page that shows the classified images by class and by confidence, with thumbnails."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from PIL import Image

from convline.errors import ImageError
from convline.files import atomic_write
from convline.html import (
    Html,
    HtmlContent,
    data_uri,
    display_name,
    element,
    key_figures,
    muted,
    page,
    table,
    tile,
    tiles,
)
from convline.images import ImageSpec, decode
from convline.inputs.input_file import InputFile
from serving.records import UNSURE, Entry, Prediction, Reject

if TYPE_CHECKING:
    from serving.summary import Summary, Tally

THUMBNAIL_SIDE = 96  # pixels, at most
SMALL_FILE = 2**15  # bytes; of a larger file only the centre is decoded
IMAGES_PER_ROW = 8  # at most
IMAGES_PER_KIND = 240  # of one kind of row, all classes together; with many classes, rows are shorter or left out
UNSURE_IMAGES = 3 * IMAGES_PER_ROW  # at most
MAX_REJECTS = 100  # that are listed
LONGEST_NAME = 40  # characters of a name below a thumbnail


class HtmlReport:
    """Chooses the images of a job that are worth a look while they are classified; memory does not grow with their
    number.

    A file is read again only if it is among the best so far. A random choice depends on the names of the files alone,
    so a job that was resumed ends with the same page.
    """

    def __init__(self, path: Path, inputs: Sequence[str], model: str) -> None:
        self._path = path
        self._inputs = inputs
        self._model = model
        self._rows_of_class: dict[str, dict[str, _BestEntries]] = {}
        self._rows_by_confidence = [_BestEntries(IMAGES_PER_ROW, _random_key) for _ in range(10)]
        self._unsure = _BestEntries(UNSURE_IMAGES, _random_key)
        self._confidence_sums: dict[str, float] = {}  # by class
        self._rejects: list[Reject] = []

    def add(self, file: InputFile, entry: Entry) -> None:
        if isinstance(entry, Reject):
            if len(self._rejects) < MAX_REJECTS:
                self._rejects.append(entry)
            return
        label, probability = entry.labels[0], entry.probabilities[0]
        if label not in self._rows_of_class:
            self._add_class(label)
        self._confidence_sums[label] += probability
        thumbnail = ""
        rows = [*self._rows_of_class[label].values(), self._rows_by_confidence[_tenth(probability)]]
        rows += [self._unsure] if entry.decision == UNSURE else []
        for row in rows:
            if row.accepts(entry):
                thumbnail = thumbnail or _thumbnail(file)
                row.add(entry, thumbnail)

    def _add_class(self, label: str) -> None:
        self._confidence_sums[label] = 0.0
        self._rows_of_class[label] = {
            "least confident": _BestEntries(IMAGES_PER_ROW, lambda entry: entry.probabilities[0]),
            "most confident": _BestEntries(IMAGES_PER_ROW, lambda entry: -entry.probabilities[0]),
            "random": _BestEntries(IMAGES_PER_ROW, _random_key),
        }
        for rows in self._rows_of_class.values():
            for row in rows.values():
                row.shrink(self._row_length)

    @property
    def _row_length(self) -> int:
        return min(IMAGES_PER_ROW, max(1, IMAGES_PER_KIND // len(self._rows_of_class)))

    def finish(self, summary: Summary) -> None:
        """Write the page; it appears complete or not at all."""
        with atomic_write(self._path, "w", encoding="utf-8") as file:
            file.write(self._page(summary))

    def _page(self, summary: Summary) -> str:
        tally = summary.tally
        facts: list[tuple[str, HtmlContent]] = [
            ("files found", f"{tally.found:,}"),
            ("classified", f"{tally.classified:,}"),
            ("rejected", f"{tally.rejected:,}"),
            *([("unsure", f"{tally.unsure:,}")] if tally.unsure is not None else []),
        ]
        if summary.images_per_second:
            facts.append(("images/s", f"{summary.images_per_second:,.0f} on {summary.provider}"))
        sections: list[tuple[str, HtmlContent]] = []
        if tally.classified:
            sections += [
                ("Classes", self._classes(tally)),
                *([("Unsure", self._unsure_images(tally.unsure))] if tally.unsure else []),
                ("By confidence", self._by_confidence()),
                ("By class", self._by_class(tally)),
            ]
        if tally.rejected:
            sections.append(("Rejected", self._rejected(tally)))
        inputs = [[", " if number else "", display_name(path)] for number, path in enumerate(self._inputs)]
        head = [
            element("p", "Images of ", inputs, ", classified by ", display_name(self._model), "."),
            key_figures(facts),
        ]
        return page("Classified images", head, sections)

    def _classes(self, tally: Tally) -> Html:
        def row(label: str, images: int) -> list[HtmlContent]:
            share = images / tally.classified
            bar = element("meter", min=0, max=1, value=f"{share:.4f}", aria_label=f"{share:.1%}")
            confidence = self._confidence_sums[label] / images
            return [display_name(label), f"{images:,}", [bar, f" {share:.1%}"], f"{confidence:.3f}"]

        rows = [row(label, images) for label, images in tally.labels.most_common()]
        return table(("class", "images", "share", "mean confidence"), rows, "Images of each class")

    def _unsure_images(self, count: int) -> HtmlContent:
        shown = f"{len(self._unsure)} of {count:,}" if len(self._unsure) < count else f"{count:,}"
        text = f"{shown} images, whose most probable class is less probable than the threshold."
        return [muted(text), self._unsure.to_html()]

    def _by_confidence(self) -> HtmlContent:
        text = f"Up to {IMAGES_PER_ROW} random images for each tenth of the probability; of large images the centre."
        rows = [
            [element("h3", f"{10 * tenth} to {10 * tenth + 10}%"), row.to_html()]
            for tenth, row in enumerate(self._rows_by_confidence)
            if row
        ]
        return [muted(text), rows]

    def _by_class(self, tally: Tally) -> HtmlContent:
        labels = [label for label, _ in tally.labels.most_common(IMAGES_PER_KIND)]
        text = f"A sample of each class, up to {self._row_length} images a row."
        if omitted := len(tally.labels) - len(labels):
            text += f" The {omitted:,} rarest classes are left out."
        return [muted(text), [self._class_section(label, tally.labels[label]) for label in labels]]

    def _class_section(self, label: str, images: int) -> HtmlContent:
        titled_rows = self._rows_of_class[label].items()
        rows = [[element("p", title, class_="muted"), row.to_html()] for title, row in titled_rows]
        fits_one_row = images <= self._row_length  # then all rows have the same images
        return [element("h3", display_name(label), f": {images:,} images"), rows[:1] if fits_one_row else rows]

    def _rejected(self, tally: Tally) -> HtmlContent:
        counts = [(reason, f"{files:,}") for reason, files in tally.reasons.most_common()]
        rows = [(display_name(reject.path), reject.reason, display_name(reject.detail)) for reject in self._rejects]
        is_all = len(rows) == tally.rejected
        return [
            table(("reason", "files"), counts, "Reasons"),
            muted("All rejected files:" if is_all else f"The first {len(rows)} of {tally.rejected:,} rejected files:"),
            table(("file", "reason", "detail"), rows, "Rejected files"),
        ]


def _thumbnail(file: InputFile) -> str:
    """The image as a data URI; a grey square if the file can no longer be read."""
    side = THUMBNAIL_SIDE
    try:
        data = file.read()
        spec = ImageSpec(None, None, 3) if len(data) < SMALL_FILE else ImageSpec(side, side, 3, jpeg="reduced")
        image = Image.fromarray(decode(data, spec))
        image.thumbnail((side, side))
    except ImageError:
        image = Image.new("RGB", (32, 32), "grey")
    return data_uri(image)


def _tenth(probability: float) -> int:
    """0 to 9, also for the scores of external models, which may lie outside 0 to 1."""
    return max(0, min(9, int(10 * probability)))


def _random_key(entry: Prediction) -> float:
    return crc32(entry.path.encode("utf-8", "surrogateescape"))


class _BestEntries:
    """A row of the page: the `size` entries with the smallest keys, with their thumbnails."""

    def __init__(self, size: int, key: Callable[[Prediction], float]) -> None:
        self._size = size
        self._key = key
        self._heap: list[tuple[float, int, Prediction, str]] = []  # the largest key first
        self._added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def accepts(self, entry: Prediction) -> bool:
        return len(self) < self._size or -self._key(entry) > self._heap[0][0]

    def add(self, entry: Prediction, thumbnail: str) -> None:
        self._added += 1
        heapq.heappush(
            self._heap, (-self._key(entry), -self._added, entry, thumbnail)
        )  # of equal keys, the first stays
        self.shrink(self._size)

    def shrink(self, size: int) -> None:
        self._size = size
        while len(self) > size:
            heapq.heappop(self._heap)

    def to_html(self) -> Html:
        return tiles(_entry_tile(entry, thumbnail) for *_, entry, thumbnail in sorted(self._heap, reverse=True))


def _entry_tile(entry: Prediction, thumbnail: str) -> Html:
    label, percent = entry.labels[0], f"{entry.probabilities[0]:.1%}"
    is_photograph = thumbnail.startswith("data:image/jpeg")
    lines = [display_name(label, LONGEST_NAME), f" {percent}"], display_name(entry.path, LONGEST_NAME)
    return tile(thumbnail, f"{label}, {percent}: {entry.path}", *lines, smooth=is_photograph)

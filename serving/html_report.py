"""`--report FILE.html`: what became of a folder, to look at: by class and by confidence, with thumbnails."""

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
from serving.records import Entry, Prediction, Reject

if TYPE_CHECKING:
    from serving.summary import Summary, Tally

SIDE = 96  # pixels of a thumbnail, at most
SMALL = 2**15  # bytes of a file that is decoded whole
EACH = 8  # images in a row, at most
IMAGES = 240  # in the rows of one kind over all classes: with many classes each has fewer, and the rarest none
REJECTS = 100  # that are named
LONGEST = 40  # characters of a name below a thumbnail


class HtmlReport:
    """The images of a job that are worth a look, chosen as they come: memory does not grow with their number.

    A file is read again only when it is among those that are kept so far. Which ones are drawn at random depends on
    their names alone, so a job that was stopped and resumed ends with the same.
    """

    def __init__(self, path: Path, inputs: Sequence[str], model: str) -> None:
        self._path = path
        self._inputs = inputs
        self._model = model
        self._of_classes: dict[str, dict[str, _BestEntries]] = {}
        self._of_tenths = [_BestEntries(EACH, _at_random) for _ in range(10)]
        self._confidence: dict[str, float] = {}  # summed, by class
        self._rejects: list[Reject] = []

    def add(self, file: InputFile, entry: Entry) -> None:
        if isinstance(entry, Reject):
            if len(self._rejects) < REJECTS:
                self._rejects.append(entry)
            return
        label, probability = entry.labels[0], entry.probabilities[0]
        if label not in self._of_classes:
            self._begin(label)
        self._confidence[label] += probability
        picture = ""
        for best in (*self._of_classes[label].values(), self._of_tenths[_tenth(probability)]):
            if best.wants(entry):
                picture = picture or _thumbnail(file)
                best.put(entry, picture)

    def _begin(self, label: str) -> None:
        self._confidence[label] = 0.0
        self._of_classes[label] = {
            "least confident": _BestEntries(EACH, lambda entry: entry.probabilities[0]),
            "most confident": _BestEntries(EACH, lambda entry: -entry.probabilities[0]),
            "drawn at random": _BestEntries(EACH, _at_random),
        }
        for bests in self._of_classes.values():
            for best in bests.values():
                best.shrink(self._each)

    @property
    def _each(self) -> int:
        return min(EACH, max(1, IMAGES // len(self._of_classes)))

    def finish(self, summary: Summary) -> None:
        """Write the page, whole or not at all."""
        with atomic_write(self._path, "w", encoding="utf-8") as file:
            file.write(self._page(summary))

    def _page(self, summary: Summary) -> str:
        tally = summary.tally
        facts: list[tuple[str, HtmlContent]] = [
            ("files found", f"{tally.found:,}"),
            ("classified", f"{tally.classified:,}"),
            ("rejected", f"{tally.rejected:,}"),
        ]
        if summary.seconds:
            facts.append(("images/s", f"{summary.images_per_second:,.0f} on {summary.provider}"))
        sections: list[tuple[str, HtmlContent]] = []
        if tally.classified:
            sections += [
                ("Classes", self._classes(tally)),
                ("By confidence", self._by_confidence()),
                ("By class", self._by_class(tally)),
            ]
        if tally.rejected:
            sections.append(("Rejected", self._rejected(tally)))
        inputs = [[", " if number else "", display_name(one)] for number, one in enumerate(self._inputs)]
        head = [
            element("p", "Those of ", inputs, ", classified by ", display_name(self._model), "."),
            key_figures(facts),
        ]
        return page("What the images show", head, sections)

    def _classes(self, tally: Tally) -> Html:
        def row(label: str, images: int) -> list[HtmlContent]:
            share = images / tally.classified
            bar = element("meter", min=0, max=1, value=f"{share:.4f}", aria_label=f"{share:.1%}")
            return [
                display_name(label),
                f"{images:,}",
                [bar, f" {share:.1%}"],
                f"{self._confidence[label] / images:.3f}",
            ]

        rows = [row(label, images) for label, images in tally.labels.most_common()]
        return table(("class", "images", "share", "mean confidence"), rows, "Images of each class")

    def _by_confidence(self) -> HtmlContent:
        told = f"Of each tenth of the probability up to {EACH} images, drawn at random; of large files the middle."
        rows = [
            [element("h3", f"{10 * tenth} to {10 * tenth + 10}%"), best.drawn()]
            for tenth, best in enumerate(self._of_tenths)
            if best
        ]
        return [muted(told), rows]

    def _by_class(self, tally: Tally) -> HtmlContent:
        shown = [label for label, _ in tally.labels.most_common(IMAGES)]
        told = f"A sample: of each class up to {self._each} images a row."
        if left := len(tally.labels) - len(shown):
            told += f" The {left:,} rarest classes are left out."
        return [muted(told), [self._of_class(label, tally.labels[label]) for label in shown]]

    def _of_class(self, label: str, images: int) -> HtmlContent:
        bests = self._of_classes[label].items()
        rows = [[element("p", title, class_="muted"), best.drawn()] for title, best in bests]
        is_whole = images <= self._each  # then all rows hold the same
        return [element("h3", display_name(label), f": {images:,} images"), rows[:1] if is_whole else rows]

    def _rejected(self, tally: Tally) -> HtmlContent:
        counts = [(reason, f"{files:,}") for reason, files in tally.reasons.most_common()]
        rows = [(display_name(one.path), one.reason, display_name(one.detail)) for one in self._rejects]
        told = f"The first {len(rows)} of {tally.rejected:,}:" if len(rows) < tally.rejected else "All of them:"
        return [
            table(("reason", "files"), counts, "Reasons"),
            muted(told),
            table(("file", "reason", "detail"), rows, "Rejected files"),
        ]


def _thumbnail(file: InputFile) -> str:
    """The image as an address; grey where it has gone meanwhile."""
    try:
        data = file.read()
        spec = ImageSpec(None, None, 3) if len(data) < SMALL else ImageSpec(SIDE, SIDE, 3, jpeg="reduced")
        image = Image.fromarray(decode(data, spec))
        image.thumbnail((SIDE, SIDE))
    except ImageError:
        image = Image.new("RGB", (32, 32), "grey")
    return data_uri(image)


def _tenth(probability: float) -> int:
    """Models made elsewhere may tell scores that are no probabilities."""
    return max(0, min(9, int(10 * probability)))


def _at_random(entry: Prediction) -> float:
    return crc32(entry.path.encode("utf-8", "surrogateescape"))


class _BestEntries:
    """The `size` entries with the smallest keys, with their pictures."""

    def __init__(self, size: int, key: Callable[[Prediction], float]) -> None:
        self._size = size
        self._key = key
        self._kept: list[tuple[float, int, Prediction, str]] = []  # a heap, the largest key first
        self._put = 0

    def __len__(self) -> int:
        return len(self._kept)

    def wants(self, entry: Prediction) -> bool:
        return len(self) < self._size or -self._key(entry) > self._kept[0][0]

    def put(self, entry: Prediction, picture: str) -> None:
        self._put += 1
        heapq.heappush(self._kept, (-self._key(entry), -self._put, entry, picture))  # of equal ones the earlier stays
        self.shrink(self._size)

    def shrink(self, size: int) -> None:
        self._size = size
        while len(self) > size:
            heapq.heappop(self._kept)

    def drawn(self) -> Html:
        return tiles(_drawn(entry, picture) for *_, entry, picture in sorted(self._kept, reverse=True))


def _drawn(entry: Prediction, picture: str) -> Html:
    label, percent = entry.labels[0], f"{entry.probabilities[0]:.1%}"
    is_photograph = picture.startswith("data:image/jpeg")
    told = [display_name(label, LONGEST), f" {percent}"], display_name(entry.path, LONGEST)
    return tile(picture, f"{label}, {percent}: {entry.path}", *told, smooth=is_photograph)

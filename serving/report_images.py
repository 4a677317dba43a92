"""The images that the page of `--report` shows: which ones, their thumbnails, and links to their files."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from zlib import crc32

from PIL import Image

from convline.errors import ImageError
from convline.html import data_uri
from convline.images import ImageSpec, contained_size, decode, decode_with_size
from convline.inputs.input_file import InputFile, OnDisk
from convline.inputs.remote_files import RemoteFile
from serving.records import Prediction

THUMBNAIL_SIDE = 160  # pixels, at most
LARGEST_THUMBNAIL = 14_000  # bytes of its URI; photographs take 6,000 to 12,000
QUALITIES = (82, 65, 45, 25, 10)  # of JPEG, the first one that makes the thumbnail small enough
URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"  # those of a URL that must stay as they are

Key = Callable[[Prediction], float]


@dataclass(frozen=True)
class ShownImage:
    """An image of the page; `thumbnail` is a data URI, `link` the URL of its file, where there is one."""

    entry: Prediction
    thumbnail: str
    link: str | None


class Row:
    """A row of the page: the `size` images with the smallest keys."""

    def __init__(self, size: int, key: Key) -> None:
        self._size = size
        self._key = key
        self._heap: list[tuple[float, int, ShownImage]] = []  # the largest key first
        self._added = 0

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[ShownImage]:
        """The image with the smallest key first."""
        return (image for *_, image in sorted(self._heap, reverse=True))

    def accepts(self, entry: Prediction) -> bool:
        return len(self) < self._size or -self._key(entry) > self._heap[0][0]

    def add(self, image: ShownImage) -> None:
        self._added += 1  # of equal keys, the first stays
        heapq.heappush(self._heap, (-self._key(image.entry), -self._added, image))
        self.shrink(self._size)

    def shrink(self, size: int) -> None:
        self._size = size
        while len(self) > size:
            heapq.heappop(self._heap)


class RowOfEachClass:
    """A row of at most `longest` images for each class. With many classes rows are shorter, so that those of the first
    `budget` classes together have at most `budget` images."""

    def __init__(self, budget: int, longest: int, key: Key) -> None:
        self._budget = budget
        self._longest = longest
        self._key = key
        self._rows: dict[str, Row] = {}

    def __getitem__(self, label: str) -> Row:
        """The row of a class; a new one if there is none."""
        if label not in self._rows:
            self._rows[label] = Row(self._longest, self._key)
            for row in self._rows.values():
                row.shrink(self.row_length)
        return self._rows[label]

    @property
    def row_length(self) -> int:
        return min(self._longest, max(1, self._budget // max(1, len(self._rows))))


def random_key(entry: Prediction) -> float:
    """For a random choice that depends on the names of the files alone."""
    return crc32(entry.path.encode("utf-8", "surrogateescape"))


def thumbnail(file: InputFile) -> str:
    """The whole image as a data URI of at most LARGEST_THUMBNAIL bytes; a grey square if the file can no longer be
    read."""
    try:
        image = _reduced(file.read())
    except ImageError:
        image = Image.new("RGB", (32, 32), "grey")
    uris = (data_uri(image, quality=quality) for quality in QUALITIES)
    return next((uri for uri in uris if len(uri) <= LARGEST_THUMBNAIL), "") or data_uri(image, quality=QUALITIES[-1])


def _reduced(data: bytes) -> Image.Image:
    """The image, reduced to THUMBNAIL_SIDE if it is larger. Raises ImageError."""
    side = THUMBNAIL_SIDE
    spec = ImageSpec(side, side, 3, fit="pad", jpeg="reduced")
    padded, (height, width) = decode_with_size(data, spec)
    if max(height, width) <= side:
        return Image.fromarray(decode(data, ImageSpec(None, None, 3)))
    width, height = contained_size((width, height), (side, side))
    left, top = round((side - width) / 2), round((side - height) / 2)  # as decode pads
    return Image.fromarray(padded).crop((left, top, left + width, top + height))


def link_to(file: InputFile, folder: str) -> str | None:
    """The URL of a file for a page in `folder`, an absolute path.

    Relative for files on disk, so that it holds on a file server, too. None for members of archives, for files that are
    gone, for names that are not UTF-8 and for URLs that browsers do not open (s3://…).
    """
    location = file.location
    try:
        if isinstance(location, RemoteFile):
            is_for_browsers = location.url.lower().startswith(("http://", "https://"))
            return quote(location.url, URL_CHARACTERS) if is_for_browsers else None
        if not isinstance(location, OnDisk) or location.size is not None:
            return None
        if not os.path.isfile(location.file):  # noqa: PTH113  # Path.is_file raises PermissionError
            return None
        return quote(os.path.relpath(absolute(location.file), folder).replace(os.sep, "/"))
    except ValueError:  # a name that is not UTF-8, or, on Windows, another drive
        return None


def absolute(path: str) -> str:
    """The absolute path, with links as the user wrote them: a file server may follow them but not leave its folder."""
    # below a link, ".." is not the folder before it
    return os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)

"""HTML pages, read back by the standard library's parser, which takes nothing of what wrote them."""

from __future__ import annotations

from collections.abc import Collection
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

VOID = {"meta", "img", "br", "hr", "input", "link", "wbr"}


class Page(HTMLParser):
    """What stands in a page: `tags` with their attributes, `text` outside of the style sheet, by element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self._is_continued = False  # the next text goes on where the last one may wrap
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, f"{self._open} are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_continued = tag == "wbr"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            before = self.text.pop()[1] if self._is_continued else ""
            self.text.append((self._open[-1], before + data))
            self._is_continued = False

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for name, text in self.text if name == tag]


def check(path: Path, urls: Collection[str] = ()) -> Page:
    """A page that opens from disk: well formed, nothing fetched, nothing run, every image with words. It links to its
    own sections, to files that exist, by relative URLs, and to `urls`."""
    page = Page(path)
    assert page.all("html")[0]["lang"] == "en" and len(page.texts("title")) >= 1
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "link", "base", "form"), tag
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "xlink:href", *(["href"] if tag != "a" else [])):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
    assert all(attributes.get("alt") for attributes in page.all("img"))
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))
    anchors = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    for link in links(page):
        assert link[1:] in anchors if link.startswith("#") else link in urls or linked_file(path, link).is_file(), link
    return page


def links(page: Page) -> list[str]:
    return [link["href"] or "" for link in page.all("a")]


def linked_file(page: Path, link: str) -> Path:
    """The file that a browser opens for a relative URL in a page on disk."""
    assert urlsplit(link).path == link and not link.startswith("/"), link
    return page.parent / unquote(link, errors="strict")

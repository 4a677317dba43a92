"""Builds self-contained HTML pages for reports: elements, tables, cards, image tiles. Plain strings are escaped."""

from __future__ import annotations

import html
import re
import unicodedata
from base64 import b64encode
from collections.abc import Iterable, Sequence
from importlib.resources import files
from io import BytesIO

from PIL import Image

BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # bidirectional classes of Unicode
MAX_NAME = 120  # characters that are shown of a file's or a class's name
MAX_TEXT = 1000  # characters that are shown of any other text
LISTED_ROWS = 20  # of a long table


class Html(str):
    """A string that is HTML already, so it is not escaped."""

    __slots__ = ()


HtmlContent = str | Iterable["HtmlContent"]

VOID_ELEMENTS = {"img", "meta"}  # elements without an end tag


def element(tag: str, *content: HtmlContent, **attributes: str | int) -> Html:
    """`<tag attributes>content</tag>`. Write the attribute class as `class_` and aria-label as `aria_label`."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    written = "".join(f' {names[name]}="{html.escape(str(value))}"' for name, value in attributes.items())
    return Html(f"<{tag}{written}>" if tag in VOID_ELEMENTS else f"<{tag}{written}>{to_html(content)}</{tag}>")


def to_html(content: HtmlContent) -> Html:
    """Escape strings that are not HTML; join the items of an iterable."""
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(content))
    return Html("".join(map(to_html, content)))


def display_name(text: str, max_length: int = MAX_NAME) -> Html:
    """The name of a file or a class, which may be any text: elided if it is long, with the full name as a tooltip.

    `<bdi>` keeps a right-to-left name from reordering the text around it; a long path wraps behind its slashes.
    """
    full = printable(text)
    shown = elide_middle(full, max_length)
    breakable = Html(re.sub(r"[/\\_](?=.)", r"\g<0><wbr>", to_html(shown)))
    return element("bdi", breakable, **({"title": full} if shown != full else {}))


def elide_middle(text: str, max_length: int) -> str:
    """Replace the middle of a long text by "…": the end of a path says most about it."""
    begin = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[:begin]}…{text[begin + 1 - max_length :]}"


def printable(text: str) -> str:
    """Replace characters that HTML cannot hold (surrogates) or that would mislead the reader.

    Surrogates come from names that are not UTF-8; control characters include those that change the text direction.
    """
    characters = ("\N{REPLACEMENT CHARACTER}" if _is_unprintable(character) else character for character in text)
    return elide_middle("".join(characters), MAX_TEXT)


def _is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in BIDI_CONTROLS


def section(title: str, *content: HtmlContent) -> Html:
    return element("section", element("h2", title), *content, id=_anchor(title), aria_label=title)


def table(header: Sequence[HtmlContent], rows: Iterable[Sequence[HtmlContent]], label: str) -> Html:
    """A table whose first column holds row headers; it scrolls horizontally if it is wider than the page."""
    cells = [list(row) for row in rows]
    head = [
        _cell("th", title, value, scope="col")
        for title, value in zip(header, cells[0] if cells else header, strict=True)
    ]
    body = [[element("th", first, scope="row"), *(_cell("td", cell, cell) for cell in rest)] for first, *rest in cells]
    whole = element(
        "table", element("thead", element("tr", head)), element("tbody", [element("tr", row) for row in body])
    )
    return element("div", whole, class_="scroll", role="region", aria_label=label, tabindex=0)


def long_table(header: Sequence[HtmlContent], rows: Sequence[Sequence[HtmlContent]], label: str, things: str) -> Html:
    """A table whose rows after the first LISTED_ROWS are folded up; `things` are what the rows are, as in "classes"."""
    if len(rows) <= LISTED_ROWS:
        return table(header, rows, label)
    folded = element("summary", f"The other {len(rows) - LISTED_ROWS:,} {things}")
    others = table(header, rows[LISTED_ROWS:], f"{label}, continued")
    return to_html([table(header, rows[:LISTED_ROWS], label), element("details", folded, others)])


def _cell(tag: str, content: HtmlContent, value: HtmlContent, **attributes: str) -> Html:
    """A cell of the column that `value` is in: names (HTML) are aligned left and wrap, numbers are not."""
    return element(tag, content, **attributes, **({"class_": "text"} if isinstance(value, Html) else {}))


def key_value_table(pairs: Iterable[tuple[str, HtmlContent]], label: str) -> Html:
    """A table of two columns: keys, and their values."""
    rows = [element("tr", element("th", key, scope="row"), element("td", value, class_="text")) for key, value in pairs]
    return element("table", element("tbody", rows), aria_label=label, class_="wide-text")


def key_figures(pairs: Iterable[tuple[str, HtmlContent]]) -> Html:
    """The few most important figures, large, each with its label."""
    return element(
        "dl", [element("div", element("dt", label), element("dd", figure)) for label, figure in pairs], class_="figures"
    )


def card(title: HtmlContent, picture: HtmlContent, caption: HtmlContent = "", wide: bool = False) -> Html:
    """A picture with a title and a caption."""
    figcaption = [element("figcaption", caption)] if caption else []
    return element(
        "figure", element("p", title, class_="title"), picture, figcaption, class_="card wide" if wide else "card"
    )


def cards(*members: Html) -> Html:
    """Cards of equal width side by side."""
    return element("div", members, class_="cards")


def table_cards(*members: Html) -> Html:
    """Cards side by side, each as wide as the table in it."""
    return element("div", members, class_="cards tables")


def muted(content: HtmlContent) -> Html:
    """A paragraph of less important text, in grey."""
    return element("p", content, class_="muted")


def tile(
    source: str,
    alt: str,
    *lines: HtmlContent,
    smooth: bool = False,
    link: str | None = None,
    classes: Iterable[str] = (),
) -> Html:
    """A small image with a few lines below; `source` is its URI, as from `data_uri`. The image leads to the URL `link`.
    `classes` are further CSS classes."""
    image = linked(element("img", src=source, alt=printable(alt)), link)
    caption = element("figcaption", [element("span", line) for line in lines]) if lines else ""
    return element("figure", image, caption, class_=" ".join(["tile", *(["smooth"] if smooth else []), *classes]))


def linked(content: Html, link: str | None) -> Html:
    """The content as a link to the URL, where there is one."""
    return content if link is None else element("a", content, href=link)


def picture_tile(picture: Image.Image, alt: str, *lines: HtmlContent) -> Html:
    """A tile of a picture; small ones are enlarged without smoothing."""
    return tile(data_uri(picture), alt, *lines, smooth=max(picture.size) > 64)


def tiles(members: Iterable[Html], large: bool = False) -> Html:
    return element("div", members, class_="tiles large" if large else "tiles")


def data_uri(image: Image.Image, lossless: bool = False, quality: int = 82) -> str:
    """The image as a `data:` URI: JPEG, or PNG if `lossless` or at most 64 pixels wide and high."""
    buffer = BytesIO()
    format = "png" if lossless or max(image.size) <= 64 else "jpeg"
    image.save(buffer, format, quality=quality)
    return f"data:image/{format};base64,{b64encode(buffer.getvalue()).decode()}"


def page(
    title: str,
    head: HtmlContent,
    sections: Sequence[tuple[str, HtmlContent]],
    *,
    toolbar: HtmlContent = "",
    style: str = "",
) -> str:
    """A whole page: title, `head`, links to the sections, and the sections, each with its title and content.

    A `toolbar` stays in sight above the sections; `style` is CSS for this page alone.
    """
    links = [element("li", element("a", heading, href=f"#{_anchor(heading)}")) for heading, _ in sections]
    css = files("convline").joinpath("page.css").read_text(encoding="utf-8")
    body = [
        element("header", element("h1", display_name(title)), head),
        element("nav", element("ul", links), aria_label="Sections") if links else "",
        toolbar,
        element("main", [section(heading, content) for heading, content in sections]),
    ]
    return "<!DOCTYPE html>\n" + element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", printable(title)),
            element("style", Html(css + style)),
        ),
        element("body", body),
        lang="en",
    )


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())

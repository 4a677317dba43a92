"""Self-contained HTML pages, element by element: what is no HTML already is escaped."""

from __future__ import annotations

import html
import unicodedata
from base64 import b64encode
from collections.abc import Iterable, Sequence
from importlib.resources import files
from io import BytesIO

from PIL import Image

TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # classes of Unicode's bidi algorithm
LONGEST_NAME = 120  # characters of a file's or class's name that are shown


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


Content = str | Iterable["Content"]

EMPTY = {"img", "meta"}  # elements that have no end


def element(tag: str, *content: Content, **attributes: str | int) -> Html:
    """`<tag attributes>content</tag>`; `class_` is class, `aria_label` is aria-label."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    given = "".join(f' {names[name]}="{html.escape(str(value))}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>" if tag in EMPTY else f"<{tag}{given}>{text(content)}</{tag}>")


def text(content: Content) -> Html:
    """As HTML: strings escaped unless they are HTML, the members of anything else one after the other."""
    if isinstance(content, Html):
        return content
    if isinstance(content, str):
        return Html(html.escape(content))
    return Html("".join(map(text, content)))


def name(given: str, longest: int = LONGEST_NAME) -> Html:
    """A name that may be anything: isolated, so that its direction does not reach its neighbours, and not endless."""
    whole = printable(given)
    shown = elided(whole, longest)
    return element("bdi", shown, **({"title": whole} if shown != whole else {}))


def elided(text: str, longest: int) -> str:
    """Of a long text its two ends: a path ends with what it is of."""
    begin = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:begin]}…{text[begin + 1 - longest :]}"


def printable(given: str) -> str:
    """Without what no page can hold (surrogates, of a name that is not UTF-8), or shows as what it is not (control
    characters, those that turn the direction of a text among them)."""
    kept = "".join("\N{REPLACEMENT CHARACTER}" if _is_unfit(character) else character for character in given)
    return elided(kept, 1000)


def _is_unfit(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in TURNING


def section(title: str, *content: Content) -> Html:
    return element("section", element("h2", title), *content, id=_anchor(title), aria_label=title)


def table(header: Sequence[Content], rows: Iterable[Sequence[Content]], label: str) -> Html:
    """A table whose first column names its rows; it scrolls by itself where it is wider than the page."""
    cells = [list(row) for row in rows]
    head = [
        _cell("th", title, like, scope="col") for title, like in zip(header, cells[0] if cells else header, strict=True)
    ]
    body = [[element("th", first, scope="row"), *(_cell("td", cell, cell) for cell in rest)] for first, *rest in cells]
    drawn = element(
        "table", element("thead", element("tr", head)), element("tbody", [element("tr", row) for row in body])
    )
    return element("div", drawn, class_="scroll", role="region", aria_label=label, tabindex=0)


def _cell(tag: str, content: Content, like: Content, **attributes: str) -> Html:
    """What is a name begins at the left and may take several lines, unlike numbers."""
    return element(tag, content, **attributes, **({"class_": "text"} if isinstance(like, Html) else {}))


def facts(pairs: Iterable[tuple[str, Content]], label: str) -> Html:
    """Names and values, one below the other."""
    rows = [element("tr", element("th", what, scope="row"), element("td", told, class_="text")) for what, told in pairs]
    return element("table", element("tbody", rows), aria_label=label)


def figures(pairs: Iterable[tuple[str, Content]]) -> Html:
    """The few figures that matter most, each with what it is."""
    return element(
        "dl", [element("div", element("dt", what), element("dd", figure)) for what, figure in pairs], class_="figures"
    )


def card(title: Content, picture: Content, caption: Content = "", wide: bool = False) -> Html:
    """A picture with its title and what it says."""
    below = [element("figcaption", caption)] if caption else []
    return element(
        "figure", element("p", title, class_="title"), picture, below, class_="card wide" if wide else "card"
    )


def cards(*members: Html) -> Html:
    return element("div", members, class_="cards")


def note(told: Content) -> Html:
    return element("p", told, class_="muted")


def tile(source: str, alt: str, *lines: Content, smooth: bool = False) -> Html:
    """A small image, as `uri` gives it, with a few lines below."""
    shown = element("img", src=source, alt=printable(alt))
    caption = element("figcaption", [element("span", line) for line in lines]) if lines else ""
    return element("figure", shown, caption, class_="tile smooth" if smooth else "tile")


def tiles(members: Iterable[Html]) -> Html:
    return element("div", members, class_="tiles")


def uri(image: Image.Image, lossless: bool = False) -> str:
    """The image itself as an address; small ones are lossless anyway."""
    buffer = BytesIO()
    format = "png" if lossless or max(image.size) <= 64 else "jpeg"
    image.save(buffer, format, quality=82)
    return f"data:image/{format};base64,{b64encode(buffer.getvalue()).decode()}"


def page(title: str, head: Content, sections: Sequence[tuple[str, Content]]) -> str:
    """A whole page: `head` above a list of links to its sections, each a title and what is in it."""
    links = [element("li", element("a", named, href=f"#{_anchor(named)}")) for named, _ in sections]
    style = Html(files("convline").joinpath("page.css").read_text(encoding="utf-8"))
    body = [
        element("header", element("h1", name(title)), head),
        element("nav", element("ul", links), aria_label="Sections"),
        element("main", [section(named, content) for named, content in sections]),
    ]
    return "<!DOCTYPE html>\n" + element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", printable(title)),
            element("style", style),
        ),
        element("body", body),
        lang="en",
    )


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())

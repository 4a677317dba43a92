"""`serving classify --report`: an HTML page for folders of any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from convline.html import printable
from convline.inputs.input_file import InMemory, InputFile
from serving import html_report
from serving.html_report import IMAGES_PER_ROW, HtmlReport
from serving.records import Prediction, Reject
from serving.summary import Summary
from tests.conftest import Cli
from tests.pages import check
from tests.serving.helpers import encode, noise, write

HOSTILE = ("<script>alert(1)</script>", "\"quoted' & <b>", "right\u202eto left", "x" * 300, "a\udcffb", "new\nline")
GONE = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        write(tmp_path / f"in/{number % 3}/{number:02}.png", encode(noise(8, 8), "PNG"))
    write(tmp_path / "in/broken.png", b"garbage")
    write(tmp_path / "in/empty.png", b"")
    return tmp_path / "in"


def shown(path: Path) -> set[str]:
    """The names of files in a page."""
    return {text for text in check(path).texts("bdi") if text.endswith(".png")}


def test_a_page_shows_the_results_for_a_folder(cli: Cli, folder: Path, model: Path, tmp_path: Path) -> None:
    options = ("--model", model, "--output", "out.csv", "--report", "page.html")
    cli("serving", "classify", folder, *options)
    page = check(tmp_path / "page.html")
    assert page.texts("h2") == ["Classes", "By confidence", "By class", "Rejected"]
    assert {"62", "60", "2"} <= set(page.texts("dd")) and {"not-an-image", "empty"} <= set(page.texts("td"))
    named = shown(tmp_path / "page.html")
    assert {"broken.png", "empty.png"} < named and all((folder / name).exists() for name in named)

    cli("serving", "classify", folder, *options, status=1)
    (tmp_path / "page.html").unlink()
    cli("serving", "classify", folder, *options, "--resume")  # the table is there: the page alone is made again
    assert shown(tmp_path / "page.html") == named


def test_a_page_inside_the_input_is_not_classified(cli: Cli, folder: Path, model: Path) -> None:
    for option in ("--overwrite", "--overwrite"):
        told = cli(
            "serving",
            "classify",
            folder,
            "--model",
            model,
            "--output",
            "out.csv",
            "--report",
            folder / "p.html",
            option,
        )
        assert "found 62" in told.stderr


@pytest.mark.parametrize("name", ["page.txt", "folder.html"])
def test_a_report_that_is_not_html_is_refused(cli: Cli, folder: Path, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    error = cli("serving", "classify", folder, "--model", model, "--output", "o.csv", "--report", name, status=1).stderr
    assert f"--report {name}: name a file that ends in .html" in error and not (tmp_path / "o.csv").exists()


def made(tmp_path: Path, entries: list[tuple[str, str, float]]) -> Path:
    """A page of entries: path, label and probability."""
    summary = Summary("cpu")
    summary.observers = [HtmlReport(tmp_path / "page.html", ["photos", HOSTILE[1]], HOSTILE[0])]
    image = InMemory(encode(noise(8, 8), "PNG"))
    for path, label, probability in entries:
        summary.add(InputFile(path, image), Prediction(path, (label,), (probability,)))
    for name in HOSTILE:
        summary.add(InputFile(name, image), Reject(name, "unreadable", name))
    summary.finish(1.0)
    return tmp_path / "page.html"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    page = check(made(tmp_path, [(name, name, 0.5) for name in HOSTILE]))
    told = page.texts("bdi")
    assert HOSTILE[0] in told and HOSTILE[1] in told and HOSTILE[2].replace("\u202e", GONE) in told
    assert "x" * 59 + "…" + "x" * 60 in told and f"a{GONE}b" in told
    assert not any("x" * 121 in text for text in told)


def test_a_name_below_an_image_ends_as_the_file_does_and_never_turns_its_text(tmp_path: Path) -> None:
    long = "Holiday in Sardinia 2024/Day 03 - Cala Goloritze/IMG_20240712_183000.png"
    page = check(made(tmp_path, [(long, "cat", 0.5), ("\u202egnp.21.png", "cat", 0.5)]))
    below = {text for text in page.texts("bdi") if text.endswith(".png")}
    assert below == {"Holiday in Sardinia…" + long[-20:], f"{GONE}gnp.21.png"}
    assert printable("x" * 3000 + "end.png").endswith("end.png")
    assert long in {attributes.get("title") for attributes in page.all("bdi")}


def test_a_page_of_many_images_and_classes_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def thumbnail(file: InputFile) -> str:
        read.append(file)
        return "data:image/png;base64,"

    monkeypatch.setattr(html_report, "_thumbnail", thumbnail)
    path = made(tmp_path, [(f"{n}.png", f"class {n % 1000}", n % 97 / 97) for n in range(50_000)])
    images = len(check(path).all("img"))
    assert images <= 3 * html_report.IMAGES_PER_KIND + 10 * IMAGES_PER_ROW
    assert len(read) < 10_000  # not every file is opened again


def test_the_most_and_the_least_confident_are_shown(tmp_path: Path) -> None:
    path = made(tmp_path, [(f"{n:03}.png", "cat", (n + 0.5) / 500) for n in range(500)])
    names = [text for text in check(path).texts("bdi") if text.endswith(".png")]
    start = names.index("000.png", names.index("499.png") - 3 * IMAGES_PER_ROW if "499.png" in names else 0)
    assert names[start : start + IMAGES_PER_ROW] == [f"{n:03}.png" for n in range(IMAGES_PER_ROW)]
    assert {f"{n:03}.png" for n in range(500 - IMAGES_PER_ROW, 500)} <= set(names)


def test_scores_that_are_no_probabilities_are_shown_too(tmp_path: Path) -> None:
    scores = [-1.2, 7.0]  # what is not finite is a reject
    page = check(made(tmp_path, [(f"{n}.png", "cat", score) for n, score in enumerate(scores)]))
    assert {f"{n}.png" for n in range(2)} <= set(page.texts("bdi"))


def test_a_page_that_other_parts_would_find_is_refused(cli: Cli, folder: Path, model: Path) -> None:
    options = ("--model", model, "--output", "part.csv", "--shard", "1/2", "--report", folder / "p.html")
    assert "the report must lie outside the input" in cli("serving", "classify", folder, *options, status=1).stderr

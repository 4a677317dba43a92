"""`serving classify --report`: an HTML page for folders of any size."""

from __future__ import annotations

import os
import re
import tarfile
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convline.html import printable
from convline.inputs.input_file import InMemory, InputFile, OnDisk
from convline.inputs.listing import find
from convline.inputs.remote_files import RemoteFile
from serving import html_report
from serving.html_report import IMAGES_PER_CLASS_ROW, IMAGES_PER_TENTH, LARGEST_PAGE, UNSURE_IMAGES, HtmlReport
from serving.records import UNSURE, Prediction, Reject, decide
from serving.report_images import thumbnail
from serving.summary import Summary
from tests.browser import screenshot
from tests.conftest import Cli
from tests.pages import Page, check, linked_file, links
from tests.serving.helpers import encode, exif, noise, write

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

    monkeypatch.setattr(html_report, "thumbnail", thumbnail)
    path = made(tmp_path, [(f"{n}.png", f"class {n % 1000}", n % 97 / 97) for n in range(50_000)])
    images = len(check(path).all("img"))
    assert images <= 3 * html_report.IMAGES_PER_KIND + 10 * IMAGES_PER_TENTH
    assert len(read) < 10_000  # not every file is opened again


def test_the_most_and_the_least_confident_are_shown(tmp_path: Path) -> None:
    path = made(tmp_path, [(f"{n:03}.png", "cat", (n + 0.5) / 500) for n in range(500)])
    named = [text for text in check(path).texts("bdi") if text.endswith(".png")]
    by_class = named[-3 * IMAGES_PER_CLASS_ROW :]
    assert by_class[:IMAGES_PER_CLASS_ROW] == [f"{n:03}.png" for n in range(IMAGES_PER_CLASS_ROW)]
    most = [f"{499 - n:03}.png" for n in range(IMAGES_PER_CLASS_ROW)]
    assert by_class[IMAGES_PER_CLASS_ROW : 2 * IMAGES_PER_CLASS_ROW] == most


def test_scores_that_are_no_probabilities_are_shown_too(tmp_path: Path) -> None:
    scores = [-1.2, 7.0]  # what is not finite is a reject
    page = check(made(tmp_path, [(f"{n}.png", "cat", score) for n, score in enumerate(scores)]))
    assert {f"{n}.png" for n in range(2)} <= set(page.texts("bdi"))


def test_a_page_that_other_parts_would_find_is_refused(cli: Cli, folder: Path, model: Path) -> None:
    options = ("--model", model, "--output", "part.csv", "--shard", "1/2", "--report", folder / "p.html")
    assert "the report must lie outside the input" in cli("serving", "classify", folder, *options, status=1).stderr


def classified(page: Path, files: list[tuple[InputFile, str, float]], threshold: float | None = None) -> Path:
    """A page of files, their label and probability."""
    summary = Summary("cpu")
    summary.observers = [HtmlReport(page, ["photos"], "model.onnx")]
    for file, label, probability in files:
        decision = decide(label, probability, threshold)
        summary.add(file, Prediction(file.path, (label,), (probability,), decision))
    summary.finish(1.0)
    return page


def photograph(number: int, height: int = 120, width: int = 160) -> Image.Image:
    """Noise at all scales, whose strength falls with the frequency as in photographs; a little more detailed."""
    draws = np.random.default_rng(number)
    across, down = np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))
    strength = 1 / np.maximum(np.hypot(across, down), 1 / width)
    channels = [np.fft.ifft2(np.fft.fft2(draws.normal(size=(height, width))) * strength).real for _ in range(3)]
    pixels: NDArray[np.float64] = np.stack(channels, 2)
    return Image.fromarray(np.clip(128 + 50 * (pixels / pixels.std()), 0, 255).astype(np.uint8))


def test_images_and_rejects_lead_to_their_files(cli: Cli, model: Path, tmp_path: Path) -> None:
    names = (
        "plain.png",
        "sub/with space.png",
        "100%#?&.png",
        "a:b.png",
        "\u00fc\u732b'\".png",
        os.fsdecode(b"latin\xe9.png"),
    )
    for name in names:
        write(tmp_path / "my photos" / name, encode(noise(8, 8), "PNG"))
    write(tmp_path / "my photos/broken.png", b"garbage")
    (tmp_path / "pages").mkdir()
    page = tmp_path / "pages/page.html"
    cli("serving", "classify", "my photos", "--model", model, "--output", "o.csv", "--report", "pages/page.html")
    found = {linked_file(page, link) for link in links(check(page)) if not link.startswith("#")}
    linkable = {*names[:-1], "broken.png"}  # a name that is not UTF-8 has no link
    assert {path.resolve() for path in found} == {tmp_path / "my photos" / name for name in linkable}
    assert shown(page) >= {"100%#?&.png", f"latin{GONE}.png"}


def test_members_of_archives_have_no_links_and_urls_are_links(tmp_path: Path) -> None:
    data = encode(noise(8, 8), "PNG")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        member = tarfile.TarInfo("member.png")
        member.size = len(data)
        archive.addfile(member, BytesIO(data))
    files = [*find([str(tmp_path / "photos.tar")]), InputFile("memory.png", InMemory(data))]
    files += [InputFile("gone.png", OnDisk(str(tmp_path / "gone.png")))]
    files += [InputFile(url, RemoteFile(url)) for url in ("http://localhost:9/a b.png", "s3://bucket/a.png")]
    page = classified(tmp_path / "page.html", [(file, "cat", 0.5) for file in files])
    url = "http://localhost:9/a%20b.png"
    checked = check(page, {url})
    assert {link for link in links(checked) if not link.startswith("#")} == {url}
    assert {"member.png", "memory.png", "gone.png", "s3://bucket/a.png"} <= set(checked.texts("bdi"))


@pytest.mark.parametrize("through", ["link", "folder/../photos"])
def test_links_hold_for_inputs_that_are_reached_through_links(tmp_path: Path, through: str) -> None:
    write(tmp_path / "disk/photos/a.png", encode(noise(8, 8), "PNG"))
    (tmp_path / "disk/folder").mkdir()
    (tmp_path / "link").symlink_to("disk/photos")
    (tmp_path / "folder").symlink_to("disk/folder")
    page = classified(tmp_path / "page.html", [(file, "cat", 0.5) for file in find([str(tmp_path / through)])])
    expected = {"link": "link/a.png", "folder/../photos": "disk/photos/a.png"}[through]
    assert {link for link in links(check(page)) if not link.startswith("#")} == {expected}


@pytest.mark.parametrize(
    ("size", "orientation", "expected"),
    [((900, 600), 1, (160, 107)), ((900, 600), 6, (107, 160)), ((120, 90), 1, (120, 90)), ((20, 10), 1, (20, 10))],
)
def test_thumbnails_show_the_whole_image_upright(
    tmp_path: Path, size: tuple[int, int], orientation: int, expected: tuple[int, int]
) -> None:
    data = encode(photograph(1, size[1], size[0]), "JPEG", exif=exif(orientation), quality=95)
    page = check(classified(tmp_path / "page.html", [(InputFile("a.jpg", InMemory(data)), "cat", 0.5)]))
    source = page.all("img")[0]["src"] or ""
    assert Image.open(BytesIO(b64decode(source.partition(",")[2]))).size == expected


@pytest.mark.parametrize("height", range(300, 312))
def test_a_thumbnail_has_no_border(height: int) -> None:
    file = InputFile("a.png", InMemory(encode(Image.new("RGB", (400, height), "white"), "PNG")))
    shown = Image.open(BytesIO(b64decode(thumbnail(file).partition(",")[2])))
    assert shown.width == 160 and np.asarray(shown).min() > 250


def page_of_photographs(tmp_path: Path, classes: int, count: int) -> tuple[Path, Page]:
    """A page of detailed photographs, half of them unsure, with long names."""
    images = [InMemory(encode(photograph(number), "JPEG", quality=95)) for number in range(20)]
    images += [InMemory(encode(noise(160, 160, 3), "JPEG", quality=95))]  # the largest possible ones
    draws = np.random.default_rng(0)
    files = [
        (InputFile(f"{n:06}{'-long' * 20}.jpg", images[n % 21]), f"class {n % classes}", float(draws.uniform(0.2, 1)))
        for n in range(count)
    ]
    page = classified(tmp_path / "page.html", files, threshold=0.6)
    return page, check(page)


def test_a_page_of_photographs_has_the_promised_size(tmp_path: Path) -> None:
    path, page = page_of_photographs(tmp_path, 2, 500)
    images = page.all("img")
    assert path.stat().st_size * (672 + 240 + 70) / len(images) < LARGEST_PAGE
    sources = [len(image["src"] or "") for image in images]
    assert max(sources) <= 14_000 and np.median(sources) > 5_000  # neither too large nor too coarse


@pytest.mark.all
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_a_page_of_any_number_of_classes_has_the_promised_size(tmp_path: Path, classes: int) -> None:
    path, page = page_of_photographs(tmp_path, classes, 6000)
    assert 2_000_000 < path.stat().st_size < LARGEST_PAGE
    assert len(page.all("img")) >= 3 * min(classes, 200)


def test_all_unsure_images_of_a_class_are_shown(tmp_path: Path) -> None:
    image = InMemory(encode(noise(8, 8), "PNG"))
    files = [(InputFile(f"{n:03}.png", image), ("cat", "dog")[n % 2], 0.5 + n / 1000) for n in range(300)]
    page = check(classified(tmp_path / "page.html", files, threshold=0.7))
    unsure = {f"{n:03}.png" for n in range(200)}
    assert unsure <= shown(tmp_path / "page.html") and len(unsure) <= UNSURE_IMAGES
    assert page.texts("option") == ["all classes", "cat", "dog", "all", "certain", UNSURE]
    assert page.texts("h2") == ["Classes", "Unsure", "By confidence", "By class"]


def test_without_a_choice_there_are_no_filters(tmp_path: Path) -> None:
    file = InputFile("a.png", InMemory(encode(noise(8, 8), "PNG")))
    assert not check(classified(tmp_path / "page.html", [(file, "cat", 0.5)])).all("select")


COLORS = {"cat sure": "red", "cat unsure": "lime", "dog sure": "blue", "dog unsure": "yellow"}


@pytest.mark.all
@pytest.mark.parametrize(
    ("chosen", "visible"),
    [
        ([], set(COLORS)),
        (["cat"], {"cat sure", "cat unsure"}),
        ([UNSURE], {"cat unsure", "dog unsure"}),
        (["dog", "certain"], {"dog sure"}),
        (["cat", UNSURE], {"cat unsure"}),
    ],
)
def test_a_browser_shows_only_the_images_that_were_chosen(tmp_path: Path, chosen: list[str], visible: set[str]) -> None:
    files = [
        (InputFile(f"{kind}.png", InMemory(encode(Image.new("RGB", (60, 60), color), "PNG"))), kind[:3], probability)
        for (kind, color), probability in zip(COLORS.items(), (0.9, 0.3, 0.9, 0.3), strict=True)
    ]
    page = classified(tmp_path / "page.html", files, threshold=0.6)
    text = page.read_text()
    for name in chosen:  # as a user does
        text, found = re.subn(rf"<option( value=\"[^\"]+\">{name}<)", r"<option selected\1", text)
        assert found == 1
    page.write_text(text)
    colors = set(map(tuple, screenshot(page, 900, 3000).reshape(-1, 3).tolist()))
    pixels = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
    assert {kind for kind, color in COLORS.items() if pixels[color] in colors} == visible

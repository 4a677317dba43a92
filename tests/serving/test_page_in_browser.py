"""The page of `serving page` in Chromium: it gives serving's answers, or none."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from serving.page import TESTED_RUNTIME
from tests.browser import chromium
from tests.conftest import QuietHandler, run_process
from tests.serving.helpers import csv_rows, encode, exif, noise, write
from tests.serving.page_files import any_size, with_many_classes
from tests.shared import shared_folder

# chromium first: where it is not installed, nothing is made for it
pytestmark = [pytest.mark.all, pytest.mark.usefixtures("chromium", "runtime")]

# of a probability; in Chromium 150 at most 7.4e-7 was seen
LARGEST_DIFFERENCE = 1e-5
WHERE_PIXELS_MAY_DIFFER = 2e-3  # by 1 of 255, as transparency may be rounded, and JPEG decoded, in another way
DECODERS_DIFFER = ("transparent.png", "palette.png", "orientation-6.jpg")
READY = re.compile("^Ready")
Serve = Callable[..., str]


@pytest.fixture(scope="session", name="chromium")
def chromium_path() -> str:
    return chromium()


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm package onnxruntime-web."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")

    def install(folder: Path) -> None:
        package = f"onnxruntime-web@{TESTED_RUNTIME}"
        line = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), package]
        installed = subprocess.run(line, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm cannot install {package}: {installed.stderr.splitlines()[-1:]}")

    return shared_folder(tmp_path_factory, "onnxruntime-web", install) / "node_modules/onnxruntime-web"


@pytest.fixture(scope="module")
def pages(
    insects: Path, model: Path, samples: Path, runtime: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folder of a page each for an RGB model and a grey one; beside it the model, photographs in `photographs`,
    and what serving says of them in `table.csv`. Do not change them."""

    def make(folder: Path) -> None:
        for name, source in (("rgb", insects / "source"), ("grey", samples)):
            here = folder / name
            here.mkdir()
            for path in sorted(source.rglob("*.png")):
                write(here / "photographs" / "-".join(path.relative_to(source).parts), path.read_bytes())
            noise_images = max(0, 86 - len(list((here / "photographs").iterdir())))
            for file, data in photographs_of_many_kinds(noise_images).items():
                write(here / "photographs" / file, data)
            if name == "rgb":
                shutil.copy(insects / "any-size.onnx", here / "model.onnx")
            else:
                any_size(model, here / "model.onnx")
            run_process(here, "serving", "page", "model.onnx", "--output", "page", "--onnxruntime-web", runtime)
            options = ("--model", "model.onnx", "--output", "table.csv", "--top-k", 3)
            unfamiliar = ("--unfamiliar",) if name == "rgb" else ()
            run_process(here, "serving", "classify", "photographs", *options, *unfamiliar)

    folder = shared_folder(tmp_path_factory, "pages", make)
    return {name: folder / name / "page" for name in ("rgb", "grey")}


def photographs_of_many_kinds(noise_images: int) -> dict[str, bytes]:
    """Image files of many sizes, with transparency or EXIF orientation, whose pixels are the same in every decoder."""
    sizes = np.random.default_rng(1).integers(2, 130, (noise_images, 2))
    coarse = Image.fromarray(noise(30, 40, 3))
    transparent = coarse.resize((64, 48))
    transparent.putalpha(Image.fromarray(np.linspace(0, 255, 64 * 48).astype(np.uint8).reshape(48, 64)))
    return {
        **{f"size-{i}.png": encode(noise(height, width, 3), "PNG") for i, (height, width) in enumerate(sizes)},
        **{f"orientation-{number}.png": encode(coarse, "PNG", exif=exif(number)) for number in range(1, 9)},
        "orientation-6.jpg": encode(coarse, "JPEG", quality=95, exif=exif(6)),
        "one-pixel.png": encode(noise(1, 1, 3), "PNG"),
        "wide.png": encode(noise(1, 300, 3), "PNG"),
        "large.png": encode(coarse.resize((4000, 3000)), "PNG", compress_level=1),
        "transparent.png": encode(transparent, "PNG"),
        "palette.png": encode(coarse.quantize(16), "PNG", transparency=3),
        "grey.png": encode(noise(20, 33), "PNG"),
    }


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    expect.set_options(timeout=60_000)  # other tests may take most of the CPU
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, script: str | None = None, has_errors: bool = False) -> Iterator[Page]:
    """The page at `url`, `script` run before its own. At the end: it has asked nothing of other servers, and, unless
    `has_errors`, reported no error to the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    requests: list[str] = []
    problems: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("filechooser", lambda _: None)  # from now on no dialog opens, which would wait for a person
    if script:
        page.add_init_script(script)
    page.goto(url)
    yield page
    context.close()
    base = url.removesuffix("index.html")
    assert requests and [name for name in requests if not name.startswith((base, "data:,"))] == []
    assert has_errors or problems == []


@pytest.fixture(scope="module")
def rgb_page(browser: Browser, pages: dict[str, Path], serve: Serve) -> Iterator[Page]:
    """The page of the RGB model, ready; for all tests, as it takes a second to load."""
    with opened(browser, serve(pages["rgb"])) as page:
        wait_until_ready(page)
        yield page


@pytest.fixture
def page(rgb_page: Page) -> Page:
    """The page of the RGB model, ready, without answers, nothing focused."""
    clear = rgb_page.get_by_role("button", name="Clear")
    if clear.is_visible():
        clear.click()
    rgb_page.locator("h1").click()  # the next Tab goes on from here
    return rgb_page


def wait_until_ready(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text(READY)


def choose(page: Page, *files: Path) -> None:
    """Choose files, and wait until all of them have an answer, or a reason why there is none."""
    shown = page.locator("#results > li").count()
    page.get_by_label("Choose photographs").set_input_files(list(files))
    expect(page.locator("#results > li")).to_have_count(shown + len(files))


def answers(page: Page) -> dict[str, list[tuple[str, float]]]:
    """Labels and probabilities by file name, as they stand on the page."""
    found: list[Any] = page.evaluate("""
        () => [...document.querySelectorAll("#results > li")].map((item) => [
            item.querySelector("h3").textContent,
            [...item.querySelectorAll(".classes li")].map((row) => [
                row.querySelector(".label").textContent, Number(row.querySelector("data").value)])])
    """)
    return {name: [(label, value) for label, value in rows] for name, rows in found}


def test_the_answers_of_an_rgb_model_are_those_of_serving(page: Page, pages: dict[str, Path]) -> None:
    assert_same_answers(page, pages["rgb"])


def test_images_unlike_the_training_images_are_marked(page: Page, pages: dict[str, Path]) -> None:
    rows = csv_rows(pages["rgb"].with_name("table.csv"))
    # far enough from 1 that other decoders change nothing
    unfamiliar = {row["path"]: float(row["unfamiliar"]) > 1 for row in rows if abs(float(row["unfamiliar"]) - 1) > 0.05}
    chosen = [*(path for path, is_far in unfamiliar.items() if is_far)][:3]
    chosen += [*(path for path, is_far in unfamiliar.items() if not is_far)][:3]
    assert len(chosen) == 6
    choose(page, *(pages["rgb"].with_name("photographs") / path for path in chosen))
    items = page.locator("#results > li")
    marked = items.filter(has_text="Unlike the images that the model learned from.").locator("h3").all_text_contents()
    assert set(marked) == {path for path in chosen if unfamiliar[path]}


def test_the_answers_of_a_grey_model_are_those_of_serving(
    browser: Browser, pages: dict[str, Path], serve: Serve
) -> None:
    with opened(browser, serve(pages["grey"])) as page:
        wait_until_ready(page)
        assert_same_answers(page, pages["grey"])


def assert_same_answers(page: Page, folder: Path) -> None:
    choose(page, *sorted(folder.with_name("photographs").iterdir()))
    found = answers(page)
    rows = {row["path"]: row for row in csv_rows(folder.with_name("table.csv"))}
    assert len(rows) >= 100 and set(found) == set(rows)
    assert len({row["label"] for row in rows.values()}) >= 3
    differences = {}
    for path, row in rows.items():
        assert found[path][0][0] == row["label"], path
        expected = [(row[f"label{end}"], float(row[f"probability{end}"])) for end in ("", "_2", "_3")]
        differences[path] = max(abs(dict(found[path])[label] - probability) for label, probability in expected)
    limits = {path: WHERE_PIXELS_MAY_DIFFER if path in DECODERS_DIFFER else LARGEST_DIFFERENCE for path in rows}
    assert {path: difference for path, difference in differences.items() if not difference <= limits[path]} == {}


def copy_of(folder: Path, target: Path, changes: dict[str, bytes]) -> Path:
    """A copy of a page with other content in some of its files, named by their endings."""
    shutil.copytree(folder, target)
    for ending, content in changes.items():
        (path,) = target.glob(f"*{ending}")
        path.write_bytes(content)
    return target


def with_true_hashes(page: Path) -> Path:
    """The page with the hashes of its model and its runtime as they are, so that these do not find the damage."""
    text = (page / "index.html").read_text()
    for attribute, ending in (("model", ".onnx"), ("wasm", ".wasm")):
        (path,) = page.glob(f"*{ending}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        text, count = re.subn(rf'(data-{attribute}-sha256=)"\w+"', rf'\1"{digest}"', text)
        assert count == 1
    (page / "index.html").write_text(text)
    return page


def assert_refuses(browser: Browser, url: str, reason: str, script: str | None = None) -> None:
    """The page says why it does not classify, and does not."""
    with opened(browser, url, script, has_errors=True) as page:
        refusal = page.get_by_role("alert")
        expect(refusal).to_contain_text(reason)
        expect(refusal).to_contain_text("This page classifies nothing.")
        expect(page.get_by_label("Choose photographs")).to_be_disabled()
        drop(page, encode(noise(8, 8, 3), "PNG"))
        page.wait_for_timeout(100)
        expect(page.locator("#results > li")).to_have_count(0)


def drop(page: Page, data: bytes, event: str = "drop") -> None:
    """Drop an image file on the page, or paste it."""
    page.evaluate(
        """([bytes, event]) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], `${event}.png`, { type: "image/png" }));
            const made = event === "drop" ? new DragEvent("drop", { dataTransfer: files, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: files });
            document.dispatchEvent(made);
        }""",
        [list(data), event],
    )


def damaged_weights(model: Path) -> bytes:
    """The file with one bit flipped in each of its 100 largest weights, which leaves them finite."""
    proto = onnx.load(model)
    tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights = np.frombuffer(tensor.raw_data, np.float32).copy()
    weights[np.abs(weights).argsort()[-100:]] *= -1
    tensor.raw_data = weights.tobytes()
    return proto.SerializeToString()


def test_a_file_that_is_not_the_one_of_the_page_is_refused(
    browser: Browser, pages: dict[str, Path], runtime: Path, tmp_path: Path, serve: Serve
) -> None:
    page = pages["rgb"]
    model, wasm = page / "model.onnx", next(page.glob("*.wasm"))
    data = bytearray(model.read_bytes())
    assert data.count(b'"bee"') >= 1
    other_class = bytes(data).replace(b'"bee"', b'"cow"')
    data[len(data) // 2] ^= 1
    is_other = "is not the file that this page was made with"
    cases: list[tuple[dict[str, bytes], str]] = [
        ({".onnx": bytes(data)}, f"model.onnx {is_other}"),
        ({".onnx": other_class}, f"model.onnx {is_other}"),
        ({".onnx": bytes(data[:-1])}, f"model.onnx {is_other}"),
        ({".wasm": wasm.read_bytes()[:-1000]}, f"{wasm.name} {is_other}"),
        ({".wasm": (runtime / "dist/ort-wasm-simd-threaded.jspi.wasm").read_bytes()}, f"{wasm.name} {is_other}"),
        ({"-*.js": b"export const env = {"}, "could not be loaded"),
    ]
    for number, (changes, reason) in enumerate(cases):
        assert_refuses(browser, serve(copy_of(page, tmp_path / str(number), changes)), reason)
    gone = copy_of(page, tmp_path / "gone", {})
    (gone / "model.onnx").unlink()
    assert_refuses(browser, serve(gone), "model.onnx could not be loaded (the server answered 404)")


def test_what_computes_otherwise_is_refused_even_where_its_hash_is_right(
    browser: Browser, pages: dict[str, Path], runtime: Path, tmp_path: Path, serve: Serve
) -> None:
    page = pages["rgb"]
    wasm = next(page.glob("*.wasm")).read_bytes()
    cases: list[tuple[dict[str, bytes], str]] = [
        ({".onnx": damaged_weights(page / "model.onnx")}, "failed its self-test"),
        ({".wasm": wasm[: len(wasm) // 2]}, "cannot run the model"),
        ({".wasm": (runtime / "dist/ort-wasm-simd-threaded.jspi.wasm").read_bytes()}, "cannot run the model"),
    ]
    for number, (changes, reason) in enumerate(cases):
        assert_refuses(browser, serve(with_true_hashes(copy_of(page, tmp_path / str(number), changes))), reason)


def test_a_browser_that_changes_pixels_is_refused(browser: Browser, pages: dict[str, Path], serve: Serve) -> None:
    protection = """
        const read = CanvasRenderingContext2D.prototype.getImageData;
        CanvasRenderingContext2D.prototype.getImageData = function (...area) {
            const pixels = read.apply(this, area);
            pixels.data[4] ^= 1;
            return pixels;
        };
    """
    assert_refuses(browser, serve(pages["rgb"]), "changes the pixels that a page reads", protection)


def test_a_file_that_gives_no_pixels_gets_a_sentence_and_no_class(page: Page, tmp_path: Path) -> None:
    image = encode(noise(300, 300, 3), "PNG")
    cannot_decode = "cannot decode the file"
    reasons = {
        write(tmp_path / "text.png", b"not an image"): cannot_decode,
        write(tmp_path / "half.png", image[: len(image) // 2]): cannot_decode,
        write(tmp_path / "page.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>'): cannot_decode,
        write(tmp_path / "empty.jpg", b""): "The file is empty",
        write(tmp_path / "clear.png", encode(Image.new("RGBA", (9, 9)), "PNG")): "all of them are transparent",
    }
    choose(page, *reasons, write(tmp_path / "good.png", image))
    for path, reason in reasons.items():
        item = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=path.name))
        expect(item).to_contain_text(reason)
        expect(item.get_by_role("list")).to_have_count(0)
    assert answers(page)["good.png"]
    expect(page.get_by_role("status")).to_have_text("1 photograph was classified; 5 files could not be used.")
    # a canvas that stays blank, as where a photograph is too large for the browser
    page.evaluate("""() => {
        const canvas = CanvasRenderingContext2D.prototype;
        window.drawImage = canvas.drawImage;
        canvas.drawImage = () => {};
    }""")
    choose(page, tmp_path / "good.png")
    page.evaluate("() => { CanvasRenderingContext2D.prototype.drawImage = window.drawImage; }")
    expect(page.locator("#results > li").first).to_contain_text("reads no pixels from the image")


def test_the_keyboard_and_a_screen_reader_reach_everything(page: Page, tmp_path: Path) -> None:
    image = write(tmp_path / "photograph.png", encode(noise(9, 9, 3), "PNG"))
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Choose photographs")).to_be_focused()
    zone = page.locator("#drop-zone")
    assert zone.evaluate("zone => getComputedStyle(zone).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    chooser.value.set_files(image)
    item = page.get_by_role("region", name="Answers").get_by_role("listitem").filter(has_text=image.name)
    expect(item.get_by_role("img", name="Thumbnail of photograph.png")).to_be_visible()
    expect(item.get_by_role("list", name="Most probable classes").get_by_role("listitem")).to_have_count(3)
    (label, probability), *_ = answers(page)[image.name]
    expect(page.get_by_role("status")).to_have_text(f"photograph.png: {label}, {100 * probability:.1f}%")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Clear")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Answers")).to_have_count(0)
    expect(page.get_by_role("button", name="Choose photographs")).to_be_focused()
    page.keyboard.press("Tab")  # Clear is gone
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="About the model").get_by_role("listitem")).to_have_text(
        ["ant", "bee", "cat"]
    )


def test_files_can_be_dropped_and_pasted(page: Page) -> None:
    for number, event in enumerate(("drop", "paste"), 1):
        drop(page, encode(noise(9, 9, 3), "PNG"), event)
        expect(page.locator("#results > li")).to_have_count(number)
    assert list(answers(page)) == ["paste.png", "drop.png"]


# the smallest contrast of a text with what is behind it, by the formula of WCAG 2, and where it is
CONTRAST = """() => {
    const parse = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => parse(color).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const background = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return (parse(color)[3] ?? 1) || !node.parentElement ? color : background(node.parentElement);
    };
    const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
    return texts.map((node) => {
        const [a, b] = [getComputedStyle(node).color, background(node)].map(luminance).sort((a, b) => b - a);
        return [(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 80)];
    }).sort(([a], [b]) => a - b)[0];
}"""


def test_a_thousand_classes_with_odd_names_fit_every_screen(
    browser: Browser, model: Path, runtime: Path, tmp_path: Path, serve: Serve
) -> None:
    many = with_many_classes(any_size(model, tmp_path / "any-size.onnx"), tmp_path / "many.onnx", 100)
    run_process(tmp_path, "serving", "page", many, "--output", "page", "--onnxruntime-web", runtime)
    names = ["<img src=x onerror=alert(1)>.png", f"{'long' * 50}.png", "תמונה.png"]
    images = [write(tmp_path / name, encode(noise(8, 8), "PNG")) for name in names]
    with opened(browser, serve(tmp_path / "page")) as page:
        wait_until_ready(page)
        choose(page, *images, write(tmp_path / "text.png", b"text"))
        assert set(answers(page)) == {*names, "text.png"}
        expect(page.get_by_text("An answer below 50% counts as unsure.")).to_be_visible()
        expect(page.locator(".decision")).to_have_text(["unsure"] * 3)  # each class has 99 copies
        page.get_by_text("Names of the classes").click()
        labels = page.locator("#class-names li")
        expect(labels).to_have_count(1000)
        expect(labels.nth(1)).to_have_text("</script><script>alert(1)</script> 1")
        expect(labels.nth(4)).to_have_text("a\N{REPLACEMENT CHARACTER}b 4")  # as in the other pages
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                contrast, where = page.evaluate(CONTRAST)
                assert contrast >= 4.5, f"{contrast:.2f} in {scheme}: {where}"


def test_nothing_can_be_sent_to_another_server(
    browser: Browser, pages: dict[str, Path], tmp_path: Path, serve: Serve
) -> None:
    asked = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.command)
            super().do_GET()

        do_POST = do_GET

    other = serve(tmp_path, Handler)
    send = f"fetch('{other}', {{ method: 'POST', body: 'x', mode: 'no-cors' }})"
    page = browser.new_page()
    page.goto(serve(pages["rgb"]))
    with pytest.raises(Error, match="Failed to fetch"):
        page.evaluate(send)
    page.evaluate(f"() => {{ new Image().src = '{other}x.png'; }}")
    page.wait_for_timeout(200)
    assert asked == []
    page.goto(other)  # without the policy it arrives
    page.evaluate(send)
    page.close()
    assert "POST" in asked


def test_a_page_that_is_opened_as_a_file_says_that_it_needs_a_server(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, f"file://{pages['rgb']}/index.html", has_errors=True) as page:
        expect(page.get_by_text("python -m http.server")).to_be_visible()
        expect(page.get_by_label("Choose photographs")).to_be_disabled()


def test_the_sha256_of_the_page_is_that_of_the_standard(page: Page) -> None:
    """The examples of FIPS 180-2, appendix B, and a message in parts of all lengths."""
    examples = {
        "": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": (
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
        ),
        "a" * 1_000_000: "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
    }
    hash_of = """async ([parts]) => {
        const { Sha256 } = await import("./sha256.js");
        const hash = new Sha256();
        parts.forEach((part) => hash.update(new TextEncoder().encode(part)));
        return hash.hexDigest();
    }"""
    in_parts = ["x" * length for length in range(200)]
    for message, digest in examples.items():
        assert page.evaluate(hash_of, [[message]]) == digest
    assert page.evaluate(hash_of, [in_parts]) == hashlib.sha256("".join(in_parts).encode()).hexdigest()

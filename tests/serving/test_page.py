"""`serving page`: what the command writes and refuses. test_page_in_browser.py opens the pages."""

from __future__ import annotations

import hashlib
import re
import resource
import shutil
from pathlib import Path

import onnx
import pytest

from tests.conftest import Cli
from tests.pages import Page
from tests.pipeline.helpers import contents
from tests.serving.page_files import any_size, runtime_folder


@pytest.fixture(scope="module")
def any_size_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return any_size(model, tmp_path_factory.mktemp("page") / "any-size.onnx")


@pytest.fixture
def page(any_size_model: Path, tmp_path: Path, cli: Cli) -> Path:
    """The folder of a page, and beside it the model and node_modules that it was made of."""
    shutil.copy(any_size_model, tmp_path / "any-size.onnx")
    runtime_folder(tmp_path / "node_modules/onnxruntime-web")
    cli("serving", "page", "any-size.onnx", "--output", "page")
    return tmp_path / "page"


def test_the_folder_holds_the_model_unchanged_and_everything_that_its_page_names(page: Path) -> None:
    model = (page / "model.onnx").read_bytes()
    assert model == (page.parent / "any-size.onnx").read_bytes()
    html = Page(page / "index.html")
    (body,) = html.all("body")
    assert body["data-model-sha256"] == hashlib.sha256(model).hexdigest()
    assert body["data-wasm-sha256"] == hashlib.sha256(b"\0asm").hexdigest()
    named = {body["data-model"], body["data-runtime"], body["data-wasm"]}
    for tag, attributes in html.tags:
        named |= {attributes[name] for name in ("src", "href") if name in attributes}
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    for script in page.glob("*.js"):
        named |= set(re.findall(r'from "\./(.+?)"', script.read_text()))
    assert named - {"data:,"} == {path.name for path in page.iterdir()} - {"index.html"}
    assert "--accent" in (page / "page.css").read_text()  # the palette of all pages
    assert "onnxruntime-web 1.30.0" in "".join(text for _, text in html.text)
    assert "MIT License" in (page / "onnxruntime-web-1.30.0.LICENSE.txt").read_text()


def test_the_page_connects_to_its_own_server_only(page: Path) -> None:
    (policy,) = (m["content"] for m in Page(page / "index.html").all("meta") if m.get("http-equiv"))
    directives = dict(directive.strip().split(" ", 1) for directive in (policy or "").split(";"))
    assert directives["default-src"] == directives["connect-src"] == "'self'"
    assert directives["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert "http" not in (policy or "")


def test_overwrite_replaces_a_page_and_its_runtime(page: Path, cli: Cli) -> None:
    runtime_folder(page.parent / "other", "1.31.0")
    options = ("any-size.onnx", "--output", "page", "--onnxruntime-web", "other")
    assert "--overwrite" in cli("serving", "page", *options, status=1).stderr
    assert (page / "onnxruntime-web-1.30.0.js").exists()
    cli("serving", "page", *options, "--overwrite")
    assert {path.name for path in page.glob("onnxruntime-web*")} == {
        f"onnxruntime-web-1.31.0{ending}" for ending in (".js", ".wasm", ".LICENSE.txt")
    }


def test_the_licence_of_the_package_goes_with_it(page: Path, cli: Cli) -> None:
    (page.parent / "node_modules/onnxruntime-web/LICENSE").write_text("its own text")
    cli("serving", "page", "any-size.onnx", "--output", "page", "--overwrite")
    assert (page / "onnxruntime-web-1.30.0.LICENSE.txt").read_text() == "its own text"


def refusal(cli: Cli, *arguments: object) -> str:
    error = cli("serving", "page", *arguments, status=1).stderr
    assert error.startswith("error: ") and error.count("\n") == 1 and "unexpected" not in error
    return error


def test_a_file_of_fixed_size_and_one_of_another_tool_are_refused(page: Path, model: Path, cli: Cli) -> None:
    other = onnx.load(model)
    del other.metadata_props[:]
    onnx.save(other, page.parent / "other.onnx")
    for name, reason in ((model, "8x8"), ("other.onnx", "not exported by convline")):
        error = refusal(cli, name, "--output", "new")
        assert reason in error and "`pipeline export RUN --any-size`" in error
    assert not (page.parent / "new").exists()


def test_a_model_that_fails_its_self_test_gets_no_page(page: Path, model: Path, cli: Cli) -> None:
    probe = {"images": 8, "logits": [[0.0] * 10] * 8, "tolerance": 1e-4}
    any_size(model, page.parent / "wrong.onnx", probe=probe)
    assert "failed its self-test" in refusal(cli, "wrong.onnx", "--output", "new")


def test_without_the_npm_package_the_command_says_how_to_install_it(page: Path, cli: Cli) -> None:
    (page.parent / "node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm").unlink()
    runtime_folder(page.parent / "pad", name="left-pad")
    runtime_folder(page.parent / "closed", license="SEE LICENSE")
    runtime_folder(page.parent / "torn")
    (page.parent / "torn/package.json").write_text('{"name"')
    advice = ("npm install onnxruntime-web", "--onnxruntime-web FOLDER")
    for folder, reasons in {
        "nowhere": ("package.json", *advice),
        "node_modules/onnxruntime-web": ("dist/ort-wasm-simd-threaded.wasm", *advice),
        "pad": ("left-pad", *advice),
        "torn": ("damaged", *advice),
        "closed": ("SEE LICENSE",),
    }.items():
        error = refusal(cli, "any-size.onnx", "--output", "new", "--onnxruntime-web", folder)
        assert all(reason in error for reason in reasons), error
    assert not (page.parent / "new").exists()


def test_overwrite_removes_no_file_that_is_not_of_a_page(page: Path, cli: Cli) -> None:
    (page / "notes.txt").write_text("mine")
    before = contents(page)
    assert "notes.txt" in refusal(cli, "any-size.onnx", "--output", "page", "--overwrite")
    assert contents(page) == before
    assert "is a file" in refusal(cli, "any-size.onnx", "--output", "any-size.onnx", "--overwrite")


def test_a_page_that_cannot_be_written_whole_is_not_there_and_an_earlier_one_stays(page: Path, cli: Cli) -> None:
    before = contents(page.parent)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (page / "model.onnx").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limit[1]))  # as a disk that is full
        for output in ("new", "page"):
            assert "too large" in refusal(cli, "any-size.onnx", "--output", output, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(page.parent) == before


def test_an_empty_folder_and_a_link_to_one_are_filled(page: Path, cli: Cli) -> None:
    (page.parent / "empty").mkdir()
    (page.parent / "link").symlink_to("empty")
    cli("serving", "page", "any-size.onnx", "--output", "link")
    assert (page.parent / "link").is_symlink() and contents(page.parent / "empty") == contents(page)

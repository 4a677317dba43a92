"""`serving classify --unfamiliar`: how far each image is from the training images, in tables, pages and Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet
import pytest
from PIL import Image

from convline.errors import ConvlineError
from convline.images import ImageSpec, decode
from serving import Classifier
from serving.classify import classify
from serving.job import Job
from serving.output_files import partial_path
from tests.conftest import run_command
from tests.pages import check
from tests.serving.helpers import csv_rows, encode, interrupted, json_lines, noise, write


@pytest.fixture(scope="module")
def telling(insects: Path) -> Path:
    """A file that tells how unfamiliar images are; it learned from coloured noise."""
    return insects / "any-size.onnx"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        write(folder / f"noise-{number:02}.png", encode(noise(24, 24, 3), "PNG"))
        write(folder / f"plain-{number:02}.png", encode(Image.new("RGB", (24, 24), (20 * number, 40, 90)), "PNG"))
    write(folder / "no-image.png", b"text")
    return folder


def test_a_column_has_the_output_of_the_file(images: Path, telling: Path, tmp_path: Path) -> None:
    summary = classify(Job([str(images)], telling, tmp_path / "x.csv", top_k=2, threshold=0.5, unfamiliar=True))
    rows = csv_rows(tmp_path / "x.csv")
    columns = ["path", "label", "probability", "decision", "unfamiliar", "label_2", "probability_2"]
    assert list(rows[0]) == columns and len(rows) == 24
    session, spec = onnxruntime.InferenceSession(telling), ImageSpec(24, 24, 3)
    pixels = np.stack([decode((images / row["path"]).read_bytes(), spec) for row in rows])
    (expected,) = session.run(["unfamiliar"], {"image": pixels})
    assert [float(row["unfamiliar"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(float(row["unfamiliar"]) > 1 for row in rows if row["path"].startswith("plain"))
    assert summary.tally.unfamiliar == sum(float(row["unfamiliar"]) > 1 for row in rows) >= 12
    assert f"; {summary.tally.unfamiliar} unfamiliar" in summary.sentence()


def test_without_the_option_the_table_is_as_before(images: Path, telling: Path, tmp_path: Path) -> None:
    summary = classify(Job([str(images)], telling, tmp_path / "x.csv"))
    assert list(csv_rows(tmp_path / "x.csv")[0]) == ["path", "label", "probability"]
    assert summary.tally.unfamiliar is None and "unfamiliar" not in summary.sentence()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_formats_have_the_same_numbers(images: Path, telling: Path, tmp_path: Path, ending: str) -> None:
    for name in ("x.csv", f"x.{ending}"):
        classify(Job([str(images)], telling, tmp_path / name, unfamiliar=True))
    rows = csv_rows(tmp_path / "x.csv")
    output = tmp_path / f"x.{ending}"
    others = json_lines(output) if ending == "jsonl" else pyarrow.parquet.read_table(output).to_pylist()
    assert [np.float32(row["unfamiliar"]) for row in others] == [np.float32(row["unfamiliar"]) for row in rows]


def test_the_command_counts_them_and_a_page_shows_them(images: Path, telling: Path, tmp_path: Path) -> None:
    options = ("--unfamiliar", "--output", "x.csv", "--report", "x.html", "--json")
    printed = run_command(tmp_path, "serving", "classify", images, "--model", telling, *options)
    count = json.loads(printed.stdout)["unfamiliar"]
    assert count == sum(float(row["unfamiliar"]) > 1 for row in csv_rows(tmp_path / "x.csv"))
    page = check(tmp_path / "x.html")
    assert "Unfamiliar" in page.texts("h2")
    assert f"{count} images further away" in "".join(page.texts("p"))


def test_a_killed_job_continues_with_its_numbers_and_no_others(
    images: Path, telling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "x.csv"
    classify(Job([str(images)], telling, whole, unfamiliar=True, batch_size=4))
    interrupted(Job([str(images)], telling, output, unfamiliar=True, batch_size=4), monkeypatch, after=2)
    assert partial_path(output).exists()
    with pytest.raises(ConvlineError, match="different settings: unfamiliar"):
        classify(Job([str(images)], telling, output, resume=True, batch_size=4))
    classify(Job([str(images)], telling, output, unfamiliar=True, resume=True, batch_size=4))
    assert output.read_bytes() == whole.read_bytes()
    with pytest.raises(ConvlineError, match="different settings: unfamiliar"):
        classify(Job([str(images)], telling, output, rescan=True, batch_size=4))


def test_a_finished_table_without_the_column_is_not_taken_for_one_with_it(
    images: Path, telling: Path, tmp_path: Path
) -> None:
    classify(Job([str(images)], telling, tmp_path / "x.csv"))
    with pytest.raises(ConvlineError, match="not written with --unfamiliar"):
        classify(Job([str(images)], telling, tmp_path / "x.csv", resume=True, unfamiliar=True))


def test_a_file_that_does_not_tell_is_refused(samples: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvlineError, match="pipeline export --unfamiliar"):
        classify(Job([str(samples)], model, tmp_path / "x.csv", unfamiliar=True))
    assert not list(tmp_path.iterdir())


def test_predictions_in_python_tell_it(images: Path, telling: Path) -> None:
    with Classifier(telling, "cpu", unfamiliar=True) as classifier:
        plain, image = classifier.classify([images / "plain-03.png", images / "no-image.png"])
        assert (plain.unfamiliar or 0) > 1 and plain.is_unfamiliar and image.reason == "not-an-image"
    with Classifier(telling, "cpu") as classifier:
        (plain,) = classifier.classify([images / "plain-03.png"])
        assert plain.unfamiliar is None and not plain.is_unfamiliar

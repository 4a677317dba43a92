"""`serving bench`: its figures are consistent and those of a real job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from convline.errors import ConvlineError
from serving.bench import bench
from tests.conftest import Cli
from tests.serving.helpers import encode, noise, write


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(200):
        write(tmp_path / f"images/{number}.png", encode(noise(64, 64, 3), "PNG"))
    return tmp_path / "images"


def test_what_bounds_a_job(cli: Cli, model: Path, images: Path, tmp_path: Path) -> None:
    report = json.loads(cli("serving", "bench", model, "--images", images, "--provider", "cpu", "--json").stdout)
    rates = report["images_per_second"]
    assert rates["bound"] == pytest.approx(1 / (1 / rates["decode alone"] + 1 / rates["model alone"]), rel=1e-2)
    assert rates["whole job"] > 0 and rates["of the bound"] == pytest.approx(
        rates["whole job"] / rates["bound"], rel=1e-2
    )
    assert report["bounded_by"].startswith("decode (")  # 64x64 PNGs, and a network of 8x8 images
    assert report["images"] == f"200 of {images}"
    assert str(report["batch"]["fastest_batch_size"]) in report["batch"]["images_per_second"]
    assert report["cold_start"]["seconds"] > 0.1
    assert 20 < report["cold_start"]["memory_mb"] < 1000 and 20 < report["memory_mb"] < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_images_are_generated_where_none_are_given(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.bench.GENERATED_IMAGES", 100)
    report = bench(str(model), provider="cpu")
    assert report["images"].startswith("100 generated JPEGs") and report["images_per_second"]["whole job"] > 0


def test_a_folder_without_files_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvlineError, match="holds no file"):
        bench(str(model), tmp_path, provider="cpu")
    with pytest.raises(ConvlineError, match="nowhere"):
        bench(str(model), tmp_path / "nowhere", provider="cpu")

"""HEIC: decoded where pi-heif is installed, named where it is not.

The files in `heic/` are of 64x48 pixels: red is 4 x, green 5 y, blue 40; the right half of `alpha.heic` is transparent.
`heif-enc -q 90 -p chroma=444` made them from PNGs, and pillow-heif `turned.heic`, which is to be turned by a quarter:
like those of iPhones, it says so in `irot` and in EXIF.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convline.decoders import heif
from convline.errors import ImageError
from convline.images import ImageSpec, decode, decode_with_size
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from tests.conftest import ROOT
from tests.pipeline.helpers import image_folder, write_files

needs_package = pytest.mark.skipif(find_spec("pi_heif") is None, reason="pi-heif is not installed")

RGB, GREY = ImageSpec(None, None, 3), ImageSpec(None, None, 1)
FILES = {path.stem: path.read_bytes() for path in (ROOT / "tests/convline/heic").glob("*.heic")}
Y, X = np.mgrid[0:48, 0:64]
PIXELS = np.stack([4 * X, 5 * Y, np.full_like(X, 40)], -1)
EXPECTED = {
    "rgb": PIXELS,
    "10-bit": np.stack([X * 1024 / 257, Y * 1365 / 257, np.full_like(X, 40)], -1),
    "grey": np.stack([4 * X] * 3, -1),
    "alpha": np.where(X[..., None] < 32, PIXELS, 255),
    "turned": np.rot90(PIXELS, -1),
}


def refused(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, RGB)
    return caught.value.reason, caught.value.detail


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    heif.register.cache_clear()
    yield
    heif.register.cache_clear()


@needs_package
@pytest.mark.parametrize("name", EXPECTED)
def test_heic_decodes_upright_with_its_size(name: str) -> None:
    pixels, size = decode_with_size(FILES[name], RGB)
    assert pixels.shape == EXPECTED[name].shape and size == EXPECTED[name].shape[:2]
    difference = np.abs(pixels - EXPECTED[name])
    # at the border of alpha, which is compressed as well, pixels are mixed
    assert difference.mean() < 2 and np.median(difference) <= 1
    assert decode(FILES[name], GREY).shape == (*size, 1)


@needs_package
@pytest.mark.parametrize("name", EXPECTED)
def test_a_heic_that_ends_too_early_is_truncated(name: str) -> None:
    data = FILES[name]
    for length in (20, len(data) // 3, len(data) // 2, len(data) - 1):
        assert refused(data[:length])[0] == "truncated"
    assert decode(data + bytes(9), RGB).size  # as some cameras add to the end


@needs_package
def test_the_main_brand_may_be_that_of_any_heif() -> None:
    data = FILES["rgb"].replace(b"ftypheic", b"ftypmif1")
    np.testing.assert_array_equal(decode(data, RGB), decode(FILES["rgb"], RGB))


@needs_package
def test_a_heic_that_cannot_be_decoded_is_named() -> None:
    reason, detail = refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert reason == "unsupported" and "HEIC" in detail and "pip install" not in detail


@needs_package
@pytest.mark.parametrize("seed", range(50))
def test_damage_is_a_reject_or_decodes(seed: int) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(FILES[sorted(FILES)[seed % len(FILES)]])
    for position in random.integers(12, len(data), 8):
        data[position] = random.integers(256)
    with suppress(ImageError):  # no other exception
        assert decode(bytes(data), RGB).dtype == np.uint8


@pytest.mark.usefixtures("without_package")
@pytest.mark.parametrize("name", EXPECTED)
def test_without_the_package_a_heic_is_unsupported_and_the_detail_says_what_to_install(name: str) -> None:
    reason, detail = refused(FILES[name])
    assert reason == "unsupported" and "HEIC" in detail and "pip install 'convline[heic]'" in detail


@needs_package
def test_the_package_is_imported_for_the_first_heic_only() -> None:
    code = (
        "import sys; from pathlib import Path; from convline.images import ImageSpec, decode; "
        "before = 'pi_heif' in sys.modules; decode(Path(sys.argv[1]).read_bytes(), ImageSpec(None, None, 3)); "
        "print(before, 'pi_heif' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "tests/convline/heic/rgb.heic"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.split() == ["False", "True"], result.stderr


@needs_package
def test_a_folder_with_heic_becomes_a_dataset(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pets", {"a": 5, "b": 5}, size=(48, 64))
    write_files(source, {f"a/{name}.HEIC": data for name, data in FILES.items()})
    dataset = preprocess("pets", tmp_path / "data", source, ImageFolderOptions((24, 32)))
    assert dataset.meta["rejected"] == [] and sum(dataset.meta["counts"]["train"].values()) == 12
    assert dataset.meta["sizes"]["different"] == 2
    paths = [path for split in ("train", "test") for path in dataset.paths(dataset.split(split)) or []]
    images = np.concatenate([dataset.split(split).images for split in ("train", "test")])
    for name in FILES:
        expected = decode(FILES[name], dataset.spec)
        np.testing.assert_array_equal(images[paths.index(f"a/{name}.HEIC")], expected)

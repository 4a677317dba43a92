"""The Python API: `Classifier`."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convline.images import decode
from serving import Classifier, ConvlineError, ModelError, Prediction, Reject
from tests.serving.helpers import encode, exif, noise, write


@pytest.fixture
def classifier(model: Path) -> Any:
    with Classifier(model, batch_size=3) as classifier:
        yield classifier


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven files, the second and the last unusable: batches of three are 3 + 3 + 1."""
    data = [encode(noise(8, 8), "PNG") for _ in range(7)]
    data[1], data[6] = b"garbage", data[6][:40]
    return [write(tmp_path / f"{index}.png", content) for index, content in enumerate(data)]


def test_it_says_what_it_opened(classifier: Classifier) -> None:
    assert classifier.classes == tuple("0123456789")
    assert (classifier.spec.height, classifier.spec.width, classifier.spec.channels) == (8, 8, 1)
    assert classifier.provider in ("cpu", "cuda")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_arrays_give_a_row_of_probabilities_each(classifier: Classifier, count: int) -> None:
    probability = classifier.classify_arrays(noise(count, 8, 8, 1))
    assert probability.shape == (count, 10) and probability.dtype == np.float32
    np.testing.assert_allclose(probability.sum(1), 1, atol=1e-5)


def test_an_arrays_row_does_not_depend_on_its_neighbours(classifier: Classifier) -> None:
    images = noise(7, 8, 8, 1)
    alone = np.concatenate([classifier.classify_arrays(image[None]) for image in images])
    np.testing.assert_array_equal(classifier.classify_arrays(images), alone)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 9, 1), np.uint8),
        np.zeros((2, 1, 8, 8), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((0, 9, 9, 1), np.uint8),
    ],
)
def test_arrays_of_another_dtype_or_shape_are_refused(classifier: Classifier, images: Any) -> None:
    with pytest.raises(ConvlineError, match=r"uint8 \[n, 8, 8, 1\]"):
        classifier.classify_arrays(images)


def test_files_keep_their_order_and_rejects_their_places(classifier: Classifier, files: list[Path]) -> None:
    entries = classifier.classify_files(files)
    assert [entry.path for entry in entries] == [str(path) for path in files]
    assert [type(entry) for entry in entries] == [Prediction, Reject, *[Prediction] * 4, Reject]
    assert [entry.reason for entry in entries if isinstance(entry, Reject)] == ["not-an-image", "truncated"]


def test_a_file_gets_the_row_of_its_own_pixels(classifier: Classifier, files: list[Path]) -> None:
    usable = [path for path in files if path.name not in ("1.png", "6.png")]
    probability = classifier.classify_arrays(np.stack([decode(path.read_bytes(), classifier.spec) for path in usable]))
    entries = {entry.path: entry for entry in classifier.classify_files(files)}
    for path, row in zip(usable, probability, strict=True):
        entry = entries[str(path)]
        assert isinstance(entry, Prediction)
        assert entry.labels == (classifier.classes[row.argmax()],)
        assert np.float32(entry.probabilities[0]) == row.max()


def test_top_k_lists_the_most_probable_first(classifier: Classifier, files: list[Path]) -> None:
    (entry,) = classifier.classify_files(files[:1], top_k=10)
    assert isinstance(entry, Prediction)
    assert sorted(entry.labels) == list(classifier.classes)
    assert list(entry.probabilities) == sorted(entry.probabilities, reverse=True)
    assert sum(entry.probabilities) == pytest.approx(1, abs=1e-5)
    (first_three,) = classifier.classify_files(files[:1], top_k=3)
    assert isinstance(first_three, Prediction)
    assert (first_three.labels, first_three.probabilities) == (entry.labels[:3], entry.probabilities[:3])


def test_no_files_give_no_entries(classifier: Classifier) -> None:
    assert classifier.classify_files([]) == []


def test_unusable_files_alone_give_rejects_alone(classifier: Classifier, files: list[Path]) -> None:
    missing = files[0].with_name("nowhere.png")
    entries = classifier.classify_files([files[1], missing])
    assert [entry.reason for entry in entries if isinstance(entry, Reject)] == ["not-an-image", "unreadable"]


def test_threads_share_one_classifier(classifier: Classifier) -> None:
    jobs = [noise(count, 8, 8, 1) for count in (1, 3, 7, 20) * 10]
    expected = [classifier.classify_arrays(images) for images in jobs]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(classifier.classify_arrays, jobs), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_a_batch_size_below_one_is_refused(model: Path) -> None:
    with pytest.raises(ConvlineError, match="batch size 0"):
        Classifier(model, batch_size=0)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        Classifier(tmp_path / "nowhere.onnx")


def told(entry: Prediction | Reject) -> tuple[Any, ...]:
    return (
        (entry.labels, entry.probabilities)
        if isinstance(entry, Prediction)
        else (entry.reason, entry.detail is not None)
    )


@pytest.mark.parametrize(
    "pixels",
    [noise(20, 31), noise(20, 31, 3), noise(20, 31, 4), noise(3, 4), noise(4, 3), noise(1, 1, 3), noise(8, 8)],
    ids=lambda pixels: "x".join(map(str, pixels.shape)),
)
def test_all_forms_of_an_image_give_the_same_result(classifier: Classifier, tmp_path: Path, pixels: Any) -> None:
    """A PNG file is decoded as all files are."""
    data = encode(pixels, "PNG")
    path = write(tmp_path / "a.png", data)
    forms: list[Any] = [path, str(path), data, bytearray(data), memoryview(data), Image.open(path), pixels]
    forms += [Image.fromarray(pixels), *([pixels[..., None]] if pixels.ndim == 2 else [])]
    entries = classifier.classify(forms, top_k=10)
    assert isinstance(entries[0], Prediction)
    assert {told(entry) for entry in entries} == {told(entries[0])}
    assert [entry.path for entry in entries] == [str(path)] * 2 + [f"image {place}" for place in range(2, len(forms))]
    assert classifier.classify_files(forms, top_k=10) == entries


def test_an_array_of_4_dimensions_is_a_list_of_images(classifier: Classifier) -> None:
    images = noise(7, 8, 8, 1)
    probability = classifier.classify_arrays(images)
    assert [entry.labels[0] for entry in classifier.classify(images)] == [
        classifier.classes[row.argmax()] for row in probability
    ]


def test_an_image_of_pillow_is_turned_as_its_exif_says(classifier: Classifier, tmp_path: Path) -> None:
    pixels = Image.fromarray(noise(20, 30))
    path = write(tmp_path / "a.jpg", encode(pixels, "JPEG", quality=95, exif=exif(6)))
    upright, plain = Image.open(path), Image.open(path).copy()
    plain.getexif().clear()
    of_file, of_image, of_plain = classifier.classify([path, upright, plain], top_k=10)
    assert told(of_file) == told(of_image) != told(of_plain)


def test_the_same_image_of_pillow_many_times(classifier: Classifier, tmp_path: Path) -> None:
    image = Image.open(write(tmp_path / "a.png", encode(noise(60, 60), "PNG")))
    entries = classifier.classify([image] * 20)
    assert len({told(entry) for entry in entries}) == 1 and isinstance(entries[0], Prediction)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "empty"),
        (b"garbage", "not-an-image"),
        (encode(noise(20, 20), "PNG")[:60], "truncated"),
        (Image.open(io.BytesIO(encode(noise(90, 90), "PNG")[:3000])), "truncated"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "unsupported"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        ("", "unreadable"),
        ("a\0b", "unreadable"),
    ],
)
def test_what_cannot_be_decoded_is_a_reject_in_its_place(classifier: Classifier, image: Any, reason: str) -> None:
    entries = classifier.classify([noise(8, 8), image, noise(8, 8)])
    assert [type(entry) for entry in entries] == [Prediction, Reject, Prediction]
    assert isinstance(entries[1], Reject) and entries[1].reason == reason
    assert len(entries[1].path) < 20


@pytest.mark.parametrize(
    ("images", "message"),
    [
        pytest.param("a.png", r"not one str; put it into \[ \]", id="str"),
        pytest.param(Path("a.png"), "not one PosixPath", id="path"),
        pytest.param(b"\xff\xd8\xff", "not one bytes", id="bytes"),
        pytest.param(Image.new("L", (8, 8)), "not one Image", id="pillow"),
        pytest.param(noise(8, 8), r"not an array of uint8 \[8, 8\]", id="grey-array"),
        pytest.param(noise(8, 8, 3), r"not an array of uint8 \[8, 8, 3\]", id="array"),
        pytest.param(5, "expected a list of images, not int", id="int"),
        pytest.param(None, "not NoneType", id="none"),
        pytest.param([None], "image 0 is of type NoneType; each image is a path", id="list-of-none"),
        pytest.param([noise(8, 8), 1.5], "image 1 is of type float", id="float"),
        pytest.param([["a.png"]], "image 0 is of type list", id="list-of-lists"),
        pytest.param([io.BytesIO(b"a")], "image 0 is of type BytesIO", id="open-file"),
        pytest.param([noise(8, 8).astype(np.float32)], r"image 0 is an array of float32 \[8, 8\]", id="floats"),
        pytest.param([noise(8, 8) > 9], r"an array of bool \[8, 8\]", id="bools"),
        pytest.param([noise(8, 8).astype(np.int64)], "an array of int64", id="integers"),
        pytest.param([noise(8, 8, 2)], r"an array of uint8 \[8, 8, 2\]", id="two-channels"),
        pytest.param([noise(3, 8, 8)], r"an array of uint8 \[3, 8, 8\]", id="channels-first"),
        pytest.param([noise(8)], r"an array of uint8 \[8\]", id="row"),
        pytest.param(np.zeros((2, 8, 8, 3)), r"an array of float64 \[8, 8, 3\]", id="batch-of-floats"),
    ],
)
def test_anything_else_is_a_type_error(classifier: Classifier, images: Any, message: str) -> None:
    for method in (classifier.classify, classifier.classify_files):
        with pytest.raises(TypeError, match=message):
            method(images)


def test_a_path_may_be_any_object_that_has_one(classifier: Classifier, files: list[Path]) -> None:
    class Named(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(files[0])

    assert classifier.classify([Named()]) == classifier.classify([files[0]])

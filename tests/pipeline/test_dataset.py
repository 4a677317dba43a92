import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import Dataset
from pipeline.preparing.held_out_splits import stratified_sample
from pipeline.preprocess import preprocess
from tests.conftest import Cli
from tests.pipeline.helpers import contents, image_folder, refused

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


@pytest.fixture
def pets(tmp_path: Path) -> Dataset:
    counts = {"train/cat": 12, "train/dog": 8, "test/cat": 3, "test/dog": 3}
    return preprocess("pets", tmp_path / "data", image_folder(tmp_path / "pets", counts))


def quotas(labels: np.ndarray, share: int | float, seed: int = 0) -> list[int]:
    """How many images of each class are held out."""
    return np.bincount(labels[stratified_sample(labels, share, seed)], minlength=labels.max() + 1).tolist()


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (10, [6, 3, 1]),
        (50, [30, 15, 5]),
        (1, [1, 0, 0]),
        (5, [3, 2, 0]),  # 3.0, 1.5, 0.5: the remainders are equal, so the first class rounds up
        (7, [4, 2, 1]),  # 4.2, 2.1, 0.7: the third class has the largest remainder
        (8, [5, 2, 1]),  # 4.8, 2.4, 0.8
        (99, [59, 30, 10]),  # 59.4, 29.7, 9.9
        (0.1, [6, 3, 1]),
        (0.5, [30, 15, 5]),
        (0.02, [1, 1, 1]),  # 1.2, 0.6, and at least one of a class that has two
    ],
)
def test_every_class_is_sampled_in_proportion(share: int | float, expected: list[int]) -> None:
    assert quotas(LABELS, share) == expected


def test_a_class_of_one_image_keeps_it_for_training() -> None:
    assert quotas(np.array([0, 0, 0, 0, 1]), 0.4) == [2, 0]


@pytest.mark.parametrize("count", range(1, 100))
def test_a_count_is_held_out_exactly_and_in_proportion(count: int) -> None:
    held_out = quotas(LABELS, count)
    assert sum(held_out) == count
    for quota, size in zip(held_out, (60, 30, 10), strict=True):
        assert abs(quota - size * count / 100) < 1


def test_rows_are_ascending_and_without_repeats() -> None:
    rows = stratified_sample(np.random.default_rng(0).permutation(LABELS), 37, 5)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()


def test_the_sample_depends_on_the_seed_alone() -> None:
    assert stratified_sample(LABELS, 20, 3).tolist() == stratified_sample(LABELS, 20, 3).tolist()
    assert stratified_sample(LABELS, 20, 3).tolist() != stratified_sample(LABELS, 20, 4).tolist()


def test_no_image_of_a_class_is_preferred() -> None:
    drawn = np.bincount(np.concatenate([stratified_sample(LABELS, 10, seed) for seed in range(300)]), minlength=100)
    # 300 draws at 1 in 10: 30 each, standard deviation 5.2
    assert drawn.min() > 5 and drawn.max() < 60


@pytest.mark.parametrize("count", [100, 101])
def test_holding_out_everything_is_refused(count: int) -> None:
    with refused(str(count), "100 images"):
        stratified_sample(LABELS, count, 0)


@pytest.mark.parametrize(("validation", "sizes"), [(5, (15, 5)), (0.25, (15, 5)), (0.5, (10, 10)), (19, (1, 19))])
def test_train_and_validation_are_disjoint_and_complete(
    pets: Dataset, validation: int | float, sizes: tuple[int, int]
) -> None:
    train, held_out = pets.split("train", validation), pets.split("validation", validation)
    assert (len(train), len(held_out)) == sizes
    assert sorted([*train.rows, *held_out.rows]) == list(range(20))


def test_validation_is_cut_from_every_class(pets: Dataset) -> None:
    held_out = pets.split("validation", 5)
    assert np.bincount(held_out.labels[held_out.rows]).tolist() == [3, 2]


def test_validation_depends_on_the_seed(pets: Dataset) -> None:
    drawn = [pets.split("validation", 5, seed).rows.tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_validation_train_is_everything(pets: Dataset) -> None:
    assert pets.split("train").rows.tolist() == list(range(20))


@pytest.mark.parametrize("validation", [0, 5, 0.5])
def test_test_is_the_same_whatever_validation_is(pets: Dataset, validation: int | float) -> None:
    split = pets.split("test", validation, seed=validation != 0)
    assert split.rows.tolist() == list(range(6))
    np.testing.assert_array_equal(split.images, np.load(pets.folder / "test.images.npy"))
    np.testing.assert_array_equal(split.labels, np.load(pets.folder / "test.labels.npy"))


@pytest.mark.parametrize(("size", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_batches_hold_the_images_and_labels_of_a_split_in_order(pets: Dataset, size: int, sizes: list[int]) -> None:
    split = pets.split("validation", 5)
    batches = list(split.batches(size))  # copies, which stay valid when the memory of the map is released
    assert [len(images) for images, _ in batches] == [len(labels) for _, labels in batches] == sizes
    whole, labels = np.load(pets.folder / "train.images.npy"), np.load(pets.folder / "train.labels.npy")
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), whole[split.rows])
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), labels[split.rows])


def test_shards_of_a_split_do_not_overlap_and_are_complete(pets: Dataset) -> None:
    split = pets.split("train")
    shards = [split.shard(3, index) for index in range(3)]
    assert [len(shard) for shard in shards] == [7, 7, 6]
    assert sorted(np.concatenate([shard.rows for shard in shards])) == list(range(20))


def test_the_first_images_of_a_split_are_its_first_rows(pets: Dataset) -> None:
    split = pets.split("validation", 5)
    assert split.take(2).rows.tolist() == split.rows[:2].tolist()
    assert len(split.take(None)) == len(split.take(100)) == 5


def test_a_split_that_is_changed_in_memory_is_not_changed_on_disk(pets: Dataset) -> None:
    before = contents(pets.folder)
    pets.split("train").images[:] = 0
    assert contents(pets.folder) == before


def test_a_validation_split_that_is_empty_is_refused(pets: Dataset) -> None:
    with refused("validation", "pets", "data.validation"):
        pets.split("validation")


def test_a_validation_split_that_leaves_nothing_is_refused(pets: Dataset) -> None:
    with refused("20 of 20"):
        pets.split("train", 20)


def test_a_missing_dataset_is_named_with_the_command_that_prepares_it(tmp_path: Path) -> None:
    with refused("mnist", str(tmp_path), "pipeline preprocess mnist"):
        Dataset.open(tmp_path, "mnist")


@pytest.mark.parametrize("damaged", [b"", b"{", b'{"format": 1, "na', b"\xff\xfe\x00", b"\0" * 50, b"[]", b"null"])
def test_a_damaged_meta_file_is_named(pets: Dataset, damaged: bytes) -> None:
    (pets.folder / "meta.json").write_bytes(damaged)
    with refused(str(pets.folder), "prepare"):
        Dataset.open(pets.folder.parent, "pets")


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_format_is_refused_with_both_named(pets: Dataset, version: int | None) -> None:
    path = pets.folder / "meta.json"
    path.write_text(json.dumps({**pets.meta, "format": version}))
    with refused(str(pets.folder), f"format {version}", "reads 1"):
        Dataset.open(pets.folder.parent, "pets")


@pytest.mark.parametrize("name", ["test.images.npy", "test.labels.npy"])
@pytest.mark.parametrize("keep", [None, 0, 50, -1])
def test_a_damaged_array_is_named(pets: Dataset, name: str, keep: int | None) -> None:
    path = pets.folder / name
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[:keep])
    with refused(str(pets.folder), "prepare"):
        pets.split("test")


def test_a_missing_dataset_exits_1_with_one_sentence(cli: Cli, tmp_path: Path) -> None:
    result = cli("pipeline", "samples", "pets", status=1)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "pipeline preprocess pets" in result.stderr
    assert contents(tmp_path) == {}

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from pipeline.dataset import Split
from pipeline.training.batch_loader import BatchLoader

CPU = torch.device("cpu")
SAMPLINGS = ["epoch", "independent"]


def split(count: int, whole: int | None = None) -> Split:
    """Every second row of `whole` images; image i is filled with i, its label is 3 i."""
    whole = whole or 2 * count
    images = np.arange(whole, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(3, 2)
    return Split("train", images, 3 * np.arange(whole), np.arange(0, 2 * count, 2))


def batches(sampling: Any = "epoch", count: int = 10, batch_size: int = 4, seed: int = 0) -> BatchLoader:
    return BatchLoader(split(count), sampling, batch_size, seed, CPU)


def seen(loader: BatchLoader, steps: range) -> list[int]:
    return [int(position) for step in steps for position in loader.positions(step)]


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (10, 10), (10, 3), (7, 5), (3, 1)])
def test_a_pass_sees_every_image_once_wherever_its_batches_begin(count: int, batch_size: int) -> None:
    passes = 6
    order = seen(batches("epoch", count, batch_size), range(-(-passes * count // batch_size)))
    for number in range(passes):
        assert sorted(order[number * count : (number + 1) * count]) == list(range(count))


def test_every_pass_has_its_own_order() -> None:
    order = seen(batches("epoch", 10, 10), range(20))
    assert len({tuple(order[start : start + 10]) for start in range(0, 200, 10)}) == 20


@pytest.mark.parametrize(("count", "batch_size"), [(5, 12), (5, 5), (5, 6), (1, 4)])
def test_a_batch_may_hold_more_than_one_pass(count: int, batch_size: int) -> None:
    loader = batches("epoch", count, batch_size)
    order = seen(loader, range(count))
    assert len(order) == count * batch_size
    for start in range(0, len(order), count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert loader.load(0)[0].shape == (batch_size, 2, 3, 1)


def test_an_independent_draw_has_no_repeats() -> None:
    loader = batches("independent", 10, 8)
    for step in range(200):
        assert len(set(loader.positions(step).tolist())) == 8


def test_independent_draws_differ_between_steps() -> None:
    loader = batches("independent", 100, 10)
    assert len({tuple(loader.positions(step)) for step in range(200)}) == 200


def test_independent_draws_see_every_image_equally_often() -> None:
    drawn = np.bincount(seen(batches("independent", 10, 4), range(1000)), minlength=10)
    # 1000 draws at 4 in 10: 400 each, standard deviation 15.5
    assert drawn.min() > 320 and drawn.max() < 480


def test_an_independent_draw_may_be_the_whole_split_but_not_more() -> None:
    assert sorted(batches("independent", 10, 10).positions(3)) == list(range(10))
    with pytest.raises(ValueError, match=r"11 .*10"):
        batches("independent", 10, 11)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_step_sees_the_same_images_whichever_steps_came_before(sampling: Literal["epoch", "independent"]) -> None:
    loader = batches(sampling, 100, 7)
    through_all = [loader.positions(step).tolist() for step in range(1001)]
    for step in (1000, 0, 999, 14):  # 14: one of the batches that end a pass and begin the next
        assert batches(sampling, 100, 7).positions(step).tolist() == through_all[step]
        assert loader.positions(step).tolist() == through_all[step]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_another_seed_sees_other_images(sampling: Literal["epoch", "independent"]) -> None:
    drawn = {tuple(seen(batches(sampling, 100, 20, seed), range(2))) for seed in range(10)}
    assert len(drawn) == 10


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_global_random_state_does_not_matter(sampling: Literal["epoch", "independent"]) -> None:
    expected = batches(sampling).positions(5).tolist()
    np.random.seed(99)
    torch.manual_seed(99)
    assert batches(sampling).positions(5).tolist() == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_images_and_labels_are_those_of_the_rows_drawn(sampling: Literal["epoch", "independent"]) -> None:
    loader = batches(sampling, 10, 6)
    for step in range(20):
        images, labels = loader.load(step)
        assert (images.dtype, images.shape) == (torch.uint8, (6, 2, 3, 1))
        assert (labels.dtype, labels.shape) == (torch.int64, (6,))
        # position p of the split is row 2 p, whose label is 6 p
        assert images[:, 1, 2, 0].tolist() == [2 * position for position in loader.positions(step)]
        assert labels.tolist() == [6 * position for position in loader.positions(step)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_rows_that_are_not_in_the_split_are_never_drawn(sampling: Literal["epoch", "independent"]) -> None:
    loader = batches(sampling, 10, 6)
    drawn = {int(image[0, 0, 0]) for step in range(50) for image in loader.load(step)[0]}
    assert drawn == set(range(0, 20, 2))


def mapped(folder: Path, count: int, side: int) -> Split:
    """A split of noise in a memory-mapped file, as `Dataset.split` opens it."""
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))
    return Split("train", np.load(folder / "images.npy", mmap_mode="c"), np.arange(count), np.arange(count))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_streamed_batches_equal_those_held_in_memory(tmp_path: Path, sampling: Literal["epoch", "independent"]) -> None:
    source = mapped(tmp_path, 50, 8)
    held = BatchLoader(source, sampling, 8, 0, CPU)
    streamed = BatchLoader(source, sampling, 8, 0, CPU, memory_limit=50 * 8 * 8 * 3 - 1)
    assert "held on cpu" in held.description
    assert "streamed" in streamed.description
    for step in [*range(20), 5, 6, 7, 40, 0]:  # in order, backwards, forwards and skipping
        for one, other in zip(streamed.load(step), held.load(step), strict=True):
            assert torch.equal(one, other)


def test_streaming_keeps_no_pages_of_the_file(tmp_path: Path) -> None:
    source = mapped(tmp_path, 400, 256)  # 79 MB
    # small batches, because the kernel may read up to 4 MB around each image
    streamed = BatchLoader(source, "epoch", 2, 0, CPU, memory_limit=0)
    largest = 0
    for step in range(200):
        streamed.load(step)
        found = re.search(rf"{tmp_path}/images.npy\n.*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.DOTALL)
        assert found
        largest = max(largest, int(found[1]) * 1024)
    assert largest < source.images.nbytes / 4


LABELS = np.array([5] * 7 + [1] * 2 + [3] * 4)  # classes of 7, 2 and 4 images


def balanced(batch_size: int, seed: int = 0) -> BatchLoader:
    """Every second row is in the split, with the labels above; image i is filled with i."""
    images = np.arange(2 * len(LABELS), dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(3, 2)
    labels = np.random.default_rng(1).permutation(LABELS)
    return BatchLoader(
        Split("train", images, labels.repeat(2), 2 * np.arange(len(LABELS))), "balanced", batch_size, seed, CPU
    )


@pytest.mark.parametrize("batch_size", [3, 4, 7, 30])
def test_balanced_sampling_sees_all_classes_equally_often(batch_size: int) -> None:
    loader = balanced(batch_size)
    labels = np.concatenate([loader.load(step)[1].numpy() for step in range(60)])
    for turn in labels[: len(labels) // 3 * 3].reshape(-1, 3):
        assert sorted(turn) == [1, 3, 5]
    assert len({tuple(turn) for turn in labels[: len(labels) // 3 * 3].reshape(-1, 3)}) == 6  # in every order


@pytest.mark.parametrize("batch_size", [3, 4, 7, 30])
def test_balanced_sampling_sees_each_image_of_a_class_once_in_a_pass_over_it(batch_size: int) -> None:
    loader = balanced(batch_size)
    order = seen(loader, range(840 // batch_size))
    of_position = loader._split.labels[loader._split.rows]
    for label, count in ((5, 7), (1, 2), (3, 4)):
        members = [position for position in order if of_position[position] == label]
        passes = [members[start : start + count] for start in range(0, len(members) - count + 1, count)]
        assert len(passes) > 20
        assert all(len(set(one)) == count for one in passes)
        assert len(set(map(tuple, passes))) > 1


def test_balanced_sampling_is_a_function_of_seed_and_step() -> None:
    loader = balanced(7)
    through_all = [loader.positions(step).tolist() for step in range(301)]
    for step in (300, 0, 299, 14):
        assert balanced(7).positions(step).tolist() == through_all[step]
        assert loader.positions(step).tolist() == through_all[step]
    assert len({tuple(seen(balanced(7, seed), range(2))) for seed in range(10)}) == 10
    images, labels = loader.load(5)
    rows = loader._split.rows[loader.positions(5)]
    assert images[:, 0, 0, 0].tolist() == rows.tolist()
    assert labels.tolist() == loader.labels(5).tolist() == loader._split.labels[rows].tolist()

"""Damaged checkpoints: never loaded with wrong contents, and the user is told when an older one is used."""

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from convline.errors import ConvlineError
from pipeline import checkpoint
from pipeline.checkpoint import load, load_newest, paths, save
from pipeline.network import load_network
from pipeline.run import Run
from tests.pipeline.helpers import refused


def state(seed: int = 0) -> dict[str, Any]:
    """A state like that of a training: tensors of several types and shapes, and plain values."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.25)
    network(torch.rand(5, 4)).square().sum().backward()
    optimizer.step()
    parts = {"raw": network.state_dict(), "averaged": network.state_dict(), "optimizer": optimizer.state_dict()}
    return {**parts, "threads": 2, "ranks": 1, "monitor": {"elapsed": 1.5, "smoothed_loss": float(seed)}}


def is_same(one: Any, other: Any) -> bool:
    """Whether types and values are the same, at any depth."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and one == other


def flips(content: bytes, count: int) -> Iterator[bytes]:
    """`content` with one bit flipped, at `count` random positions."""
    draw = random.Random(count)
    for _ in range(count):
        flipped = bytearray(content)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        yield bytes(flipped)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_checkpoint_loads_other_contents(tmp_path: Path, count: int) -> None:
    path = save(tmp_path, 7, state())
    whole = load(path)
    refusals = 0
    for flipped in flips(path.read_bytes(), count):
        path.write_bytes(flipped)
        loaded = load(path)
        refusals += loaded is None
        assert loaded is None or is_same(loaded, whole)
    assert refusals > 0.9 * count  # the others hit the prefix of the checksum, which is not verified without it


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_flipped_bit_of_a_checkpoint_without_a_checksum_raises_an_unexpected_exception(
    tmp_path: Path, count: int
) -> None:
    path = tmp_path / "step-7.pt"
    torch.save({"format": 1, "step": 7, **state()}, path)
    assert load(path) is not None
    for flipped in flips(path.read_bytes(), count):
        path.write_bytes(flipped)
        with suppress(ConvlineError):  # the flipped bit may change the format number
            load(path)


def test_a_truncated_checkpoint_is_intact_or_skipped(tmp_path: Path) -> None:
    path = save(tmp_path, 7, state())
    whole, content = load(path), path.read_bytes()
    for length in [*range(0, len(content), 61), *range(len(content) - checkpoint.CHECKSUM_LENGTH - 3, len(content))]:
        path.write_bytes(content[:length])
        loaded = load(path)
        assert loaded is None or is_same(loaded, whole)
    path.write_bytes(content[: len(content) // 2])
    assert load(path) is None


def test_what_a_checkpoint_holds_is_what_was_saved(tmp_path: Path) -> None:
    assert is_same(load(save(tmp_path, 7, state())), {"format": 1, "step": 7, **state()})


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04", b"sha256:" + b"0" * 64])
def test_a_file_that_is_not_a_checkpoint_is_skipped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "step-7.pt").write_bytes(content)
    assert load(tmp_path / "step-7.pt") is None


@pytest.mark.parametrize("other", [[1], {"format": "1"}, {"format": 1}, {"format": 1, "step": 7, "raw": 1}])
def test_a_torch_file_that_is_not_a_checkpoint_is_skipped(tmp_path: Path, other: object) -> None:
    torch.save(other, tmp_path / "step-7.pt")
    assert load(tmp_path / "step-7.pt") is None


def damage(path: Path) -> None:
    """Flip a bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_older_checkpoint_is_used_and_both_steps_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, state(step))
    damage(tmp_path / "step-30.pt")
    newest = load_newest(tmp_path)
    assert newest is not None and newest["step"] == 20
    logged = capsys.readouterr().err
    assert "step-30.pt is damaged and skipped" in logged
    assert "of step 30, is lost; using the one of step 20 instead" in logged


def test_a_new_checkpoint_is_kept_beside_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    """A training that starts again, at a step below those of three damaged checkpoints."""
    for step in (10, 20, 30):
        damage(save(tmp_path, step, state()))
    for step in (5, 6, 7, 8):
        save(tmp_path, step, state())
    assert [checkpoint.step_of(path) for path in paths(tmp_path)] == [6, 7, 8, 10, 20, 30]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_exported(own_project: Path) -> None:
    run = Run.open(own_project / "runs/digits")
    damage(run.folder / "checkpoints/step-300.pt")
    with refused("every checkpoint in", "--resume"):
        load_network(run)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("recipe.toml", ('standardize = "per-channel"', 'standardize = "scale"'), "recipe.preprocess.standardize"),
        ("recipe.toml", ("validation = 0", "validation = 100"), "recipe.data.validation"),
        ("recipe.toml", ("seed = 0", "seed = 1"), "recipe.seed"),
    ],
)
def test_a_recipe_changed_after_training_does_not_reach_the_weights(
    own_project: Path, file: str, change: tuple[str, str], named: str
) -> None:
    path = own_project / "runs/digits" / file
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with refused(named, "step 300"):
        load_network(Run.open(path.parent))


def test_statistics_changed_in_run_json_do_not_reach_the_weights(own_project: Path) -> None:
    path = own_project / "runs/digits/run.json"
    info = json.loads(path.read_text())
    info["dataset"]["mean"][0] += 1
    path.write_text(json.dumps(info))
    run = Run.open(path.parent)
    with refused("dataset.mean", "step 300"):
        load_network(run)
    with refused("its mean differ"):
        run.dataset(own_project / "data")


def test_classes_in_another_order_in_run_json_are_refused(own_project: Path) -> None:
    path = own_project / "runs/digits/run.json"
    info = json.loads(path.read_text())
    info["dataset"]["classes"].reverse()
    path.write_text(json.dumps(info))
    with refused("run.json", "classes"):
        Run.open(path.parent)


def test_weights_that_do_not_fit_the_recipe_are_refused(own_project: Path) -> None:
    """For a checkpoint of an older version, which does not record its recipe."""
    path = own_project / "runs/digits/checkpoints/step-300.pt"
    older = torch.load(path, weights_only=True)
    del older["provenance"]
    torch.save(older, path)
    recipe = own_project / "runs/digits/recipe.toml"
    recipe.write_text(recipe.read_text().replace("hidden_size = ", "hidden_size = 1"))
    with refused("does not fit its recipe's network", "size mismatch"):
        load_network(Run.open(recipe.parent))

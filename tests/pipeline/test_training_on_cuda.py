"""What can be known of training on a GPU without one (see fake_cuda.py), and in float16."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from models import head_layers
from pipeline import recipe
from pipeline.network import build_network
from pipeline.preparing.official_datasets import known_datasets
from pipeline.recipe import Recipe
from pipeline.recipe_sections import AugmentSection, ColorJitter, ResizedCrop
from pipeline.run import Run
from pipeline.tracking.points import PointWriter, read_points
from pipeline.training.distributed import RankGroup
from pipeline.training.progress_log import ProgressLog, progress_log
from pipeline.training.training_state import Batch, TrainingState
from pipeline.training.trivial_augment import OPERATIONS, trivial_augment
from tests.conftest import Cli
from tests.pipeline.fake_cuda import DEVICE, DeviceAlone, fake_cuda, values_may_be_read, zero_gradients
from tests.pipeline.small_datasets import GREY, write_dataset

IMAGES = 16
# a value for each field that is not its default; with what it needs
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "random_crop": {"random_crop": True},
    "padding": {"padding": 2, "random_crop": True},
    "padding_mode": {"padding_mode": "reflect", "padding": 2, "random_crop": True},
    "resized_crop": {"resized_crop": ResizedCrop()},
    "flip": {"flip": True},
    "vertical_flip": {"vertical_flip": True},
    "rotate": {"rotate": 20.0},
    "trivial": {"trivial": True},
    "color_jitter": {"color_jitter": ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)},
    "brightness": {"brightness": 63.0},
    "contrast": {"contrast": (0.2, 1.8)},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "while_frozen": {"while_frozen": True, "flip": True},
}
WAYS = {
    "alternating flips": ["augment.flip=alternating"],
    "label smoothing": ["train.label_smoothing=0.1"],
    "class weights": ["train.class_weights=balanced", "data.sampling=balanced"],
    "all that mixes": [
        *("augment.mixup=0.2", "augment.cutmix=1.0", "train.class_weights=balanced", "train.label_smoothing=0.1")
    ],
    "sum": ["train.loss=sum", "train.accumulate=2", "data.sampling=independent"],
    "limited gradients": ["train.clip_norm=1.0"],
}
OPTIMIZERS = get_args(Recipe.model_fields["optimizer"].annotation)


def small_recipe(name: str, overrides: list[str]) -> Recipe:
    """A shipped recipe for a training of a few steps on `noise`, with given numbers instead of those of its weights."""
    settings = ["train.batch_size=4", "data.validation=4", "data.dataset=noise", "train.evaluate_every=4"]
    if recipe.load(name).preprocess.standardize == "weights":
        settings.append(GREY)
    loaded = recipe.load(name, [*settings, *overrides])
    return loaded.model_copy(update={"train": loaded.train.with_steps(IMAGES)})


def run_on_noise(folder: Path, name: str, settled: Recipe) -> tuple[Run, Any]:
    """A run of a recipe, and its dataset: noise of the size of the dataset that it names, or of small photographs."""
    known = known_datasets().get(recipe.load(name).data.dataset)
    shape = known.image if known else [64, 64, 3]
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, *shape), np.uint8), np.arange(IMAGES) % 2
    dataset = write_dataset(folder / "data", "noise", {"train": noise, "test": noise})
    return Run.create(folder / "run", settled, dataset), dataset


def head_of(settled: Recipe, image: dict[str, int]) -> list[str]:
    if not settled.treats_head_apart:
        return []
    shape = (image["channels"], *(settled.preprocess.crop_size or (image["height"], image["width"])))
    return head_layers(settled.model.name, shape, 2, **settled.model.options)


def check_trains_on_cuda(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, settled: Recipe, memory_limit: int | None = None
) -> None:
    """Take a step of each phase, with everything that a step may need: no part may wait for the device."""
    run, dataset = run_on_noise(folder, name, settled)
    served = build_network(settled, dataset.meta)
    with fake_cuda(monkeypatch):
        head = head_of(settled, dataset.meta["image"])
        state = TrainingState.create(run, dataset, served, head, DEVICE, RankGroup(), memory_limit)
        with progress_log(run, RankGroup()) as progress:
            for step in sorted({0, settled.train.frozen_steps} - {settled.train.steps}):
                with values_may_be_read(monkeypatch):
                    state.begin(step)
                batch = take_step(monkeypatch, state, step, progress)
            with values_may_be_read(monkeypatch):
                if state.features is None:
                    progress.summarize_layers(step, served.network, batch.inputs)
                state.evaluate(step, progress)


def take_step(monkeypatch: pytest.MonkeyPatch, state: TrainingState, step: int, progress: ProgressLog) -> Batch:
    """What train_steps does at every step. Fails where it waits for the device."""
    augments = not state.augment.is_off and (state.run.recipe.augment.while_frozen or not state.is_frozen)
    with zero_gradients(monkeypatch, state.parameters), DeviceAlone():
        batch = state.load(step)
        state.begin_step(step)
        result = state.compute_gradients(batch, step)
        norm = state.update()
        state.average.update(step)
        progress.smooth(result.loss)
        tensors = [*batch.tensors(), result.logits, result.cross_entropy, *result.penalties.values(), result.loss]
        tensors += [state.gradient_norm() if norm is None else norm]
    assert {tensor.device for tensor in tensors} == {DEVICE}
    assert (batch.mixing is not None) == (augments and state.augment.needs_whole_batch)
    assert result.penalties.keys() == {f"l2/{layer}" for layer in state.run.recipe.train.l2}
    assert (norm is not None) == (state.run.recipe.train.clip_norm > 0)
    return batch


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_trains_and_evaluates_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_trains_on_cuda(tmp_path, monkeypatch, name, small_recipe(name, []))


@pytest.mark.parametrize("field", AugmentSection.model_fields)
def test_an_augmentation_runs_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """A new field of AugmentSection needs a value in AUGMENTATIONS."""
    augment = AugmentSection(**AUGMENTATIONS[field])
    assert getattr(augment, field) != getattr(AugmentSection(), field)
    name, settings = ("photos", ["train.freeze_steps=0"]) if field == "while_frozen" else ("cifar10", [])
    settled = small_recipe(name, settings).model_copy(update={"augment": augment})
    check_trains_on_cuda(tmp_path, monkeypatch, name, settled)


def test_every_operation_of_trivial_augment_runs_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch), DeviceAlone():
        images = torch.empty((len(OPERATIONS), 24, 24, 3), dtype=torch.uint8, device=DEVICE)
        changed = trivial_augment(images, np.arange(len(OPERATIONS)), np.full(len(OPERATIONS), 0.5))
    assert (changed.device, changed.shape) == (DEVICE, images.shape)


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_train_runs_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    check_trains_on_cuda(tmp_path, monkeypatch, "cifar10", small_recipe("cifar10", WAYS[way]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda section: section.__name__)
def test_an_optimizer_updates_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any) -> None:
    (name,) = get_args(optimizer.model_fields["name"].annotation)
    settled = small_recipe("cifar10", [f"optimizer.name={name}", "optimizer.weight_decay=0.01"])
    check_trains_on_cuda(tmp_path, monkeypatch, "cifar10", settled)


def test_images_that_are_streamed_to_cuda_come_from_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trains_on_cuda(tmp_path, monkeypatch, "cifar10", small_recipe("cifar10", []), memory_limit=0)


def test_a_float16_step_that_overflows_changes_no_weight_and_the_next_ones_go_on(tmp_path: Path) -> None:
    """By torch's autocast and gradient scaler for the CPU, which behave as those for CUDA do."""
    settled = small_recipe("digits", ["train.precision=float16", "train.clip_norm=1.0"])
    run, dataset = run_on_noise(tmp_path, "digits", settled)
    state = TrainingState.create(
        run, dataset, build_network(settled, dataset.meta), [], torch.device("cpu"), RankGroup()
    )
    state.scaler = GradScaler("cpu", init_scale=2.0**100)
    state.begin(0)

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in state.parameters])

    before = weights()
    batch = state.load(0)
    state.begin_step(0)
    assert state.compute_gradients(batch, 0).loss.isfinite()
    norm = state.update()
    assert norm is not None and not norm.isfinite()
    assert torch.equal(weights(), before)
    assert state.scaler.get_scale() == 2.0**99
    for step in range(1, 9):
        state.scaler.update(2.0**10)
        batch = state.load(step)
        state.begin_step(step)
        state.compute_gradients(batch, step)
        norm = state.update()
        assert norm is not None and 0 < norm < 100
    assert weights().isfinite().all() and not torch.equal(weights(), before)
    assert {p.dtype for p in state.parameters} == {torch.float32}


def test_float16_is_refused_on_the_cpu_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    options = ("--set", "train.precision=float16", "--device", "cpu", "--tracking", "none")
    error = cli("pipeline", "train", "digits", *options, status=1).stderr
    assert "train.precision float16 needs a CUDA device; set train.precision to float32, or to bfloat16" in error
    assert error.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_norm_that_overflowed_is_left_out_of_the_log(tmp_path: Path) -> None:
    """JSON has neither infinity nor NaN."""
    path = tmp_path / "metrics.jsonl"
    writer = PointWriter(path)
    writer.write(3, {"loss": 0.5, "gradient_norm": float("inf"), "other": float("nan")})
    writer.close()

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] == 0.5
    (point,) = read_points(path)
    assert point.values == {"loss": 0.5}

"""The training loss against hand-written NumPy, gradients in parts, and limited gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

import models
from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.run import Run
from pipeline.train import train
from pipeline.training.distributed import RankGroup
from pipeline.training.loss import CrossEntropy, balanced_class_weights
from pipeline.training.training_state import TrainingState
from tests.conftest import Cli
from tests.pipeline.helpers import refused
from tests.pipeline.small_datasets import GREY, pictures, write_dataset
from tests.trainings import final_state, points


def by_hand(
    logits: np.ndarray, labels: np.ndarray, smoothing: float, class_weights: np.ndarray | None, mixing: Any, mean: bool
) -> float:
    """Image by image: the target is a row of probabilities, the loss -Σ target · log softmax."""
    total = 0.0
    for i, row in enumerate(logits):
        logs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        parts = [(labels[i], 1.0)] if mixing is None else [(labels[i], mixing[1][i]), (mixing[0][i], 1 - mixing[1][i])]
        for label, share in parts:
            target = np.full(len(row), smoothing / len(row))
            target[label] += 1 - smoothing
            weight = 1.0 if class_weights is None else class_weights[label]
            total -= share * weight * (target * logs).sum()
    return total / len(logits) if mean else total


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formulas(smoothing: float, weighted: bool, mixed: bool, reduction: Any) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (9, 4)), rng.integers(0, 4, 9)
    class_weights = np.array([0.5, 1.0, 2.0, 4.0]) if weighted else None
    mixing = (rng.permutation(labels), rng.random(9)) if mixed else None
    loss = CrossEntropy(reduction, smoothing, None if class_weights is None else torch.tensor(class_weights))
    tensors = None if mixing is None else (torch.tensor(mixing[0]), torch.tensor(mixing[1]))
    found = loss(torch.tensor(logits), torch.tensor(labels), tensors).item()
    assert found == pytest.approx(by_hand(logits, labels, smoothing, class_weights, mixing, reduction == "mean"))


@pytest.mark.parametrize("counts", [[5, 5], [1, 2, 3], [300, 7, 40, 1]])
def test_balanced_class_weights_are_scikit_learns(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=labels)
    np.testing.assert_allclose(balanced_class_weights(counts).numpy(), expected, rtol=1e-6)


def test_class_weights_average_to_1_over_the_images_where_a_class_has_none() -> None:
    counts = [3, 0, 9]
    weights = balanced_class_weights(counts).numpy()
    assert weights[1] == 0
    assert np.average(weights, weights=counts) == pytest.approx(1)


def state(folder: Path, data_dir: Path, *settings: str) -> TrainingState:
    """A training of a small network without BatchNorm and dropout on colours."""
    common = ["data.dataset=colours", "data.validation=0", "model.name=slides_convnet", GREY, "train.batch_size=12"]
    recipe = load("digits", [*common, "train.evaluate_every=0", *settings])
    if not (data_dir / "colours").exists():
        write_dataset(data_dir, "colours", {"train": pictures([9, 3, 6], 16), "test": pictures([2, 2, 2], 16, 1)})
    dataset = Dataset.open(data_dir, "colours")
    run = Run.create(folder, recipe, dataset)
    served = build_network(recipe, dataset.meta)
    training = TrainingState.create(run, dataset, served, ["output"], torch.device("cpu"), RankGroup())
    training.begin(0)
    return training


def gradients(training: TrainingState, step: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    batch = training.load(step)
    training.begin_step(step)
    result = training.compute_gradients(batch, step)
    return [p.grad for p in training.parameters if p.grad is not None], result.logits, result.cross_entropy


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(tmp_path: Path, loss: str, parts: int) -> None:
    settings = [f"train.loss={loss}", "train.class_weights=balanced", "train.label_smoothing=0.1", "augment.mixup=0.4"]
    whole = gradients(state(tmp_path / "whole", tmp_path / "data", *settings))
    split = gradients(state(tmp_path / "split", tmp_path / "data", *settings, f"train.accumulate={parts}"))
    for one, other in zip(whole[0], split[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))
    torch.testing.assert_close(whole[1], split[1])
    torch.testing.assert_close(whole[2], split[2])


def test_l2_counts_once_where_a_batch_is_in_parts(tmp_path: Path) -> None:
    settings = ["train.l2.output=0.5", "train.loss=mean"]
    whole = state(tmp_path / "whole", tmp_path / "data", *settings)
    split = state(tmp_path / "split", tmp_path / "data", *settings, "train.accumulate=3")
    penalties = [training.compute_gradients(training.load(0), 0).penalties["l2/output"] for training in (whole, split)]
    assert penalties[0] == penalties[1]
    one, other = (training.served.network.get_parameter("output.weight").grad for training in (whole, split))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_batches_that_do_not_part_evenly_are_refused_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    options = ("--set", "train.batch_size=10", "--set", "train.accumulate=4", "--tracking", "none")
    error = cli("pipeline", "train", "digits", *options, status=1).stderr
    assert "train.accumulate 4 does not divide the 10 images of a batch into equal parts" in error
    assert not (tmp_path / "runs").exists()


def test_parts_of_one_image_are_refused_where_batchnorm_needs_more(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", "colours", {"train": pictures([9, 9]), "test": pictures([2, 2], seed=1)})
    settings = ["data.dataset=colours", "data.validation=0", "model.name=torchvision/shufflenet_v2_x0_5", GREY]
    settings += ["train.batch_size=4", "train.accumulate=4", "train.steps=1"]
    with refused("torchvision/shufflenet_v2_x0_5 does not train on batches of 1"):
        train(load("digits", settings), tmp_path / "run", tmp_path / "data", "cpu", tracking=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_limited_as_torch_limits_them(tmp_path: Path, limit: float) -> None:
    rate = ["optimizer.name=sgd", "optimizer.learning_rate=0.25", "schedule.name=constant", "train.steps=9"]
    training = state(tmp_path / "run", tmp_path / "data", *rate, f"train.clip_norm={limit}")
    weights = [p.detach().clone() for p in training.parameters]
    found = [gradient.clone() for gradient in gradients(training)[0]]
    norm = np.sqrt(sum(float(gradient.double().square().sum()) for gradient in found))
    assert 1e-3 < norm < 1e3
    logged = training.update()
    assert logged is not None
    assert float(logged) == pytest.approx(norm, rel=1e-5)  # before it is limited
    copies = [nn.Parameter(weight.clone()) for weight in weights]
    for copy, gradient in zip(copies, found, strict=True):
        copy.grad = gradient.clone()
    nn.utils.clip_grad_norm_(copies, limit)
    for weight, copy, after in zip(weights, copies, training.parameters, strict=True):
        assert copy.grad is not None
        torch.testing.assert_close(after.detach(), weight - 0.25 * copy.grad, rtol=1e-6, atol=1e-9)


def test_the_log_holds_the_norm_before_the_limit(project: Path, tmp_path: Path) -> None:
    norms = {}
    for limit in (0.0, 1e-3):
        settings = ["train.steps=1", "optimizer.name=sgd", f"train.clip_norm={limit}", "train.evaluate_every=0"]
        run = train(load("digits", settings), tmp_path / str(limit), project / "data", "cpu", tracking=False)
        norms[limit] = points(run.folder)[0]["gradient_norm"]
    assert norms[1e-3] == pytest.approx(norms[0.0], rel=1e-5) and norms[0.0] > 1e-2


def test_a_rare_class_counts_as_much_as_a_frequent_one(tmp_path: Path) -> None:
    """The bias of the last layer moves against the sum of the weighted errors, which are equal for both classes at the
    start of a network whose logits are all 0."""
    write_dataset(tmp_path / "data", "uneven", {"train": pictures([30, 10], 8), "test": pictures([2, 2], 8, 1)})
    settings = ["data.dataset=uneven", "data.validation=0", "model.name=softmax_regression", "train.batch_size=40"]
    settings += ["train.steps=1", "optimizer.name=sgd", "train.evaluate_every=0", "preprocess.standardize=scale"]
    bias = {}
    for weights in ("none", "balanced"):
        recipe = load("digits", [*settings, f"train.class_weights={weights}"])
        run = train(recipe, tmp_path / weights, tmp_path / "data", "cpu", tracking=False)
        bias[weights] = final_state(run.folder)["raw"]["output.bias"]
    assert models.build("softmax_regression", (3, 8, 8), 2).get_parameter("output.bias").eq(0).all()
    assert bias["none"].abs().min() > 1e-4
    torch.testing.assert_close(bias["balanced"], torch.zeros(2), atol=1e-8, rtol=0)

"""Muon against a singular value decomposition and against plain formulas in NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.recipe import load
from pipeline.train import train
from pipeline.training.muon import orthogonal
from pipeline.training.optimizers import Muon
from pipeline.training.parameter_groups import parameter_groups
from pipeline.training.torch_internals import load_optimizer, update_weights
from tests.trainings import final_state

Array = NDArray[np.float64]


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 7), (7, 1)])
def test_a_matrix_keeps_its_singular_vectors_and_gets_values_near_1(shape: tuple[int, int]) -> None:
    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=shape))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonal(matrix, 12) @ right.T
    torch.testing.assert_close(found, torch.diag(found.diagonal()), atol=1e-9, rtol=0)
    assert values.numel() == found.diagonal().numel()
    assert found.diagonal().min() > 0.67 and found.diagonal().max() < 1.21


def test_few_iterations_leave_small_singular_values_smaller() -> None:
    matrix = torch.diag(torch.tensor([1.0, 0.1, 1e-3, 0.0]))
    values = orthogonal(matrix, 3).diagonal()
    assert values[0] > 0.67 and values[1] > 0.67 and values[2] < 0.1 and values[3] == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "fc": nn.Linear(6, 3), "head": nn.Linear(3, 2)})
    return layers.double()


def newton_schulz(matrix: Array, iterations: int) -> Array:
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(iterations):  # written on singular values, x -> 3.4445 x - 4.775 x³ + 2.0315 x⁵
        cubed = x @ x.T @ x
        x = 3.4445 * x - 4.775 * cubed + 2.0315 * x @ x.T @ cubed
    return x


@pytest.mark.parametrize("normalize", [False, True])
def test_20_updates_follow_the_formulas(normalize: bool) -> None:
    section = Muon(
        name="muon",
        learning_rate=0.1,
        momentum=0.6,
        sgd_momentum=0.85,
        iterations=4,
        normalize=normalize,
        head_multiplier=3.0,
        bias_multiplier=0.5,
        weight_decay=0.02,
    )
    trained = network()
    optimizer = section.build(parameter_groups(trained, ["head"], section))
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["rate"]
    expected = {name: weight.detach().numpy().copy() for name, weight in trained.named_parameters()}
    velocities = {name: np.zeros_like(weight) for name, weight in expected.items()}
    rng = np.random.default_rng(2)
    for step in range(20):
        if step == 10:  # as a resumed training does
            fresh = section.build(parameter_groups(trained, ["head"], section))
            load_optimizer(fresh, optimizer.state_dict())
            optimizer = fresh
        for name, weight in trained.named_parameters():
            gradient = rng.normal(size=weight.shape)
            weight.grad = torch.from_numpy(gradient)
            expected[name] = updated(name, expected[name], gradient, velocities[name], normalize)
        update_weights(optimizer)
    for name, weight in trained.named_parameters():
        np.testing.assert_allclose(weight.detach().numpy(), expected[name], rtol=1e-9, atol=1e-11, err_msg=name)


def updated(name: str, weight: Array, gradient: Array, velocity: Array, normalize: bool) -> Array:
    """The weight after one update; changes `velocity`."""
    if name in ("conv.weight", "fc.weight"):
        velocity[:] = 0.6 * velocity + gradient
        direction = newton_schulz((gradient + 0.6 * velocity).reshape(len(weight), -1), 4).reshape(weight.shape)
        kept = weight * np.sqrt(len(weight)) / np.linalg.norm(weight) if normalize else weight
        return kept * (1 - 0.1 * 0.02) - 0.1 * direction
    rate = 0.1 * (3.0 if name.startswith("head") else 1) * (0.5 if name.endswith("bias") else 1)
    gradient = gradient + (0.02 * weight if name == "head.weight" else 0)
    velocity[:] = 0.85 * velocity + gradient
    return weight - rate * (gradient + 0.85 * velocity)


def test_a_training_by_muon_goes_on_where_it_was_stopped(project: Path, tmp_path: Path) -> None:
    settings = ["train.evaluate_every=0", "train.batch_size=32", "schedule.name=constant"]
    settings += ["optimizer.name=muon", "optimizer.learning_rate=0.02"]
    whole = train(load("digits", [*settings, "train.steps=12"]), tmp_path / "a", project / "data", tracking=False)
    train(load("digits", [*settings, "train.steps=7"]), tmp_path / "b", project / "data", tracking=False)
    recipe = load("digits", [*settings, "train.steps=12"])
    resumed = train(recipe, tmp_path / "b", project / "data", tracking=False, resume=True)
    assert_equal(final_state(whole.folder)["raw"], final_state(resumed.folder)["raw"])


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())

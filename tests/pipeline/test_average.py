import copy

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.average import MovingAverage


def numpy_average(values: list[np.ndarray], decay: float) -> np.ndarray:
    """The formula in float64; `values` holds the initial weight, then the weight after each update."""
    average = values[0].astype(np.float64)
    for step, weight in enumerate(values[1:]):
        rate = min(decay, (1 + step) / (10 + step))
        average += (1 - rate) * (weight - average)
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_50_updates_follow_the_formula(decay: float) -> None:
    layer = nn.Linear(4, 3)
    values = [layer.weight.detach().numpy().copy()]
    average = MovingAverage(layer, decay)
    generator = np.random.default_rng(0)
    for step in range(50):
        with torch.no_grad():
            layer.weight += torch.from_numpy(generator.normal(size=(3, 4)).astype(np.float32))
        values.append(layer.weight.detach().numpy().copy())
        average.update(step)
    np.testing.assert_allclose(average.network.get_parameter("weight").numpy(), numpy_average(values, decay), atol=2e-6)


def test_floats_are_averaged_and_counters_are_copied() -> None:
    norm = nn.BatchNorm1d(2)
    average = MovingAverage(norm, 0.9)
    assert norm.running_mean is not None and norm.num_batches_tracked is not None
    norm.running_mean += 10
    norm.num_batches_tracked += 7
    average.update(0)  # decay is 1/10 at step 0
    assert average.network.get_buffer("running_mean").tolist() == pytest.approx([9.0, 9.0])
    assert average.network.get_buffer("num_batches_tracked").item() == 7


def test_averaging_never_touches_the_weights_in_training() -> None:
    layer = nn.Linear(2, 2)
    average = MovingAverage(layer, 0.99)
    before = copy.deepcopy(layer.state_dict())
    average.network.get_parameter("weight").add_(1)
    average.update(0)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())

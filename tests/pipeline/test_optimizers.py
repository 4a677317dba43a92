import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
from pipeline import recipe
from pipeline.dataset import Dataset
from pipeline.export import export
from pipeline.train import train
from pipeline.training.optimizers import AdaGrad, Adam, Sgd
from pipeline.training.randomness import seed_step
from pipeline.training.schedules import Cosine, Exponential, Linear
from pipeline.training.torch_internals import update_weights
from tests.conftest import Cli
from tests.golden import fixed
from tests.models.test_golden import golden  # noqa: F401
from tests.trainings import final_state, points

Reference = Callable[[np.ndarray, np.ndarray], np.ndarray]


def sgd(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    return w - 0.1 * gradients.sum(0)


def momentum(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    velocity = np.zeros_like(w)
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        w = w - 0.1 * velocity
    return w


def nesterov(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    velocity = np.zeros_like(w)
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        w = w - 0.1 * (gradient + 0.9 * velocity)
    return w


def adagrad(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """The book's: h += g * g; w -= lr * g / (sqrt(h) + 1e-7)."""
    h = np.zeros_like(w)
    for gradient in gradients:
        h += gradient * gradient
        w = w - 0.1 * gradient / (np.sqrt(h) + 1e-7)
    return w


def adam(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w


@pytest.mark.parametrize(
    ("section", "reference"),
    [
        (Sgd(name="sgd", learning_rate=0.1), sgd),
        (Sgd(name="sgd", learning_rate=0.1, momentum=0.9), momentum),
        (Sgd(name="sgd", learning_rate=0.1, momentum=0.9, nesterov=True), nesterov),
        (AdaGrad(name="adagrad", learning_rate=0.1), adagrad),
        (Adam(name="adam", learning_rate=0.1), adam),
    ],
)
def test_50_updates_follow_the_formula(section: Sgd | AdaGrad | Adam, reference: Reference) -> None:
    start, gradients = fixed.average_values()
    gradients = gradients.astype(np.float64)
    gradients[:, 0] *= 1e-7  # so small that an epsilon inside the root, or of 1e-10, would show
    weight = nn.Parameter(torch.from_numpy(start.astype(np.float64)))
    optimizer = section.build([weight])
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        update_weights(optimizer)
    expected = reference(start.astype(np.float64), gradients)
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-9)


def test_an_optimiser_does_not_import_torchs_compiler() -> None:
    """Its import takes 2 s and 160 MB."""
    script = """if True:
        import sys, torch
        from pipeline.training.optimizers import AdaGrad, Adam, Sgd
        from pipeline.training.torch_internals import update_weights
        for section, name in ((Sgd, "sgd"), (Adam, "adam"), (AdaGrad, "adagrad")):
            weight = torch.nn.Parameter(torch.ones(2))
            optimizer = section(name=name, learning_rate=0.1).build([weight])
            weight.grad = torch.ones(2)
            update_weights(optimizer)
            optimizer.load_state_dict(optimizer.state_dict())
            assert weight[0] < 1, name
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_staircase_is_tensorflows(golden: dict[str, np.ndarray]) -> None:  # noqa: F811
    schedule = Exponential(name="exponential", rate=0.1, every=100)
    actual = [0.1 * schedule.factor(step, 400) for step in range(0, 401, 25)]
    np.testing.assert_allclose(actual, golden["staircase"], rtol=1e-6)


def test_a_smooth_exponential_meets_the_staircase_at_its_steps() -> None:
    smooth = Exponential(name="exponential", rate=0.5, every=10, staircase=False)
    assert [smooth.factor(step, 0) for step in (0, 10, 20)] == [1, 0.5, 0.25]
    assert smooth.factor(5, 0) == pytest.approx(0.5**0.5)


def test_a_cosine_falls_from_1_to_its_floor() -> None:
    schedule = Cosine(name="cosine", floor=0.2)
    assert [schedule.factor(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.6, 0.2])


def test_a_linear_schedule_warms_up_and_falls() -> None:
    schedule = Linear(name="linear", warmup=10, floor=0.5)
    assert [schedule.factor(step, 110) for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.75, 0.5])


def test_dropout_is_a_function_of_seed_and_step() -> None:
    def mask(seed: int, step: int) -> list[float]:
        seed_step(seed, step, torch.device("cpu"))
        return nn.Dropout(0.5)(torch.ones(64)).tolist()

    assert mask(1, 7) == mask(1, 7)
    assert mask(1, 7) != mask(1, 8)
    assert mask(1, 7) != mask(2, 7)


def test_l2_of_an_unknown_layer_is_refused(cli: Cli) -> None:
    result = cli("pipeline", "train", "digits", "--set", "train.l2.local3=0.1", "--tracking", "none", status=1)
    assert "no layer 'local3'; it has conv1, conv2, fc1, fc2" in result.stderr


def test_the_loss_adds_half_the_squared_weights_of_the_named_layers(cli: Cli, tmp_path: Path) -> None:
    options = ("--steps", 1, "--tracking", "none")
    cli("pipeline", "train", "digits", "--run", "plain", *options)
    cli("pipeline", "train", "digits", "--run", "l2", "--set", "train.l2.fc1=0.004", *options)
    plain, penalised = (next(p for p in points(tmp_path / "runs" / r) if "loss" in p) for r in ("plain", "l2"))
    torch.manual_seed(0)
    weight = models.build("digits_convnet", (1, 8, 8), 10).get_parameter("fc1.weight")
    assert penalised["l2/fc1"] == pytest.approx(0.002 * weight.square().sum().item(), rel=1e-5)
    assert penalised["cross_entropy"] == plain["loss"]
    assert penalised["loss"] == pytest.approx(plain["loss"] + penalised["l2/fc1"], rel=1e-6)


def test_l2_pulls_the_named_weights_towards_zero(cli: Cli, tmp_path: Path) -> None:
    """By the gradient coefficient * weight, in addition to that of the cross-entropy."""
    settings = (
        "--steps",
        1,
        "--tracking",
        "none",
        "--set",
        "optimizer.name=sgd",
        "--set",
        "optimizer.learning_rate=0.1",
    )
    cli("pipeline", "train", "digits", "--run", "plain", *settings)
    cli("pipeline", "train", "digits", "--run", "l2", "--set", "train.l2.fc1=0.5", *settings)
    plain, penalised = (final_state(tmp_path / "runs" / name)["raw"] for name in ("plain", "l2"))
    torch.manual_seed(0)
    start = models.build("digits_convnet", (1, 8, 8), 10).get_parameter("fc1.weight")
    torch.testing.assert_close(plain["fc1.weight"] - penalised["fc1.weight"], 0.1 * 0.5 * start, rtol=1e-4, atol=1e-6)
    assert torch.equal(plain["fc2.weight"], penalised["fc2.weight"])


@pytest.mark.parametrize("name", ["mlp", "slides_convnet", "deep_mnist", "cifar10", "cifar10_local"])
def test_every_shipped_network_trains_and_exports(project: Path, tmp_path: Path, name: str) -> None:
    """A few steps on images that it accepts, then the export and its parity check."""
    settings = ["train.steps=3", "train.evaluate_every=0", f"model.name={name}"]
    run = train(recipe.load("digits", settings), tmp_path / name, project / "data", tracking=False)
    assert export(run, Dataset.open(project / "data", "digits")).proofs[0].passed

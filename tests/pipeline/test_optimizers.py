import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from pipeline import recipe
from pipeline.dataset import Dataset
from pipeline.export import export
from pipeline.train import train
from pipeline.training.optimizers import AdaGrad, Adam, AdamW, Sgd
from pipeline.training.parameter_groups import parameter_groups
from pipeline.training.randomness import seed_step
from pipeline.training.schedules import Constant, Cosine, Exponential, Linear
from pipeline.training.torch_internals import begin_velocities, load_optimizer, update_weights
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


def adamw(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """Loshchilov and Hutter, algorithm 2, with the decay times the learning rate, as all libraries have it."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        w = w - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.05 * w)
    return w


def decayed(reference: Reference, decay: float) -> Reference:
    """A reference whose gradients are those plus decay * weight, one update after the other."""

    def updated(w: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        seen: list[np.ndarray] = []
        now = w
        for gradient in gradients:
            seen.append(gradient + decay * now)
            now = reference(w, np.array(seen))
        return now

    return updated


@pytest.mark.parametrize(
    ("section", "reference"),
    [
        (Sgd(name="sgd", learning_rate=0.1, weight_decay=0.05), decayed(sgd, 0.05)),
        (Sgd(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.05), decayed(momentum, 0.05)),
        (Adam(name="adam", learning_rate=0.1, weight_decay=0.05), decayed(adam, 0.05)),
        (AdaGrad(name="adagrad", learning_rate=0.1, weight_decay=0.05), decayed(adagrad, 0.05)),
        (AdamW(name="adamw", learning_rate=0.1, weight_decay=0.05), adamw),
        (AdamW(name="adamw", learning_rate=0.1, weight_decay=0.0), adam),
        (Sgd(name="sgd", learning_rate=0.1), sgd),
        (Sgd(name="sgd", learning_rate=0.1, momentum=0.9), momentum),
        (Sgd(name="sgd", learning_rate=0.1, momentum=0.9, nesterov=True), nesterov),
        (AdaGrad(name="adagrad", learning_rate=0.1), adagrad),
        (Adam(name="adam", learning_rate=0.1), adam),
    ],
)
def test_50_updates_follow_the_formula(section: Sgd | AdaGrad | Adam | AdamW, reference: Reference) -> None:
    start, gradients = fixed.average_values()
    gradients = gradients.astype(np.float64)
    gradients[:, 0] *= 1e-7  # so small that an epsilon inside the root, or of 1e-10, would show
    network = nn.Module()  # a weight matrix, because vectors do not decay
    weight = network.weight = nn.Parameter(torch.from_numpy(start.astype(np.float64))[None])
    optimizer = section.build(parameter_groups(network, [], section))
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)[None]
        update_weights(optimizer)
    expected = reference(start.astype(np.float64), gradients)
    np.testing.assert_allclose(weight.detach().numpy()[0], expected, atol=1e-9)


def test_a_layer_that_begins_to_learn_later_gets_the_updates_of_one_that_begins_then() -> None:
    section = Sgd(name="sgd", learning_rate=0.1, momentum=0.9)
    gradients = np.random.default_rng(0).normal(size=(6, 5))
    early, late = (nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2))
    optimizer = section.build([early, late])
    for step, gradient in enumerate(gradients):
        if step == 2:
            begin_velocities(optimizer)
        early.grad = torch.from_numpy(gradient)
        late.grad = torch.from_numpy(gradient) if step >= 2 else None
        update_weights(optimizer)
    np.testing.assert_allclose(early.detach().numpy(), momentum(np.zeros(5), gradients), atol=1e-12)
    np.testing.assert_allclose(late.detach().numpy(), momentum(np.zeros(5), gradients[2:]), atol=1e-12)


SCHEDULES: list[Constant | Cosine | Exponential | Linear] = [
    Constant(warmup=10), Cosine(name="cosine", floor=0.1, warmup=10), Linear(name="linear", floor=0.5, warmup=10),
    Exponential(name="exponential", rate=0.5, every=20, warmup=10),
    Exponential(name="exponential", rate=0.5, every=20, staircase=False, warmup=10),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_begins_after_its_warm_up(schedule: Constant | Cosine | Exponential | Linear) -> None:
    found = [schedule.factor(step, 110) for step in range(110)]
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    without = schedule.model_copy(update={"warmup": 0})
    assert found[10:] == [without.factor(step, 100) for step in range(100)]
    fraction = schedule.model_copy(update={"warmup": 10 / 110})
    assert found == [fraction.factor(step, 110) for step in range(110)]


@pytest.mark.parametrize(("value", "is_accepted"), [(0, 1), (7, 1), (0.0, 1), (0.99, 1), (1.0, 0), (-1, 0), (-0.1, 0)])
def test_a_warm_up_is_a_number_of_steps_or_a_fraction(value: float, is_accepted: bool) -> None:
    if is_accepted:
        assert Cosine(name="cosine", warmup=value).warmup == value
    else:
        with pytest.raises(ValidationError, match="a number of steps"):
            Cosine(name="cosine", warmup=value)


def test_learning_rates_begin_anew_when_all_layers_learn() -> None:
    settings = ["train.freeze=backbone", "train.freeze_steps=20", "train.steps=70", "optimizer.learning_rate=0.5"]
    settings += ["model.weights=not-read.pth", "schedule.name=linear", "schedule.warmup=0.1"]
    found = [recipe.load("digits", settings).learning_rate(step) for step in range(70)]
    phases = [np.r_[(np.arange(n) + 1) / n, 1 - np.arange(m) / m] for n, m in ((2, 18), (5, 45))]
    assert found == pytest.approx(0.5 * np.concatenate(phases))


def test_an_optimiser_does_not_import_torchs_compiler() -> None:
    """Its import takes 2 s and 160 MB."""
    script = """if True:
        import sys, torch
        from pipeline.training.optimizers import AdaGrad, Adam, AdamW, Sgd
        from pipeline.training.torch_internals import update_weights
        for section, name in ((Sgd, "sgd"), (Adam, "adam"), (AdamW, "adamw"), (AdaGrad, "adagrad")):
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


@pytest.mark.parametrize(("name", "is_fused"), [("sgd", True), ("adam", True), ("adamw", True), ("adagrad", False)])
def test_no_optimiser_asks_cuda_for_a_kernel_that_torch_has_for_cpus_alone(name: str, is_fused: bool) -> None:
    build = recipe.load("digits", [f"optimizer.name={name}", "optimizer.learning_rate=0.1"]).optimizer.build
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    on_cpu = build(weights[:1])
    with FakeTensorMode():
        fake = build([nn.Parameter(torch.ones(3, device="cuda"))])
    assert on_cpu.param_groups[0]["fused"] and fake.param_groups[0]["fused"] == is_fused
    # a training that goes on elsewhere keeps that device's way, and its results
    elsewhere = build(weights[1:])
    elsewhere.param_groups[0]["fused"] = is_fused
    for step in range(4):
        if step == 2:
            load_optimizer(elsewhere, copy.deepcopy(on_cpu.state_dict()))
            assert elsewhere.param_groups[0]["fused"] == is_fused
        for weight, optimizer in zip(weights, (on_cpu, elsewhere), strict=True):
            weight.grad = torch.tensor([0.1, -0.2, 0.3]) * (step + 1)
            update_weights(optimizer)
    torch.testing.assert_close(*weights)

"""Steps as CUDA graphs, against the same steps launched kernel by kernel. They need a GPU."""

from pathlib import Path

import pytest
import torch
from torch import nn

from convline.errors import ConvlineError
from pipeline.device import choose_device
from pipeline.network import build_network
from pipeline.recipe import load
from pipeline.run import Run
from pipeline.training.distributed import RankGroup
from pipeline.training.training_state import STEPS_BEFORE_RECORDING, StepResult, TrainingState
from tests.pipeline.small_datasets import pictures, write_dataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

ADAMW = ["optimizer.name=adamw", "optimizer.learning_rate=1e-3", "schedule.name=cosine", "train.clip_norm=0.5"]
RECIPES = {
    "L2, exponential schedule": ("cifar10", ["train.l2.local3=0.004"]),
    "dropout, Adam": ("deep-mnist", []),
    "Nesterov": ("digits", ["optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"]),
    "BatchNorm, mixed images, parts": (
        "digits",
        ["model.name=timm/resnet10t", "augment.mixup=0.4", "augment.cutmix=1.0", "train.accumulate=2", *ADAMW],
    ),
    "compiled": ("digits", ["train.compile=true", *ADAMW]),
    "float16": ("digits", ["train.precision=float16", *ADAMW]),
    "bfloat16": ("digits", ["train.precision=bfloat16", *ADAMW]),
}


def new_training(folder: Path, name: str, settings: list[str]) -> TrainingState:
    common = ["data.dataset=colours", "train.batch_size=16", "train.evaluate_every=0", "data.validation=0"]
    recipe = load(name, [*common, "train.steps=100", *settings])
    dataset = write_dataset(folder / "data", "colours", {"train": pictures([30, 30, 30]), "test": pictures([2, 2, 2])})
    run = Run.create(folder / "run", recipe, dataset)
    served = build_network(recipe, dataset.meta)
    return TrainingState.create(run, dataset, served, [], choose_device("cuda"), RankGroup())


def compute(training: TrainingState, steps: int, recorded: bool) -> list[StepResult]:
    results = []
    for step in range(steps):
        if training.phase_begins(step):
            training.begin(step)
        batch = training.load(step)
        training.begin_step(step)
        graph = training.recorded_step(step, batch) if recorded else None
        assert (graph is not None) == (recorded and step >= STEPS_BEFORE_RECORDING)
        if graph is not None:
            result = graph.replay(batch, step)
        else:
            result = training.compute_gradients(batch, step)
            training.update()
        training.average.update(step)
        loss = result.loss.clone()
        results.append(StepResult(result.logits.clone(), loss, {}, loss))
    return results


@pytest.mark.parametrize("case", RECIPES)
def test_a_recorded_step_computes_what_its_kernels_do_one_by_one(tmp_path: Path, case: str) -> None:
    name, settings = RECIPES[case]
    trainings = [new_training(tmp_path / way, name, settings) for way in ("recorded", "launched")]
    recorded, launched = (compute(training, 12, way) for training, way in zip(trainings, (True, False), strict=True))
    tolerance = 2e-2 if case in ("float16", "bfloat16") else 1e-4
    for one, other in zip(recorded, launched, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=tolerance, atol=tolerance * float(other.logits.std()))
        torch.testing.assert_close(one.loss, other.loss, rtol=tolerance, atol=0)
    losses = [float(result.loss) for result in recorded]
    assert len(set(losses)) == len(losses)  # each step has a batch, and masks, of its own
    for one, other in zip(*(training.average.network.parameters() for training in trainings), strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance * float(other.std()))


def test_a_recorded_step_names_the_step_whose_loss_is_not_finite(tmp_path: Path) -> None:
    training = new_training(tmp_path, "digits", [])
    compute(training, 6, recorded=True)
    batch = training.load(6)
    batch.inputs[0] = float("nan")
    for step in (6, 7):
        training.begin_step(step)
        assert training.graph is not None
        training.graph.replay(batch, step)
    with pytest.raises(ConvlineError, match="stopped being finite at step 6"):
        training.guard.check()
    assert all(torch.isfinite(parameter).all() for parameter in training.parameters)


def test_a_network_that_waits_for_the_gpu_is_trained_kernel_by_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Waits(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x) * (1 if float(x.sum()) > 0 else 2)

    training = new_training(tmp_path, "digits", [])
    training.begin(0)
    training.network = Waits(training.network)
    losses = []
    for step in range(8):
        batch = training.load(step)
        training.begin_step(step)
        assert training.recorded_step(step, batch) is None
        losses.append(float(training.compute_gradients(batch, step).loss))
        training.update()
    assert capsys.readouterr().err.count("each kernel is launched on its own") == 1
    assert losses[-1] < losses[0]

"""What can be known of training on a GPU without one: torch's fake tensors run no kernel, but they raise where a value
is needed on the host, and where two devices meet in one operation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.grad_scaler import GradScaler

from pipeline import recipe
from pipeline.network import build_network
from pipeline.run import Run
from pipeline.tracking.points import PointWriter, read_points
from pipeline.training.distributed import RankGroup
from pipeline.training.loss import CrossEntropy, balanced_class_weights
from pipeline.training.training_state import TrainingState
from tests.conftest import Cli
from tests.pipeline.small_datasets import write_dataset

FINE_TUNING = ["augment.mixup=0.2", "augment.cutmix=1.0", "train.class_weights=balanced", "data.sampling=balanced"]
CUDA: list[tuple[str, list[str]]] = [(name, []) for name in recipe.names()] + [
    ("photos", FINE_TUNING),
    ("photos", ["train.accumulate=2"]),
]


def fake_state(folder: Path, name: str, overrides: list[str]) -> TrainingState:
    """A training of a recipe on noise, built on the CPU; its tensors are to be replaced by fake ones."""
    settings = [
        "train.batch_size=4",
        "train.evaluate_every=0",
        "data.validation=0",
        "data.dataset=noise",
        "train.l2={}",
    ]
    pixels = ["preprocess.standardize={mean=[0.5,0.5,0.5], std=[0.5,0.5,0.5]}"] if name == "photos" else []
    loaded = recipe.load(name, [*settings, *pixels, *overrides])
    side = 64 if name == "photos" else 32 if loaded.preprocess.crop or name == "svhn" else 28
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, side, side, 3), np.uint8), np.arange(8) % 2
    dataset = write_dataset(folder / "data", "noise", {"train": noise, "test": noise})
    settled = loaded.model_copy(update={"train": loaded.train.with_steps(8)})
    head = ["classifier"] if name == "photos" else []
    served = build_network(settled, dataset.meta)
    run = Run.create(folder / "run", settled, dataset)
    return TrainingState.create(run, dataset, served, head, torch.device("cpu"), RankGroup())


@pytest.mark.parametrize(("name", "overrides"), CUDA)
def test_a_recipe_computes_its_loss_on_cuda_without_waiting_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overrides: list[str]
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    state = fake_state(tmp_path, name, overrides)
    settings = state.run.recipe.train
    whole_batch = state.augment.needs_whole_batch
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state.device = torch.device("cuda", 0)
        for module in (state.served, state.average.network):
            for layer in module.modules():
                for key, weight in layer.named_parameters(recurse=False):
                    layer._parameters[key] = torch.nn.Parameter(mode.from_tensor(weight.detach()).to("cuda"))
                for key, buffer in layer.named_buffers(recurse=False):
                    layer._buffers[key] = mode.from_tensor(buffer).to("cuda")
        images, labels = (mode.from_tensor(tensor).to("cuda") for tensor in state.batches.load(0))
        monkeypatch.setattr(state.batches, "load", lambda _: (images, labels))
        if settings.class_weights == "balanced":
            weights = mode.from_tensor(balanced_class_weights([4, 4])).to("cuda")
            state.loss = CrossEntropy(settings.loss, settings.label_smoothing, weights)
        step = settings.frozen_steps
        state.begin(step)
        batch = state.load(step)
        assert whole_batch == (batch.mixing is not None)
        for part in batch.parts(settings.accumulate):
            loss = state.loss(state.network(part.inputs), part.labels, part.mixing)
            assert (loss.device.type, loss.shape) == ("cuda", ())
        state.served.eval()
        probability, logit = state.served(images)
        assert probability.device.type == logit.device.type == "cuda"


def test_a_float16_step_that_overflows_changes_no_weight_and_the_next_ones_go_on(tmp_path: Path) -> None:
    """By torch's autocast and gradient scaler for the CPU, which behave as those for CUDA do."""
    state = fake_state(tmp_path, "digits", ["train.precision=float16", "train.steps=9", "train.clip_norm=1.0"])
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

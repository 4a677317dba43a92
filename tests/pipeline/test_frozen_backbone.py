"""Training the head alone, then all layers: what learns, what stays as it is, and that a killed run goes on exactly."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import models
from pipeline import checkpoint
from pipeline.dataset import Dataset
from pipeline.network import build_network
from pipeline.recipe import Recipe, load
from pipeline.train import train
from pipeline.training import frozen_backbone
from pipeline.training.batch_loader import BatchLoader
from pipeline.training.distributed import RankGroup
from pipeline.training.frozen_backbone import features, freeze, unfreeze
from pipeline.training.layer_summary import summarize
from tests.conftest import ROOT, run_command
from tests.pipeline.helpers import refused
from tests.pipeline.small_datasets import GREY, pictures, write_dataset, write_weights
from tests.trainings import assert_same_weights, final_state, points

CPU = torch.device("cpu")
EFFICIENTNET = "timm/test_efficientnet"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/colours: 70 training images of three classes; weights of networks for two others join them."""
    folder = tmp_path_factory.mktemp("colours")
    write_dataset(folder / "data", "colours", {"train": pictures([40, 20, 10]), "test": pictures([5, 5, 5], seed=1)})
    return folder


def weights(data: Path, network: str) -> Path:
    path = data / f"{network.replace('/', '-')}.safetensors"
    return path if path.exists() else write_weights(path, network, 2)


def recipe(data: Path, network: str = EFFICIENTNET, *settings: str, freeze_steps: int = 4, steps: int = 8) -> Recipe:
    common = ["data.dataset=colours", "data.validation=0", GREY, f"model.name={network}", "train.batch_size=10"]
    common += [f"model.weights={weights(data, network)}", "train.freeze=backbone", f"train.freeze_steps={freeze_steps}"]
    common += [f"train.steps={steps}", "train.evaluate_every=0", "train.average_decay=0.9", "train.summary_every=2"]
    common += ["optimizer.name=sgd", "optimizer.learning_rate=0.05", "optimizer.momentum=0.9", "train.log_every=1"]
    return load("digits", [*common, *settings])


def trained(data: Path, folder: Path, *settings: str, **options: Any) -> Path:
    return train(recipe(data, *settings, **options), folder, data / "data", "cpu", tracking=False).folder


def backbone(state: dict[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(f"{head}.")}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("while_frozen", [False, True])
def test_a_frozen_backbone_keeps_every_bit(data: Path, tmp_path: Path, while_frozen: bool) -> None:
    """Weights, statistics of BatchNorm and their average, although the optimiser decays weights."""
    more = ["optimizer.weight_decay=0.1", "augment.flip=true", f"augment.while_frozen={str(while_frozen).lower()}"]
    run = trained(data, tmp_path / "run", EFFICIENTNET, *more, freeze_steps=0, steps=6)
    state, start = final_state(run), load_file(weights(data, EFFICIENTNET))
    for part in ("raw", "averaged"):
        assert is_same(backbone(state[part], "classifier"), backbone(start, "classifier"))
    losses = [point["loss"] for point in points(run) if "loss" in point]
    assert losses[-1] < losses[0]


def test_all_layers_learn_after_the_frozen_phase(data: Path, tmp_path: Path) -> None:
    run = trained(data, tmp_path / "run")
    state, start = final_state(run)["raw"], load_file(weights(data, EFFICIENTNET))
    same = [name for name, value in backbone(state, "classifier").items() if torch.equal(value, start[name])]
    assert same == []


def by_hand(data: Path, network: str, head: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the head of a loop that computes the whole network at every step and updates the head by SGD with
    momentum."""
    settled = recipe(data, network, freeze_steps=0, steps=steps)
    dataset = Dataset.open(data / "data", "colours")
    served = build_network(settled, dataset.meta)
    made = served.network
    with torch.no_grad():  # the backbone of the file, and the new head with small weights
        for name, value in load_file(weights(data, network)).items():
            if not name.startswith(f"{head}."):
                made.state_dict()[name].copy_(value)
        layer: Any = made.get_submodule(head)
        layer.weight.mul_(1e-3 / layer.weight.std())
        layer.bias.zero_()
    loader = BatchLoader(dataset.split("train"), "epoch", 10, settled.train.seed, CPU)
    made.eval().requires_grad_(False)
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = settled.learning_rate(step)
        images, labels = loader.load(step)
        loss = F.cross_entropy(made((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, layer.state_dict()


@pytest.mark.parametrize(
    ("network", "head", "kept"),
    [
        (EFFICIENTNET, "classifier", True),
        ("timm/test_vit", "head", True),
        ("timm/test_byobnet", "head.fc", True),
        ("torchvision/mobilenet_v2", "classifier.1", True),  # after a dropout
        ("torchvision/squeezenet1_1", "classifier.1", False),  # before a ReLU and the pooling
    ],
)
def test_a_head_on_kept_outputs_learns_what_it_learns_behind_the_whole_network(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], network: str, head: str, kept: bool
) -> None:
    run = trained(data, tmp_path / "run", network, "train.summary_every=0", freeze_steps=0, steps=5)
    said = "of 70 images computed once" if kept else "computed at each step"
    assert f"the backbone is frozen for 5 steps, its outputs {said}" in capsys.readouterr().err
    losses, layer = by_hand(data, network, head, 5)
    assert [point["loss"] for point in points(run) if "loss" in point] == pytest.approx(losses, rel=1e-4)
    state = final_state(run)["raw"]
    for name, value in layer.items():
        torch.testing.assert_close(state[f"{head}.{name}"], value, rtol=1e-3, atol=1e-6)


def test_outputs_that_do_not_fit_in_memory_are_computed_at_each_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = trained(data, tmp_path / "kept", freeze_steps=0, steps=5)
    inputs = models.build(EFFICIENTNET, (3, 32, 32), 3).get_parameter("classifier.weight").shape[1]
    for free, says in ((2 * 70 * inputs * 4, "computed once"), (2 * 70 * inputs * 4 - 1, "computed at each step")):
        monkeypatch.setattr(frozen_backbone, "free_memory", lambda _, free=free: free)
        run = trained(data, tmp_path / says, freeze_steps=0, steps=5)
        assert f"its outputs {says}" in capsys.readouterr().err.replace("of 70 images ", "")
        for name, value in final_state(run)["raw"].items():
            torch.testing.assert_close(value, final_state(kept)["raw"][name], rtol=1e-4, atol=1e-6)


def test_kept_outputs_are_those_of_their_images(data: Path) -> None:
    """Also where the last chunk is not full, and of a split that leaves out rows."""
    split = Dataset.open(data / "data", "colours").split("train", 0.1, 0)
    network: Any = models.build("timm/test_vit", (3, 32, 32), 3)
    freeze(network, ["head"])
    found = features(network, ["head"], lambda images: images.permute(0, 3, 1, 2) / 255, split, RankGroup())
    assert found is not None and len(found) == len(split) == 63
    for position in (0, 31, 62):
        image = torch.from_numpy(split.images[split.rows[position]])
        expected = network.forward_head(network.forward_features(image.permute(2, 0, 1)[None] / 255), pre_logits=True)
        torch.testing.assert_close(found[position], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", EFFICIENTNET])
def test_frozen_statistics_stay_while_all_weights_learn(data: Path, tmp_path: Path, name: str) -> None:
    """Also where summaries of the layers are written in between, which compute in inference mode."""
    run = trained(data, tmp_path / "run", name, "train.freeze_statistics=true", freeze_steps=2, steps=6)
    assert len((run / "summaries.jsonl").read_text().splitlines()) >= 1
    state, start = final_state(run)["raw"], load_file(weights(data, name))
    statistics = {key for key in start if "running_" in key or "num_batches" in key}
    assert len(statistics) > 20
    assert all(torch.equal(state[key], start[key]) for key in statistics)
    head = models.head_layers(name, (3, 32, 32), 3)[0]
    weights_that_stay = [
        k for k, v in backbone(state, head).items() if torch.equal(v, start[k]) and k not in statistics
    ]
    assert len(weights_that_stay) < 0.3 * len(start)  # those whose gradients are 0 behind a ReLU


def test_summaries_leave_every_layer_in_its_mode(data: Path) -> None:
    settings = recipe(data, EFFICIENTNET, "train.freeze_statistics=true", freeze_steps=0)
    network = build_network(settings, Dataset.open(data / "data", "colours").meta).network
    unfreeze(network, keep_statistics=True)
    modes = {name: layer.training for name, layer in network.named_modules()}
    assert modes[""] and not any(modes[n] for n, layer in network.named_modules() if isinstance(layer, _BatchNorm))
    summarize(network, torch.zeros(2, 3, 32, 32))
    assert modes == {name: layer.training for name, layer in network.named_modules()}


def test_a_network_without_a_head_cannot_have_a_frozen_backbone(data: Path, tmp_path: Path) -> None:
    name = "timm/test_vit"
    settings = recipe(data, name)
    dataset = Dataset.open(data / "data", "colours")
    assert settings.train.freeze == "backbone" and len(dataset.classes) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.train.head_layers", lambda *_, **__: [])
        with refused("train.freeze and optimizer.head_multiplier need a network with a head", name):
            train(settings, tmp_path / "run", data / "data", "cpu", tracking=False)
    assert not (tmp_path / "run").exists()


def test_images_that_a_frozen_network_does_not_accept_are_refused_in_one_sentence(data: Path, tmp_path: Path) -> None:
    settings = recipe(data, "timm/test_vit", "preprocess.crop=9")
    with refused("the network timm/test_vit does not accept the dataset colours"):
        train(settings, tmp_path / "run", data / "data", "cpu", tracking=False)


def test_a_frozen_backbone_needs_pretrained_weights() -> None:
    with refused('train.freeze = "backbone" needs pretrained weights'):
        load("digits", ["train.freeze=backbone"])
    with refused("freeze_steps has no effect"):
        load("digits", ["train.freeze_steps=5"])


# 4 steps with a frozen backbone, then 5 with all layers
RESUMED = ["optimizer.name=adamw", "optimizer.weight_decay=0.05", "optimizer.layer_decay=0.8", "train.clip_norm=1.0"]
RESUMED += ["train.class_weights=balanced", "train.label_smoothing=0.1", "augment.flip=true", "augment.mixup=0.2"]
RESUMED += ["schedule.name=cosine", "schedule.warmup=0.3", "train.accumulate=2"]


def fine_tuned(data: Path, run: Path, *settings: str, resume: bool = False) -> Path:
    settled = recipe(data, EFFICIENTNET, *RESUMED, *settings, freeze_steps=4, steps=9)
    return train(settled, run, data / "data", "cpu", tracking=False, resume=resume).folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tuned(data, tmp_path_factory.mktemp("whole") / "run")


def losses(run: Path) -> list[tuple[int, float | None]]:
    return [(point["step"], point.get("loss")) for point in points(run)]


@pytest.mark.parametrize("saved", [3, 4, 7])
def test_a_run_goes_on_from_either_phase_to_the_same_bits(data: Path, whole: Path, tmp_path: Path, saved: int) -> None:
    """4: the first step that it trains has other layers that learn than the step before."""
    run = fine_tuned(data, tmp_path / "run", f"train.checkpoint_every={saved}")
    for path in checkpoint.paths(run / "checkpoints")[1:]:
        path.unlink()
    assert final_state(run)["step"] == saved
    fine_tuned(data, run, resume=True)
    assert_same_weights(run, whole)
    assert losses(run) == losses(whole)


# a command that kills itself where it begins step argv[1]
KILLED = """
import os, signal, sys
from pipeline.training.training_state import TrainingState
begin_step, last = TrainingState.begin_step, int(sys.argv.pop(1))

def killed(self, step):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return begin_step(self, step)

TrainingState.begin_step = killed
from pipeline.cli import run
run()
"""


@pytest.mark.all
def test_a_fine_tuning_killed_in_each_phase_ends_with_the_same_bits(data: Path, whole: Path, tmp_path: Path) -> None:
    """Killed in the frozen phase, at the first step after it, and two steps later; in a recipe with epochs, as `make
    train` resumes it."""
    toml = tmp_path / "own.toml"
    epochs = [
        "train.checkpoint_every=1",
        "train.steps=0",
        "train.epochs=0.7",
    ]  # of 70 images: 5 steps of 10 after the 4
    toml.write_text(recipe(data, EFFICIENTNET, *RESUMED, *epochs, freeze_steps=4, steps=9).to_toml())
    options = ["train", str(toml), "--run", "own", "--data-dir", str(data / "data"), "--tracking", "none", "--resume"]
    threads = ["--threads", str(final_state(whole)["threads"])]
    for step in (2, 4, 6):
        script = [sys.executable, "-c", KILLED, str(step), *options, *threads]
        done = subprocess.run(script, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert final_state(tmp_path / "runs/own")["step"] == step
    run_command(tmp_path, "pipeline", *options)
    assert_same_weights(tmp_path / "runs/own", whole)
    assert losses(tmp_path / "runs/own") == losses(whole)
    assert "is finished" in run_command(tmp_path, "pipeline", *options).stderr

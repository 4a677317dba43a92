"""Which weights decay, and at which rate each learns; the reference is timm's own function."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from torch import nn

import models
from pipeline.recipe import Recipe, load
from pipeline.train import train
from pipeline.training.optimizers import AdamW, Sgd
from pipeline.training.parameter_groups import RATE, description, parameter_groups
from tests.conftest import Cli
from tests.pipeline.helpers import refused
from tests.pipeline.small_datasets import GREY, pictures, write_dataset, write_weights

NETWORKS = ["byobnet", "coatnet", "convnext", "efficientnet", "maxvit", "resnet", "vit", "vit2", "vit_relpos"]


def settings(network: nn.Module, groups: list[dict[str, Any]], rate: str) -> dict[str, tuple[float, float]]:
    """The rate and weight decay of each parameter, by name."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = {names[p]: (group[rate], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_and_decay_are_timms(name: str) -> None:
    network = models.build(f"timm/test_{name}", (3, 32, 32), 5)
    optimizer = AdamW(name="adamw", learning_rate=1e-3, layer_decay=0.7, weight_decay=0.05)
    exempt = getattr(network, "no_weight_decay", set)()
    timms = param_groups_layer_decay(network, 0.05, exempt, layer_decay=0.7)
    expected = settings(network, timms, "lr_scale")
    found = settings(network, parameter_groups(network, [], optimizer), RATE)
    assert found.keys() == expected.keys()
    assert len({rate for rate, _ in found.values()}) > 3
    for parameter, values in found.items():
        assert values == pytest.approx(expected[parameter]), parameter


def test_the_head_alone_learns_faster() -> None:
    network = models.build("timm/test_vit", (3, 32, 32), 5)
    plain = AdamW(name="adamw", learning_rate=1e-3, layer_decay=0.7)
    before = settings(network, parameter_groups(network, ["head"], plain), RATE)
    faster = plain.model_copy(update={"head_multiplier": 10.0})
    after = settings(network, parameter_groups(network, ["head"], faster), RATE)
    ratios = {name: after[name][0] / before[name][0] for name in before}
    assert ratios == {name: pytest.approx(10 if name.startswith("head.") else 1) for name in before}


def test_biases_norms_and_position_embeddings_do_not_decay() -> None:
    network = models.build("timm/test_vit", (3, 32, 32), 5)
    optimizer = Sgd(name="sgd", learning_rate=0.1, weight_decay=0.5)
    decays = {
        name: decay for name, (_, decay) in settings(network, parameter_groups(network, [], optimizer), RATE).items()
    }
    for name in ("pos_embed", "cls_token", "head.bias", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"):
        assert decays[name] == 0, name
    for name in ("head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"):
        assert decays[name] == 0.5, name


def test_a_bias_for_each_position_does_not_decay() -> None:
    network = models.build("cifar10_local", (3, 24, 24), 10)
    assert network.get_parameter("local3.bias").ndim == 3
    optimizer = Sgd(name="sgd", learning_rate=0.1, weight_decay=0.5)
    decays = settings(network, parameter_groups(network, [], optimizer), RATE)
    assert {name: decay for name, (_, decay) in decays.items()} == {
        name: 0.5 if name.endswith(".weight") else 0.0 for name, _ in network.named_parameters()
    }


def test_without_decay_and_rates_all_parameters_are_one_group_in_order() -> None:
    """So that checkpoints of older versions fit."""
    network = models.build("timm/test_efficientnet", (3, 32, 32), 5)
    (group,) = parameter_groups(network, ["classifier"], Sgd(name="sgd", learning_rate=0.1))
    assert (group[RATE], group["weight_decay"]) == (1.0, 0.0)
    assert all(one is other for one, other in zip(group["params"], network.parameters(), strict=True))


def test_layer_decay_for_a_network_that_tells_no_layers_is_refused(cli: Cli, tmp_path: Path) -> None:
    options = ("--set", "optimizer.layer_decay=0.8", "--tracking", "none")
    error = cli("pipeline", "train", "digits", *options, status=1).stderr
    assert "optimizer.layer_decay needs a network that tells its layers, as those of timm do" in error
    assert not (tmp_path / "runs").exists()


def fine_tuning(*more: str) -> Recipe:
    common = ["model.name=timm/test_efficientnet", "model.weights=not-read.safetensors", "train.steps=5"]
    common += ["optimizer.name=adamw", "optimizer.learning_rate=0.01", "optimizer.weight_decay=0.0"]
    return load("digits", [*common, *more])


def test_the_log_says_what_is_frozen_what_decays_and_how_fast_layers_learn() -> None:
    network = models.build("timm/test_efficientnet", (3, 32, 32), 5)
    in_head = sum(p.numel() for p in network.classifier.parameters())
    in_all = sum(p.numel() for p in network.parameters())
    decaying = sum(p.numel() for p in network.parameters() if p.ndim > 1)
    assert description(network, [], fine_tuning()) == ["highest learning rate: 0.01"]
    more = [
        "train.freeze=backbone",
        "train.freeze_steps=2",
        "train.freeze_statistics=true",
        "optimizer.layer_decay=0.5",
    ]
    recipe = fine_tuning(*more, "optimizer.head_multiplier=3.0", "optimizer.weight_decay=0.05")
    depth = len(set(settings_by_timm(network).values()))  # the classifier is the deepest layer
    lines = description(network, ["classifier"], recipe)
    assert lines == [
        f"frozen for 2 steps: the {in_all - in_head:,} parameters of all layers but classifier",
        "the running statistics of BatchNorm layers are frozen throughout",
        f"highest learning rates: from {0.01 * 0.5 ** (depth - 1):.3g} to 0.03, in {depth} groups of layers",
        f"weight decay 0.05: {decaying:,} weights; none for {in_all - decaying:,} biases and parameters of norms",
    ]


def settings_by_timm(network: nn.Module) -> dict[str, float]:
    """The rate of each parameter at a layer decay of 0.5."""
    groups = param_groups_layer_decay(network, layer_decay=0.5)
    return {name: rate for name, (rate, _) in settings(network, groups, "lr_scale").items()}


@pytest.mark.parametrize("freeze_steps", [0, 5, 200])
def test_a_backbone_that_is_never_trained_is_frozen_throughout(freeze_steps: int) -> None:
    network = models.build("timm/test_efficientnet", (3, 32, 32), 5)
    recipe = fine_tuning("train.freeze=backbone", f"train.freeze_steps={freeze_steps}")
    assert description(network, ["classifier"], recipe)[0].startswith("frozen throughout: the ")


def test_every_layer_learns_at_its_own_rate(tmp_path: Path) -> None:
    """One step of SGD: each weight moves by its gradient times its rate, as a training with equal rates shows."""
    write_dataset(tmp_path / "data", "colours", {"train": pictures([8, 8]), "test": pictures([2, 2], seed=1)})
    write_weights(tmp_path / "w.safetensors", "timm/test_vit", 2)
    common = ["data.dataset=colours", "data.validation=0", "model.name=timm/test_vit", GREY, "train.steps=1"]
    common += [f"model.weights={tmp_path / 'w.safetensors'}", "train.batch_size=8", "optimizer.name=sgd"]
    common += ["optimizer.learning_rate=0.5", "schedule.name=constant", "train.evaluate_every=0"]
    rates = ["optimizer.layer_decay=0.5", "optimizer.head_multiplier=3.0"]
    states = []
    for run, more in (("equal", []), ("own", rates)):
        trained = train(load("digits", [*common, *more]), tmp_path / run, tmp_path / "data", "cpu", tracking=False)
        states.append(torch.load(trained.folder / "checkpoints/step-1.pt")["raw"])
    start = models.build("timm/test_vit", (3, 32, 32), 2)
    network_rates = settings_by_timm(start)
    begin = load_file(tmp_path / "w.safetensors")
    for name in begin:
        if name.startswith("head."):
            continue  # the new head begins with other weights than those of the file
        moved, moved_by_rate = states[0][name] - begin[name], states[1][name] - begin[name]
        torch.testing.assert_close(moved_by_rate, network_rates[name] * moved, rtol=1e-3, atol=2e-6)


def test_a_layer_decay_that_timm_knows_no_layers_for_names_the_setting() -> None:
    optimizer = Sgd(name="sgd", learning_rate=0.1, layer_decay=0.9)
    with refused("optimizer.layer_decay", "timm"):
        parameter_groups(nn.Linear(3, 3), [], optimizer)

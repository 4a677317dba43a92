"""A small pretrained network, fine-tuned, exported and proven by the commands, as a user does it."""

import json
from pathlib import Path

import numpy as np
import pytest

from serving.model import open_model
from tests.conftest import run_command
from tests.pipeline.small_datasets import GREY, pictures, write_dataset, write_weights
from tests.shared import shared_folder

pytestmark = pytest.mark.all

SLOW = pytest.mark.slow
NETWORKS = [
    "timm/test_efficientnet",
    pytest.param("timm/test_byobnet", marks=SLOW),
    pytest.param("timm/test_vit", marks=SLOW),
]


def fine_tune(folder: Path, network: str) -> None:
    splits = {"train": pictures([80, 40, 40]), "test": pictures([20, 20, 20], seed=1)}
    write_dataset(folder / "data", "colours", splits)
    write_weights(folder / "started.safetensors", network, 2)
    settings = ["data.dataset=colours", "data.validation=0.2", GREY, f"model.name={network}", "train.batch_size=16"]
    settings += ["model.weights=started.safetensors", "train.freeze=backbone", "train.freeze_steps=20"]
    settings += ["train.epochs=4", "train.freeze_statistics=true", "train.label_smoothing=0.1", "train.clip_norm=1.0"]
    settings += ["train.class_weights=balanced", "data.sampling=balanced", "train.average_decay=0.9"]
    settings += ["train.evaluate_every=10", "train.keep=best", "optimizer.name=adamw", "optimizer.learning_rate=0.003"]
    settings += ["optimizer.head_multiplier=3.0", "optimizer.layer_decay=0.8", "optimizer.weight_decay=0.05"]
    settings += [
        "schedule.name=cosine",
        "schedule.warmup=0.1",
        "augment.flip=true",
        "augment.resized_crop.scale=[0.5,1.0]",
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    run_command(folder, "pipeline", "train", "digits", "--run", "colours", "--tracking", "none", *options)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_fine_tuned_network_is_exported_and_proven_in_every_precision(
    tmp_path_factory: pytest.TempPathFactory, network: str
) -> None:
    name = network.partition("/")[2]
    folder = shared_folder(tmp_path_factory, f"fine-tuned-{name}", lambda made: fine_tune(made, network))
    report = json.loads(run_command(folder, "pipeline", "evaluate", "colours", "--json").stdout)
    assert report["precision_at_1"] >= 0.9
    images, labels = pictures([20, 20, 20], seed=1)
    for precision in ("fp32", "fp16", "int8"):
        output = folder / f"{precision}.onnx"
        options = ("colours", "--precision", precision, "--output", output)
        assert "parity passed" in run_command(folder, "pipeline", "export", *options).stdout
        model = open_model(output, "cpu")
        assert (model.metadata["run"]["step"], model.metadata["pretrained"]["file"]) == (
            report["step"],
            "started.safetensors",
        )
        probability, _ = model.run(images)
        assert np.mean(probability.argmax(1) == labels) >= report["precision_at_1"] - 0.1
    assert "parity passed" in run_command(folder, "pipeline", "parity", folder / "fp32.onnx").stdout

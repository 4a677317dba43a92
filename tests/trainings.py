"""Trainings in their own processes, for tests that interrupt them and compare their weights."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import load_newest
from tests.conftest import command

TRAIN = ("pipeline", "train", "digits", "--tracking", "none")
# short steps and many checkpoints, so that a random kill often interrupts a save
SETTINGS = ["train.steps=400", "train.checkpoint_every=7", "train.evaluate_every=100", "train.batch_size=16"]
# augmentations and dropout, whose random numbers must be the same after a resumption
SETTINGS += ["augment.random_crop=true", "augment.padding=1", "augment.flip=true", "augment.contrast=[0.5,1.5]"]
SETTINGS += ["model.name=deep_mnist", "optimizer.learning_rate=1e-4"]
KILLABLE = tuple(word for setting in SETTINGS for word in ("--set", setting))


def points(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_state(run: Path) -> dict[str, Any]:
    state = load_newest(run / "checkpoints")
    assert state is not None
    return state


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = final_state(one), final_state(other)
    assert a["step"] == b["step"]
    for weights in ("raw", "averaged"):
        assert all(torch.equal(value, b[weights][name]) for name, value in a[weights].items())
    for index, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][index][name]))


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*TRAIN, *KILLABLE, *arguments), cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def wait_for_steps(process: subprocess.Popen[str], steps: int) -> None:
    """Read the log until step `steps` is logged."""
    assert process.stderr is not None
    for line in process.stderr:
        if f"step {steps}," in line:
            return
    pytest.fail(f"the training ended (exit {process.wait()}) before step {steps}")

"""model-card.md beside an exported file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from pipeline.exporting.model_card import model_card
from pipeline.exporting.parity_result import Parity
from pipeline.metrics import Evaluation
from tests.commands import run_command

METADATA = {
    "classes": ["cat", "a|b\n*c*"],
    "image": {"height": 24, "width": 32, "channels": 3},
    "dataset": {
        "name": "pets",
        "fingerprint": "f" * 64,
        "source": {"name": "pets.tar", "sha256": "a" * 64},
        "leaks": 3,
    },
    "recipe": {"name": "own", "model": {"name": "timm/resnet10t"}, "train": {"batch_size": 32}},
    "run": {"id": "123", "name": "own", "seed": 7, "step": 1500},
    "pretrained": {"name": "pip:package", "sha256": "b" * 64},
    "parity": {"images": 99, "precision": "int8", "provider": "cpu", "probability_difference": {"largest": 0.0012}},
    "versions": {"convline": "0.1.0"},
}
COUNTS = {"train": {"cat": 40, "a|b\n*c*": 2}, "test": {"cat": 9, "a|b\n*c*": 1}}


@pytest.fixture
def card() -> str:
    test = Evaluation(METADATA["classes"])  # type: ignore[arg-type]
    test.add(np.array([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2, np.float32), np.array([0] * 9 + [1]))
    return model_card("own", METADATA, COUNTS, test)


def test_a_card_has_figures_with_intervals(card: str) -> None:
    def share(hits: int, count: int) -> str:
        low, high = binomtest(hits, count).proportion_ci(method="wilson")
        return f"{hits / count:.1%} ({low:.1%} to {high:.1%})"

    assert f"precision @ 1 = {share(9, 10)}, on 10 images" in card
    assert f"| cat | 9 | {share(8, 8)} | {share(8, 9)} |" in card
    assert f"| a\\|b \\*c\\* | 1 | {share(1, 2)} | {share(1, 1)} |" in card


def test_a_card_says_what_the_file_learned_from_and_what_was_proven(card: str) -> None:
    for told in (
        "24x32 pixels (height x width), RGB",
        "dataset: pets, 42 train, 10 test images",
        "3 images are in two splits",
        "timm/resnet10t",
        "1,500 steps, batches of 32, seed 7",
        "pretrained weights: pip:package, SHA-256 bbb",
        "in int8 by onnxruntime (cpu): largest difference of a probability 0.0012",
    ):
        assert told in card


def test_a_card_says_how_sure_the_file_is() -> None:
    test = Evaluation(METADATA["classes"])  # type: ignore[arg-type]
    test.add(np.array([[1.0, 0.0]], np.float32), np.array([0]))
    error = {"error": 0.0116, "interval": [0.006, 0.0174]}
    found = {
        "precision": 0.9589,
        "precision_interval": [0.952, 0.9649],
        "coverage": 0.3678,
        "coverage_interval": [0.36, 0.38],
    }
    confident = {
        "calibration": {"errors": {"test": {"after": error}}},
        "decision": {"threshold": 0.75, "wanted_precision": 0.95, "test": found},
        "unfamiliar": {"test": {"count": 500, "above_1": 20, "interval": [0.026, 0.061]}},
    }
    card = model_card("own", METADATA | confident, COUNTS, test)
    assert "calibration error on test: 0.0116 (0.0060 to 0.0174)" in card
    assert "below 0.75 are `unsure`" in card and "wanted was 0.95" in card
    assert "unlike the training images; on test for 4.0% (2.6% to 6.1%)" in card
    assert "0.9589 (0.9520 to 0.9649)" in card and "share of all: 0.3678" in card


def test_an_export_writes_the_card_beside_its_file(own_project: Path) -> None:
    run = own_project / "runs/digits"
    evaluation = json.loads(run_command(own_project, "pipeline", "evaluate", "--onnx", "--json").stdout)
    card = (run / "model-card.md").read_text()
    assert f"precision @ 1 = {evaluation['precision_at_1']:.1%}" in card and f"{evaluation['count']} images" in card
    assert len(re.findall(r"^\| \d \|", card, re.MULTILINE)) == 10
    run_command(own_project, "pipeline", "export", "--output", "other.onnx")
    assert (own_project / "other.model-card.md").read_text() == card


def test_an_export_that_is_not_proven_leaves_the_card(own_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (own_project / "runs/digits/model-card.md").read_bytes()
    monkeypatch.setattr(Parity, "problems", property(lambda _: ["it is wrong"]))
    run_command(own_project, "pipeline", "export", status=1)
    assert (own_project / "runs/digits/model-card.md").read_bytes() == before

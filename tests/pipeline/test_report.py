"""`pipeline report` and `pipeline compare`: pages on runs, and what stands in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pipeline.dataset import Split
from pipeline.network import layers
from pipeline.report import SECTIONS
from pipeline.reporting.curves import curves
from pipeline.reporting.diagrams import confusion
from pipeline.reporting.filters import filter_sheet, first_filters
from pipeline.reporting.outcomes import Outcomes
from pipeline.reporting.plots import short
from pipeline.run import Run
from pipeline.tracking.points import packed, read_points, unpacked
from pipeline.training.layer_summary import BINS, distribution, sample, summarize
from tests.conftest import run_command
from tests.pages import check
from tests.pipeline.helpers import image_folder
from tests.trainings import points

HOSTILE = ("<script>alert(1)<script>", "\"quoted' & <b>", "right\u202eto left", "x" * 200, "$\\alpha_$")


@pytest.fixture(scope="module")
def mine(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `project`."""
    folder = tmp_path_factory.mktemp("mine") / "project"
    shutil.copytree(project, folder)
    return folder


@pytest.fixture(scope="module")
def reported(mine: Path) -> Path:
    """Its run, with a report."""
    run_command(mine, "pipeline", "report", "digits")
    return mine / "runs/digits"


def test_a_report_has_all_its_sections_from_real_data(reported: Path) -> None:
    page = check(reported / "report.html")
    assert page.texts("h2") == list(SECTIONS)
    precision = json.loads((reported / "parity.json").read_text())["precision_at_1"]["pytorch"]
    assert f"{precision:.2%}" in page.texts("dd") and "53,002" in page.texts("dd")
    titles = {text for tag, text in page.text if tag == "p"}
    drawn = {"Loss", "Learning rate", "Precision @ 1 of the averaged weights", "Confusion matrix", "Calibration"}
    assert drawn | {"Before training", "After training", "Sparsity of activations", "conv1", "fc2"} <= titles
    assert len(page.all("img")) >= 60 + 24 + 2  # examples, least confident hits, filters
    assert Run.open(reported).info["id"] in page.texts("td")


def test_the_pictures_of_a_report_are_files_too(reported: Path) -> None:
    names = {path.stem for path in (reported / "pictures").iterdir()}
    assert {
        "loss",
        "confusion",
        "calibration",
        "network",
        "filters-after",
        "narrow-hits",
        "layer-conv1",
        "batch",
    } <= names
    for path in (reported / "pictures").iterdir():
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 1, f"{path} is empty"


def test_a_run_without_model_summaries_and_evaluations_has_a_report(tmp_path: Path) -> None:
    names = [name for name in HOSTILE if name.isprintable()]  # the others are refused
    image_folder(tmp_path / "source", dict.fromkeys(names, 6), size=(8, 8))
    run_command(tmp_path, "pipeline", "preprocess", "odd", "--source", "source")
    options = ("--steps", 2, "--tracking", "none", "--set", "train.summary_every=0", "--set", "augment.flip=true")
    quiet = ("--set", "train.evaluate_every=0", "--set", "data.validation=0", "--set", "train.batch_size=4")
    run_command(tmp_path, "pipeline", "train", "digits", "--dataset", "odd", "--run", "odd", *options, *quiet)
    run_command(tmp_path, "pipeline", "report", "odd")
    page = check(tmp_path / "runs/odd/report.html")
    told = " ".join(text for _, text in page.text)
    assert "has no summaries" in told and "not exported yet" in told and "what training may see" in told
    named = page.texts("bdi")
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[4], "x" * 59 + "…" + "x" * 60} <= set(named)


def test_runs_are_compared_in_a_table_and_on_the_same_axes(mine: Path, tmp_path: Path) -> None:
    run_command(mine, "pipeline", "train", "mlp", "--dataset", "digits", "--run", "other", "--steps", 20,
                "--tracking", "none", "--set", "data.validation=0")  # fmt: skip
    page = tmp_path / "page.html"
    told = run_command(mine, "pipeline", "compare", "digits", "other", "--output", page).stdout.splitlines()
    assert told[0].split() == [
        "run",
        "network",
        "dataset",
        "steps",
        "time",
        "train",
        "validation",
        "test",
        "parameters",
        "multiply-adds",
    ]
    assert told[1].startswith("digits") and "53,002" in told[1] and told[2].startswith("other")
    assert "Smoothed loss" in check(page).texts("p") and told[-1] == str(page)
    figures = json.loads(run_command(mine, "pipeline", "compare", "digits", "other", "--output", page, "--json").stdout)
    assert figures[0]["precision_at_1"] == points(mine / "runs/digits")[-2]["precision_at_1"]
    assert (figures[0]["parameters"], figures[0]["multiply_adds"], figures[1]["steps"]) == (53_002, 347_392, 20)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


def test_a_summary_counts_what_the_layers_hold_and_changes_nothing() -> None:
    net, inputs = network().train(), torch.randn(40, 1, 8, 8)
    F.cross_entropy(net(inputs), torch.zeros(40, dtype=torch.long)).backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    told = summarize(net, inputs)
    assert net.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    assert list(told) == ["0", "5"] and set(told["0"]) == {"weights", "gradients", "activations"}
    counts = np.histogram(net[0].weight.detach().numpy(), BINS)[0]
    assert np.abs(np.array(told["0"]["weights"]["counts"]) - counts).sum() <= 2  # a value on an edge
    activations = F.relu(net.eval()[1](net[0](inputs[:16])))  # after the nonlinearity
    assert told["0"]["activations"]["zeros"] == pytest.approx((activations == 0).float().mean().item())
    assert told["0"]["gradients"]["std"] == pytest.approx(net[0].weight.grad.std(correction=0).item())


@pytest.mark.parametrize("values", [[1.0, float("nan")], [1.0, float("inf")]])
def test_values_that_are_not_finite_have_no_histogram(values: list[float]) -> None:
    assert distribution(torch.tensor(values)) == {"zeros": 0.0}


def test_values_that_are_all_the_same_have_one() -> None:
    assert sum(distribution(torch.zeros(7))["counts"]) == 7


def test_summaries_of_a_resumed_training_stand_once_each(tmp_path: Path) -> None:
    train = ("pipeline", "train", "digits", "--tracking", "none", "--set", "train.checkpoint_every=10")
    run_command(tmp_path, *train, "--steps", 25, "--set", "train.summary_every=5")
    run = tmp_path / "runs/digits"
    whole = [line["step"] for line in map(json.loads, (run / "summaries.jsonl").read_text().splitlines())]
    (run / "checkpoints/step-25.pt").unlink()  # as if it had been killed on its way there
    run_command(tmp_path, *train, "--steps", 25, "--set", "train.summary_every=5", "--resume")
    steps = [line["step"] for line in map(json.loads, (run / "summaries.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps)) and whole[0] == steps[0] == 0


def test_summaries_have_images_of_the_batch_as_the_network_saw_them(project: Path) -> None:
    run = Run.open(project / "runs/digits")
    first = unpacked(next(read_points(run.summaries)).values["images"])
    assert first.shape == (8, 8, 8, 1) and {image.max() for image in first} == {255}
    stored = np.asarray(run.dataset(project / "data").split("train").images)
    for image in first:  # digits are pixels from 0 to 255 and neither cropped nor distorted
        assert (np.abs(stored.astype(int) - image).max(axis=(1, 2, 3)) <= 1).any()


def test_images_of_a_batch_are_few_small_and_of_the_whole_range() -> None:
    inputs = torch.randn(20, 3, 130, 50) + 7
    seen = sample(inputs)
    assert seen.shape == (8, 44, 17, 3) and seen.dtype == np.uint8
    one = inputs[3, :, ::3, ::3].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen[3] / 255, (one - one.min()) / (one.max() - one.min()), atol=1 / 255)
    assert (unpacked(json.loads(json.dumps(packed(seen)))) == seen).all()


def outcomes() -> Outcomes:
    """Of six images of two classes; the network's answers are fixed."""
    answers = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05], [0.3, 0.7], [0.45, 0.55]], np.float32)
    split = Split("test", np.zeros((6, 1, 1, 1), np.uint8), np.array([0, 0, 0, 1, 1, 1]), np.arange(6))
    return Outcomes.of(lambda images: (answers[: len(images)], np.log(answers[: len(images)])), split, ["a", "b"])


def test_mistakes_and_hits_come_in_the_order_of_confidence() -> None:
    found = outcomes()
    assert found.mistakes(9).tolist() == [3, 2] and found.narrow_hits(2).tolist() == [5, 1]
    assert found.confused(5) == [(0, 1, 1), (1, 0, 1)]


def test_calibration_is_the_distance_of_confidence_from_hits() -> None:
    confidence, hits, counts, error = outcomes().calibration()
    assert counts.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert confidence[9] == pytest.approx(0.925) and hits.tolist()[5:] == [1, 1, 1, 0, 0.5]
    # (|0.55 - 1| + |0.6 - 1| + |0.7 - 1| + |0.8 - 0| + 2 * |0.925 - 0.5|) / 6
    assert error == pytest.approx(2.8 / 6)


def test_layers_tell_their_shapes_and_costs() -> None:
    first, last = layers(network(), (1, 8, 8))
    assert (first.kind, first.input_shape, first.output_shape, first.parameters) == (
        "conv 3×3",
        (1, 8, 8),
        (4, 6, 6),
        40,
    )
    assert (first.multiply_adds, last.multiply_adds, last.kind) == (9 * 4 * 36, 144 * 3, "linear")


def test_filters_are_shown_each_on_its_own_scale() -> None:
    weights = np.stack([np.full((3, 2, 2), -7.0), np.arange(12).reshape(3, 2, 2)]).astype(np.float32)
    sheet = np.asarray(filter_sheet(weights).convert("RGBA"))
    assert sheet[0, 0, :3].tolist() == [0, 0, 0] and sheet[-1, -1].tolist() == [69, 162, 255, 255]
    assert first_filters(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)).shape == (5, 3, 2, 2)
    assert first_filters(nn.Sequential(nn.Linear(7, 5)), (3, 2, 2)) is None


@pytest.mark.parametrize("classes", [2, 15, 40])
def test_figures_hold_hostile_names_as_text(classes: int) -> None:
    names = [f"{HOSTILE[number % len(HOSTILE)]}{number}" for number in range(classes)]
    drawn = confusion(np.eye(classes, dtype=np.int64), names)
    assert "<script>" not in drawn.svg() and drawn.png().startswith(b"\x89PNG")
    line = (HOSTILE[0], np.arange(3), np.ones(3))
    assert "<script>" not in curves("loss", "Loss", [line, line], "loss").svg()
    assert short(HOSTILE[2]) == "rightto left" and len(short(HOSTILE[3])) == 14


def test_a_large_tensor_is_sampled_everywhere() -> None:
    border = torch.zeros(16, 4, 64, 64)
    border[..., 0] = 1.0  # one column of 64
    told = distribution(border)
    assert told["zeros"] == pytest.approx(63 / 64, abs=0.005)
    assert told["std"] == pytest.approx(border.std().item(), rel=0.05)


def test_activations_are_those_of_the_whole_layer_where_it_is_pooled_first() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 2, 3), nn.Linear(18, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(F.relu(F.max_pool2d(self.one(x), 2), inplace=True).flatten(1))

    net, images = Pooled(), torch.randn(4, 1, 8, 8)
    told = summarize(net, images)["one"]["activations"]
    with torch.no_grad():
        after = net.one(images).clamp(min=0)
    assert told["zeros"] == pytest.approx((after == 0).float().mean().item())
    assert told["lowest"] == 0 and told["highest"] == pytest.approx(after.max().item())


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "int8"])
def test_a_report_on_an_export_of_another_precision_says_so(mine: Path, precision: str) -> None:
    run_command(mine, "pipeline", "export", "digits", "--precision", precision)
    run_command(mine, "pipeline", "report", "digits")
    assert any(f"in {precision}, on cpu" in text for text in check(mine / "runs/digits/report.html").texts("td"))


def test_images_without_a_finite_confidence_are_left_out_of_calibration() -> None:
    split = Split("test", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]), np.arange(2))
    answers = np.array([[np.nan, np.nan], [0.25, 0.75]], np.float32)
    found = Outcomes.of(lambda images: (answers[: len(images)], answers[: len(images)]), split, ["a", "b"])
    assert found.calibration()[2].sum() == 1 and found.calibration()[3] == pytest.approx(0.25)

"""`pipeline report` and `pipeline compare`: the contents of their pages; summaries of layers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from convline.html import card, cards, display_name, element, long_table, page, table, table_cards
from pipeline.dataset import Split
from pipeline.network import layers
from pipeline.report import SECTIONS
from pipeline.reporting.confusion_matrix import confusion_matrix
from pipeline.reporting.filters import filter_sheet, first_filters
from pipeline.reporting.layer_plots import layer_plots
from pipeline.reporting.learning_curves import line_plot, training_curves
from pipeline.reporting.plots import short_label
from pipeline.reporting.predictions import SplitPredictions
from pipeline.run import Run
from pipeline.tracking.points import Point, packed, read_points, unpacked
from pipeline.training.layer_summary import BINS, distribution, sample, summarize
from tests.browser import screenshot
from tests.conftest import run_command
from tests.pages import check
from tests.pipeline.helpers import image_folder
from tests.trainings import points

HOSTILE = ("<script>alert(1)<script>", "\"quoted' & <b>", "right\u202eto left", "x" * 200, "$\\alpha_$")


@pytest.fixture(scope="module")
def project_copy(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `project` that the tests of this module may change."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(project, folder)
    return folder


@pytest.fixture(scope="module")
def reported_run(project_copy: Path) -> Path:
    """The folder of a run with a report."""
    run_command(project_copy, "pipeline", "report", "digits")
    return project_copy / "runs/digits"


def test_a_report_has_all_its_sections(reported_run: Path) -> None:
    page = check(reported_run / "report.html")
    assert page.texts("h2") == list(SECTIONS)
    precision = json.loads((reported_run / "parity.json").read_text())["precision_at_1"]["pytorch"]
    assert f"{precision:.2%}" in page.texts("dd") and "53,002" in page.texts("dd")
    titles = {text for tag, text in page.text if tag == "p"}
    plots = {"Loss", "Learning rate", "Precision @ 1 of the averaged weights", "Confusion matrix", "Calibration"}
    plots |= {"Coverage and precision"}
    assert plots | {"Before training", "After training", "Sparsity of activations", "conv1", "fc2"} <= titles
    assert len(page.all("img")) >= 60 + 24 + 2  # examples, least confident hits, filters
    assert Run.open(reported_run).info["id"] in page.texts("td")


def test_the_pictures_of_a_report_are_files_too(reported_run: Path) -> None:
    names = {path.stem for path in (reported_run / "pictures").iterdir()}
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
    for path in (reported_run / "pictures").iterdir():
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
    text = " ".join(text for _, text in page.text)
    assert "has no summaries" in text and "not exported yet" in text and "what training may see" in text
    assert (tmp_path / "runs/odd/pictures/augmented.png").exists()
    shown_names = page.texts("bdi")
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[4], "x" * 59 + "…" + "x" * 60} <= set(shown_names)
    mistakes = [alt for image in page.all("img") if "truth" in (alt := image["alt"] or "")]
    assert mistakes and all(re.fullmatch(r"predicted .* \d+\.\d%, truth .*", alt) for alt in mistakes)


def test_runs_are_compared_in_a_table_and_on_the_same_axes(project_copy: Path, tmp_path: Path) -> None:
    run_command(project_copy, "pipeline", "train", "mlp", "--dataset", "digits", "--run", "other", "--steps", 20,
                "--tracking", "none", "--set", "data.validation=0")  # fmt: skip
    page = tmp_path / "page.html"
    lines = run_command(project_copy, "pipeline", "compare", "digits", "other", "--output", page).stdout.splitlines()
    assert lines[0].split() == [
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
    assert lines[1].startswith("digits") and "53,002" in lines[1] and lines[2].startswith("other")
    assert "Smoothed loss" in check(page).texts("p") and lines[-1] == str(page)
    figures = json.loads(
        run_command(project_copy, "pipeline", "compare", "digits", "other", "--output", page, "--json").stdout
    )
    assert figures[0]["precision_at_1"] == points(project_copy / "runs/digits")[-2]["precision_at_1"]
    assert (figures[0]["parameters"], figures[0]["multiply_adds"], figures[1]["steps"]) == (53_002, 347_392, 20)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )


def test_a_summary_counts_the_values_of_layers_and_changes_nothing() -> None:
    net, inputs = network().train(), torch.randn(40, 1, 8, 8)
    F.cross_entropy(net(inputs), torch.zeros(40, dtype=torch.long)).backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    summary = summarize(net, inputs)
    assert net.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    assert list(summary) == ["0", "5"] and set(summary["0"]) == {"weights", "gradients", "activations"}
    weight = net.get_parameter("0.weight")
    counts = np.histogram(weight.detach().numpy(), BINS)[0]
    assert np.abs(np.array(summary["0"]["weights"]["counts"]) - counts).sum() <= 2  # a value on an edge
    activations = F.relu(net.eval()[1](net[0](inputs[:16])))  # after the nonlinearity
    assert summary["0"]["activations"]["zeros"] == pytest.approx((activations == 0).float().mean().item())
    assert summary["0"]["gradients"]["std"] == pytest.approx(weight.grad.std(correction=0).item())


@pytest.mark.parametrize("values", [[1.0, float("nan")], [1.0, float("inf")]])
def test_values_that_are_not_finite_have_no_histogram(values: list[float]) -> None:
    assert distribution(torch.tensor(values)) == {"zeros": 0.0}


def test_equal_values_have_a_histogram() -> None:
    assert sum(distribution(torch.zeros(7))["counts"]) == 7


def test_a_resumed_training_has_each_summary_once(tmp_path: Path) -> None:
    train = ("pipeline", "train", "digits", "--tracking", "none", "--set", "train.checkpoint_every=10")
    run_command(tmp_path, *train, "--steps", 25, "--set", "train.summary_every=5")
    run = tmp_path / "runs/digits"
    first_steps = [line["step"] for line in map(json.loads, (run / "summaries.jsonl").read_text().splitlines())]
    (run / "checkpoints/step-25.pt").unlink()  # as if it had been killed before that step
    run_command(tmp_path, *train, "--steps", 25, "--set", "train.summary_every=5", "--resume")
    steps = [line["step"] for line in map(json.loads, (run / "summaries.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps)) and first_steps[0] == steps[0] == 0


def test_summaries_have_images_of_the_batch_as_the_network_saw_them(project: Path) -> None:
    run = Run.open(project / "runs/digits")
    first = unpacked(next(read_points(run.summaries)).values["images"])
    assert first.shape == (8, 8, 8, 1) and {image.max() for image in first} == {255}
    stored = np.asarray(run.dataset(project / "data").split("train").images)
    for image in first:  # digits are pixels from 0 to 255 and neither cropped nor distorted
        assert (np.abs(stored.astype(int) - image).max(axis=(1, 2, 3)) <= 1).any()


def test_images_of_a_batch_are_few_and_small_and_use_the_whole_range() -> None:
    inputs = torch.randn(20, 3, 130, 50) + 7
    seen = sample(inputs)
    assert seen.shape == (8, 44, 17, 3) and seen.dtype == np.uint8
    one = inputs[3, :, ::3, ::3].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(seen[3] / 255, (one - one.min()) / (one.max() - one.min()), atol=1 / 255)
    assert (unpacked(json.loads(json.dumps(packed(seen)))) == seen).all()


def predictions() -> SplitPredictions:
    """For six images of two classes; the network's probabilities are fixed."""
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.95, 0.05], [0.3, 0.7], [0.45, 0.55]], np.float32)
    split = Split("test", np.zeros((6, 1, 1, 1), np.uint8), np.array([0, 0, 0, 1, 1, 1]), np.arange(6))
    return SplitPredictions.compute(
        lambda images: (probabilities[: len(images)], np.log(probabilities[: len(images)])), split, ["a", "b"]
    )


def test_mistakes_and_hits_are_sorted_by_confidence() -> None:
    sample = predictions()
    assert sample.mistakes(9).tolist() == [3, 2] and sample.narrow_hits(2).tolist() == [5, 1]
    assert sample.confused(5) == [(0, 1, 1), (1, 0, 1)]


def test_the_calibration_error_is_the_distance_of_confidence_from_hits() -> None:
    found = predictions().calibration()
    # 0.55 lies above 8/15, 0.7 above 10/15; float32 rounds 0.6 and 0.8 up, and so past 9/15 and 12/15
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert found.confidence[8] == pytest.approx(0.55) and found.hits.tolist()[8:] == [1, 1, 1, 0, 0, 1, 0]
    # |0.55 - 1| + |0.6 - 1| + |0.7 - 1| + |0.8 - 0| + |0.9 - 1| + |0.95 - 0|
    assert found.error == pytest.approx(3.0 / 6)


def test_layers_have_shapes_and_costs() -> None:
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
    plot = confusion_matrix(np.eye(classes, dtype=np.int64), names)
    assert "<script>" not in plot.svg() and plot.png().startswith(b"\x89PNG")
    line = (HOSTILE[0], np.arange(3), np.ones(3))
    assert "<script>" not in line_plot("loss", "Loss", [line, line], "loss").svg()
    assert short_label(HOSTILE[2]) == "rightto left" and len(short_label(HOSTILE[3])) == 14


def test_a_large_tensor_is_sampled_everywhere() -> None:
    border = torch.zeros(16, 4, 64, 64)
    border[..., 0] = 1.0  # one column of 64
    sampled = distribution(border)
    assert sampled["zeros"] == pytest.approx(63 / 64, abs=0.005)
    assert sampled["std"] == pytest.approx(border.std().item(), rel=0.05)


def test_activations_are_those_of_the_whole_layer_where_it_is_pooled_first() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 2, 3), nn.Linear(18, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(F.relu(F.max_pool2d(self.one(x), 2), inplace=True).flatten(1))

    net, images = Pooled(), torch.randn(4, 1, 8, 8)
    activations = summarize(net, images)["one"]["activations"]
    with torch.no_grad():
        after = net.one(images).clamp(min=0)
    assert activations["zeros"] == pytest.approx((after == 0).float().mean().item())
    assert activations["lowest"] == 0 and activations["highest"] == pytest.approx(after.max().item())


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "int8"])
def test_a_report_names_the_precision_of_the_exported_file(project_copy: Path, precision: str) -> None:
    run_command(project_copy, "pipeline", "export", "digits", "--precision", precision)
    run_command(project_copy, "pipeline", "report", "digits")
    page = check(project_copy / "runs/digits/report.html")
    assert any(f"in {precision}, on cpu" in text for text in page.texts("td"))


def test_images_without_a_finite_confidence_are_left_out_of_calibration() -> None:
    split = Split("test", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1]), np.arange(2))
    outputs = np.array([[np.nan, np.nan], [0.25, 0.75]], np.float32)
    computed = SplitPredictions.compute(lambda _: (outputs, outputs), split, ["a", "b"])
    found = computed.calibration()
    assert found.counts.sum() == 1 and found.error == pytest.approx(0.25)


def test_a_metric_that_never_changes_is_a_sentence_and_not_a_plot() -> None:
    values = {"smoothed_loss": 2.0, "learning_rate": 0.01, "batch_accuracy": 0.5}
    recorded = [Point(step, 0, 0.0, {"loss": 2.0 / (step + 1), **values}, 0) for step in (0, 10, 1500)]
    recorded[1].values["precision_at_1"] = 0.875
    plots, sentences = training_curves(recorded)
    assert [plot.name for plot in plots] == ["loss"]
    assert sentences == [
        "Precision @ 1 of the averaged weights: test 0.875 at step 10.",
        "Accuracy on each batch: 0.5 from step 0 to 1,500.",
        "Learning rate: 0.01 from step 0 to 1,500.",
    ]


def test_a_single_summary_is_a_sentence(reported_run: Path) -> None:
    summaries = list(read_points(reported_run / "summaries.jsonl"))
    assert {plot.name for plot in layer_plots(summaries[:2]).plots} == {
        *(f"layer-{layer}" for layer in ("conv1", "conv2", "fc1", "fc2")),
        "sparsity",
    }
    plots, (sentence,) = layer_plots(summaries[:1])
    zeros = summaries[0].values["layers"]["conv1"]["activations"]["zeros"]
    assert not plots and sentence.startswith(f"Sparsity of activations: conv1 {zeros:.4g} at step 0; conv2 ")


def test_many_rows_are_folded_up_and_none_is_lost(tmp_path: Path) -> None:
    rows = [(f"class_{n}/of/many", f"{n}") for n in range(50)]
    folded = long_table(("class", "n"), [(display_name(name), number) for name, number in rows], "Rows", "classes")
    text = page("Rows", "", [("Rows", folded)])
    (tmp_path / "page.html").write_text(text)
    found = check(tmp_path / "page.html")
    assert found.texts("summary") == ["The other 30 classes"] and len(found.all("table")) == 2
    # a long name wraps behind its slashes, and is one text
    assert found.texts("bdi")[1:] == [name for name, _ in rows] and "class_<wbr>0/<wbr>of/<wbr>many" in text


@pytest.mark.all
def test_a_card_is_as_high_and_as_wide_as_its_content(tmp_path: Path) -> None:
    rows = [(display_name("a"), *["100.0% (90% to 100%)"] * 4)]
    wide = card("A table", table(("class", *"1234"), rows, "A table"))
    high = card("high", element("div", style="height:600px"))
    content = [cards(card("short", element("div", "short")), high), table_cards(wide)]
    style = ":root{--ground:#0f0;--card:#00f} td:last-child{background:#ff0}"
    (tmp_path / "page.html").write_text(page("Cards", "", [("Cards", content)], style=style))
    pixels = screenshot(tmp_path / "page.html", 1280, 1200)
    is_card, is_last_cell = ((pixels == color).all(2) for color in ((0, 0, 255), (255, 255, 0)))
    left, right = is_card[:, 54], is_card[:, 1200]  # beside the text in the cards
    top = int(left.argmax())
    assert int(left[top:].argmin()) < 120 and int(right[top:].argmin()) > 600  # a short card beside a high one
    row, cells = int(is_last_cell.any(1).argmax()), is_last_cell.any(0)
    end = 1280 - int(cells[::-1].argmax())  # the table is not cut: its card goes on behind it
    assert cells.sum() > 120 and is_card[row, end + 5] and end < 1000

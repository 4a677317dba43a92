"""`pipeline parity`: a published file is compared again with its checkpoint, or with another file."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from models.served_network import ServedNetwork
from pipeline.exporting.boundary_images import PAIRS, BoundaryImages
from pipeline.exporting.comparison import compare_models, split_batches
from pipeline.exporting.graph import to_onnx
from pipeline.exporting.onnx_predictor import onnx_predictor
from pipeline.exporting.parity_result import NamedBatch, Parity
from pipeline.exporting.tolerances import TOLERANCES, Precision, Tolerance
from pipeline.network import Predict, load_network, predictor
from pipeline.run import Run
from tests.conftest import run_command
from tests.serving.helpers import resealed


def test_parity_proves_the_published_file_again(project: Path, model: Path, tmp_path: Path) -> None:
    by_run = run_command(project, "pipeline", "parity", "digits").stdout
    assert by_run.startswith("parity passed")
    copy = tmp_path / "elsewhere.onnx"
    shutil.copy(model, copy)
    report = json.loads(run_command(project, "pipeline", "parity", copy, "--json").stdout)
    assert report["passed"]
    assert report["images"] == 359 + 4 * 68 and report["blends"] == 64
    assert report["relative_logit_difference"]["largest"] <= report["logit_tolerance"] == 2e-5
    assert report["probability_difference"]["largest"] <= 1e-5


def test_parity_refuses_a_file_of_another_step(own_project: Path) -> None:
    run = own_project / "runs/digits"
    state = torch.load(run / "checkpoints/step-300.pt", weights_only=True)
    torch.save(state | {"step": 301}, run / "checkpoints/step-301.pt")
    assert "export again" in run_command(own_project, "pipeline", "parity", status=1).stderr


def test_parity_finds_a_file_that_is_not_the_checkpoint(own_project: Path) -> None:
    run = own_project / "runs/digits"
    state = torch.load(run / "checkpoints/step-300.pt", weights_only=True)
    state["averaged"]["fc2.bias"][0] += 0.5
    torch.save(state, run / "checkpoints/step-300.pt")
    before = (run / "model.onnx").read_bytes()
    assert "parity FAILED" in run_command(own_project, "pipeline", "parity", status=1).stderr
    assert (run / "model.onnx").read_bytes() == before


def test_parity_on_your_own_images(project: Path, model: Path, samples: Path) -> None:
    output = run_command(project, "pipeline", "parity", model, "--images", samples).stdout
    assert output.startswith("parity passed: 372 images")  # 100, and 68 four times
    assert "precision" not in output  # the images have no labels


def test_unusable_images_are_skipped(project: Path, samples: Path, tmp_path: Path) -> None:
    shutil.copytree(samples / "0", tmp_path / "images")
    (tmp_path / "images/broken.png").write_bytes(b"nothing")
    result = run_command(project, "pipeline", "parity", "--images", tmp_path / "images")
    assert "broken.png is skipped: not-an-image" in result.stderr
    (tmp_path / "none").mkdir()
    error = run_command(project, "pipeline", "parity", "--images", tmp_path / "none", status=1).stderr
    assert "holds no image that could be compared" in error


def test_parity_against_another_file(own_project: Path, model: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_project / "runs/digits/checkpoints")  # not needed
    output = run_command(own_project, "pipeline", "parity", "digits", "--against", model, "--json").stdout
    report = json.loads(output)
    assert report["passed"] and report["probability_difference"]["largest"] == 0
    assert report["precision_at_1"]["runs/digits/model.onnx"] == report["precision_at_1"][str(model)]

    def edit(proto: onnx.ModelProto) -> None:
        bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "network.fc2.bias")
        # within the tolerance of the self-test, beyond that of parity
        moved = numpy_helper.to_array(bias) + np.linspace(0, 4e-4, 10, dtype=np.float32)
        bias.CopyFrom(numpy_helper.from_array(moved, bias.name))

    other = resealed(model, tmp_path / "other.onnx", edit)
    error = run_command(own_project, "pipeline", "parity", "digits", "--against", other, status=1).stderr
    assert "parity FAILED" in error and "|Δprobability| exceeds 1e-05" in error


def test_exchanged_classes_are_found_without_labels(project: Path, samples: Path, tmp_path: Path) -> None:
    run_command(project, "pipeline", "export", "--precision", "int8", "--output", tmp_path / "int8.onnx")

    def exchange(proto: onnx.ModelProto) -> None:
        """Exchange classes in pairs: each class is still predicted about as often."""
        order = onnx.numpy_helper.from_array(np.arange(10).reshape(5, 2)[:, ::-1].ravel(), "order")
        proto.graph.initializer.append(order)
        last = next(node for node in proto.graph.node if "logit" in node.output)
        last.output[:] = ["logits in order"]
        place = list(proto.graph.node).index(last)
        proto.graph.node.insert(
            place + 1, onnx.helper.make_node("Gather", ["logits in order", "order"], ["logit"], axis=1)
        )
        for entry in proto.metadata_props:
            if entry.key == "convline.probe":
                probe = json.loads(entry.value)
                probe["logits"] = np.array(probe["logits"])[:, np.arange(10).reshape(5, 2)[:, ::-1].ravel()].tolist()
                entry.value = json.dumps(probe)

    exchanged = resealed(tmp_path / "int8.onnx", tmp_path / "exchanged.onnx", exchange)
    result = run_command(project, "pipeline", "parity", exchanged, "--images", samples, "--json", status=1)
    assert "of 100 top-1 differ (allowed: 8)" in result.stderr
    report = json.loads(result.stdout)
    assert not report["passed"] and len(report["differing"]) == 20
    assert "differs: 0/" in result.stderr


def test_parity_works_beside_a_damaged_run(own_project: Path, tmp_path: Path) -> None:
    (own_project / "runs/another").mkdir()
    (own_project / "runs/another/run.json").write_text("[]")
    shutil.move(own_project / "runs/digits/model.onnx", tmp_path / "elsewhere.onnx")
    assert "parity passed" in run_command(own_project, "pipeline", "parity", tmp_path / "elsewhere.onnx").stdout


def outputs(*probabilities: list[float]) -> tuple[np.ndarray, np.ndarray]:
    p = np.array(probabilities, np.float32)
    return p, np.log(p)


def parity_of(
    tolerance: Tolerance, reference: list[list[float]], candidate: list[list[float]], labels: list[int] | None = None
) -> Parity:
    """Of two classes, from the probabilities that the reference and the candidate give."""
    parity = Parity(["a", "b"], tolerance)
    count = len(reference)
    images = np.zeros((count, 1, 1, 1), np.uint8)
    batch = NamedBatch([str(i) for i in range(count)], images, None if labels is None else np.array(labels))
    with np.errstate(invalid="ignore", divide="ignore"):
        parity.add(batch, outputs(*reference), outputs(*candidate))
    return parity


def test_a_tie_does_not_count_as_a_difference() -> None:
    assert parity_of(TOLERANCES["fp32"], [[0.500001, 0.499999]], [[0.499999, 0.500001]]).passed
    apart = parity_of(Tolerance(probability=1), [[0.51, 0.49]], [[0.49, 0.51]])
    assert apart.problems == ["1 top-1 differ"]
    (differing,) = apart.to_dict()["differing"]
    assert differing == {
        "image": "0",
        "pytorch": {"label": "a", "probability": 0.51},
        "onnx": {"label": "b", "probability": 0.51},
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_values_that_are_not_finite_never_pass(precision: Precision, value: float) -> None:
    parity = parity_of(TOLERANCES[precision], [[0.6, 0.4]] * 1000, [[0.6, 0.4]] * 999 + [[0.6, value]], [0] * 1000)
    assert parity.problems == ["a value is not a finite number"]
    json.dumps(parity.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("precision", "count", "allowed"), [("fp16", 100, 1), ("fp16", 3000, 3), ("int8", 1000, 5)])
def test_a_lower_precision_may_lose_a_limited_number_of_hits(precision: Precision, count: int, allowed: int) -> None:
    right, wrong = [0.9, 0.1], [0.4, 0.6]
    for lost, passes in ((allowed, True), (allowed + 1, False)):
        candidate = [wrong] * lost + [right] * (count - lost)
        parity = parity_of(TOLERANCES[precision], [right] * count, candidate, [0] * count)
        assert (parity.hits_lost, parity.passed) == (lost, passes)


def test_a_file_that_favours_a_class_fails_with_its_precision_unchanged() -> None:
    """Six hits of one class are lost, and six of the other won."""
    a, b = [0.9, 0.1], [0.1, 0.9]
    labels = [0] * 6 + [1] * 6 + [0] * 88
    reference = [a] * 6 + [a] * 6 + [a] * 88
    candidate = [b] * 6 + [b] * 6 + [a] * 88
    parity = parity_of(TOLERANCES["int8"], reference, candidate, labels)
    assert parity.hits_lost == 0
    assert parity.problems == ["12 of 100 predictions moved to other classes (allowed: 4)"]


def linear(weight: np.ndarray, bias: np.ndarray) -> Predict:
    """A linear model: logits are `weight` times the pixels plus `bias`, computed in float64."""

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logit = images.reshape(len(images), -1) @ weight + bias
        powers = np.exp(logit - logit.max(1, keepdims=True))
        return (powers / powers.sum(1, keepdims=True)).astype(np.float32), logit.astype(np.float32)

    return predict


@pytest.mark.parametrize("classes", [2, 5])
def test_boundary_images_lie_at_the_decision_boundary_whatever_the_order_of_the_images(classes: int) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (200, 6, 6, 1), np.uint8)
    predict = linear(draw.normal(size=(36, classes)), np.zeros(classes))
    logit = predict(images)[1]
    images = images[np.argsort(logit.argmax(1), kind="stable")]  # as where a split is sorted by class
    boundary_images = BoundaryImages(classes)
    for start in range(0, 200, 64):
        batch = images[start : start + 64]
        boundary_images.add(batch, predict(batch)[1].argmax(1))
    near = boundary_images.near_boundary(predict)
    assert near.dtype == np.uint8 and len(near) == 2 * PAIRS
    last, first = np.split(predict(near)[1], 2)
    assert (last.argmax(1) != first.argmax(1)).all()
    margins = [np.diff(np.sort(logits, 1)[:, -2:]).ravel() for logits in (logit, last, first)]
    assert max(margins[1].max(), margins[2].max()) < 0.05 * np.median(margins[0])


def test_there_are_no_boundary_images_where_all_predictions_are_equal() -> None:
    boundary_images = BoundaryImages(3)
    boundary_images.add(np.zeros((5, 2, 2, 1), np.uint8), np.ones(5, np.int64))
    assert len(boundary_images.near_boundary(linear(np.zeros((4, 3)), np.zeros(3)))) == 0


def saturated_parity(difference: np.ndarray, scale: float = 1000.0, count: int = 400) -> Parity:
    """Compares a saturated network of three classes, logits of about `scale`, with one whose logits differ by
    `difference`."""
    logit: np.ndarray = scale * np.random.default_rng(0).permuted(np.tile([-1.0, 0.0, 1.0], (count, 1)), axis=1)
    parity = Parity(list("abc"), TOLERANCES["fp32"])
    batch = NamedBatch([""] * count, np.zeros((count, 1, 1, 1), np.uint8), logit.argmax(1))
    p = np.exp(logit - logit.max(1, keepdims=True))
    parity.add(batch, (p, logit), (p, logit + difference))
    return parity


def test_rounding_errors_pass_and_a_wrong_bias_of_the_same_size_does_not() -> None:
    errors = np.random.default_rng(1).uniform(-1, 1, (400, 3))
    assert saturated_parity(0.01 * errors).passed  # 5e-6 of a range of 2,000
    (problem,) = saturated_parity(0.01 * np.array([0, 1, 0])).problems
    assert problem == "the mean Δlogit of a class is 5.0e-06 of the range (allowed: 1.0e-06)"
    assert saturated_parity(0.1 * errors).problems[0] == "|Δlogit| exceeds 2e-05 of the logits' range"


def test_an_image_is_compared_with_its_own_range_but_at_least_the_median_range() -> None:
    one = np.zeros((400, 3))
    one[7, 1] = 0.03
    assert saturated_parity(one).passed
    assert not saturated_parity(one, scale=100).passed
    assert saturated_parity(1e-5 * one, scale=1e-6).passed  # too little to change a probability


@pytest.fixture(scope="module")
def saturated(project: Path) -> ServedNetwork:
    """The trained digits network with logits a hundred times as large: every probability is 0 or 1."""
    served, _ = load_network(Run.open(project / "runs/digits"))
    with torch.no_grad():
        for tensor in served.network.fc2.parameters():
            tensor.mul_(100)
    return served


WRONG = {
    "a bias": ("network.fc2.bias", lambda b: b + torch.eye(10)[3] * 0.01),
    "a bias further in": ("network.conv1.bias", lambda b: b + torch.eye(len(b))[0] * 1e-4),
    "the mean": ("preprocessing.mean", lambda mean: mean + 0.01),
    "the scale": ("preprocessing.scale", lambda scale: scale * 1.0001),
}


@pytest.mark.parametrize("part", [None, *WRONG])
def test_an_error_that_a_saturated_softmax_hides_is_caught(
    project: Path, saturated: ServedNetwork, part: str | None
) -> None:
    run = Run.open(project / "runs/digits")
    exported = copy.deepcopy(saturated)
    if part is not None:
        name, change = WRONG[part]
        tensor = dict([*exported.named_parameters(), *exported.named_buffers()])[name]
        with torch.no_grad():
            tensor.copy_(change(tensor.clone()))
    parity = Parity(run.classes, TOLERANCES["fp32"])
    reference = predictor(saturated, torch.device("cpu"))
    candidate = onnx_predictor(to_onnx(exported, run.spec))
    compare_models(parity, reference, candidate, split_batches(run.dataset(project / "data").split("test")), run.spec)
    assert parity.boundary_images == 2 * PAIRS
    assert parity.largest_probability_difference < 1e-5 and not parity.top1_differences  # as if nothing were wrong
    assert parity.passed == (part is None), parity.problems

"""`pipeline parity`: a published file is proven again, against its checkpoint or another file."""

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
from pipeline import export
from pipeline.exporting.boundary_images import PAIRS, BoundaryImages
from pipeline.exporting.graph import to_onnx
from pipeline.exporting.tolerances import TOLERANCES, Batch, Parity, Tolerance
from pipeline.network import Predict, load_network, predictor
from pipeline.parity import compare, split_batches
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


def test_parity_on_images_of_ones_own(project: Path, model: Path, samples: Path) -> None:
    shown = run_command(project, "pipeline", "parity", model, "--images", samples).stdout
    assert shown.startswith("parity passed: 372 images")  # 100, and 68 four times
    assert "precision" not in shown  # nobody said what they show


def test_images_that_cannot_be_used_are_left_out_of_a_proof(project: Path, samples: Path, tmp_path: Path) -> None:
    shutil.copytree(samples / "0", tmp_path / "images")
    (tmp_path / "images/broken.png").write_bytes(b"nothing")
    result = run_command(project, "pipeline", "parity", "--images", tmp_path / "images")
    assert "broken.png is left out: not-an-image" in result.stderr
    (tmp_path / "none").mkdir()
    error = run_command(project, "pipeline", "parity", "--images", tmp_path / "none", status=1).stderr
    assert "holds no image that could be compared" in error


def test_parity_against_another_file(own_project: Path, model: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_project / "runs/digits/checkpoints")  # which is not needed
    shown = run_command(own_project, "pipeline", "parity", "digits", "--against", model, "--json").stdout
    report = json.loads(shown)
    assert report["passed"] and report["probability_difference"]["largest"] == 0
    assert report["precision_at_1"]["runs/digits/model.onnx"] == report["precision_at_1"][str(model)]

    def edit(proto: onnx.ModelProto) -> None:
        bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "network.fc2.bias")
        # within what the self-test lets pass, beyond what a proof does
        moved = numpy_helper.to_array(bias) + np.linspace(0, 4e-4, 10, dtype=np.float32)
        bias.CopyFrom(numpy_helper.from_array(moved, bias.name))

    other = resealed(model, tmp_path / "other.onnx", edit)
    error = run_command(own_project, "pipeline", "parity", "digits", "--against", other, status=1).stderr
    assert "parity FAILED" in error and "|Δprobability| may be 1e-05" in error


def test_a_file_whose_classes_are_exchanged_is_found_without_labels(
    project: Path, samples: Path, tmp_path: Path
) -> None:
    run_command(project, "pipeline", "export", "--precision", "int8", "--output", tmp_path / "int8.onnx")

    def exchange(proto: onnx.ModelProto) -> None:
        """Each two classes: as many images are taken for each as before."""
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
    assert "of 100 top-1 differ, 8 may" in result.stderr
    report = json.loads(result.stdout)
    assert not report["passed"] and len(report["differing"]) == 20
    assert "differs: 0/" in result.stderr


def test_a_damaged_run_beside_it_does_not_hinder_a_proof(own_project: Path, tmp_path: Path) -> None:
    (own_project / "runs/another").mkdir()
    (own_project / "runs/another/run.json").write_text("[]")
    shutil.move(own_project / "runs/digits/model.onnx", tmp_path / "elsewhere.onnx")
    assert "parity passed" in run_command(own_project, "pipeline", "parity", tmp_path / "elsewhere.onnx").stdout


def outputs(*probabilities: list[float]) -> tuple[np.ndarray, np.ndarray]:
    p = np.array(probabilities, np.float32)
    return p, np.log(p)


def judged(
    tolerance: Tolerance, mine: list[list[float]], theirs: list[list[float]], labels: list[int] | None = None
) -> Parity:
    parity = Parity(["a", "b"], tolerance)
    images = np.zeros((len(mine), 1, 1, 1), np.uint8)
    batch = Batch([str(i) for i in range(len(mine))], images, None if labels is None else np.array(labels))
    with np.errstate(invalid="ignore", divide="ignore"):
        parity.add(batch, outputs(*mine), outputs(*theirs))
    return parity


def test_a_tie_is_no_difference_and_anything_more_is() -> None:
    assert judged(TOLERANCES["fp32"], [[0.500001, 0.499999]], [[0.499999, 0.500001]]).passed
    apart = judged(Tolerance(probability=1), [[0.51, 0.49]], [[0.49, 0.51]])
    assert apart.problems == ["1 top-1 differ"]
    (told,) = apart.to_dict()["differing"]
    assert told == {
        "image": "0",
        "pytorch": {"label": "a", "probability": 0.51},
        "onnx": {"label": "b", "probability": 0.51},
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_nothing_that_is_not_finite_passes(precision: str, value: float) -> None:
    parity = judged(TOLERANCES[precision], [[0.6, 0.4]] * 1000, [[0.6, 0.4]] * 999 + [[0.6, value]], [0] * 1000)
    assert parity.problems == ["a value is not a finite number"]
    json.dumps(parity.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("precision", "count", "losable"), [("fp16", 100, 1), ("fp16", 3000, 3), ("int8", 1000, 5)])
def test_a_lower_precision_may_lose_so_many_hits_and_no_more(precision: str, count: int, losable: int) -> None:
    right, wrong = [0.9, 0.1], [0.4, 0.6]
    for lost, passes in ((losable, True), (losable + 1, False)):
        theirs = [wrong] * lost + [right] * (count - lost)
        parity = judged(TOLERANCES[precision], [right] * count, theirs, [0] * count)
        assert (parity.lost, parity.passed) == (lost, passes)


def test_a_file_that_favours_a_class_fails_with_its_precision_unchanged() -> None:
    """Six hits of one class are lost, and six of the other won."""
    a, b = [0.9, 0.1], [0.1, 0.9]
    labels = [0] * 6 + [1] * 6 + [0] * 88
    mine = [a] * 6 + [a] * 6 + [a] * 88
    theirs = [b] * 6 + [b] * 6 + [a] * 88
    parity = judged(TOLERANCES["int8"], mine, theirs, labels)
    assert parity.lost == 0
    assert parity.problems == ["12 of 100 predictions moved to other classes, 4 may"]


def linear(weight: np.ndarray, bias: np.ndarray) -> Predict:
    """Logits are `weight` times the pixels, and `bias`; in float64."""

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logit = images.reshape(len(images), -1) @ weight + bias
        powers = np.exp(logit - logit.max(1, keepdims=True))
        return (powers / powers.sum(1, keepdims=True)).astype(np.float32), logit.astype(np.float32)

    return predict


@pytest.mark.parametrize("classes", [2, 5])
def test_blends_lie_at_the_decision_boundary_whatever_the_order_of_the_images(classes: int) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (200, 6, 6, 1), np.uint8)
    predict = linear(draw.normal(size=(36, classes)), np.zeros(classes))
    logit = predict(images)[1]
    images = images[np.argsort(logit.argmax(1), kind="stable")]  # as where a split is sorted by class
    blends = BoundaryImages(classes)
    for start in range(0, 200, 64):
        batch = images[start : start + 64]
        blends.take(batch, predict(batch)[1].argmax(1))
    near = blends.near_boundary(predict)
    assert near.dtype == np.uint8 and len(near) == 2 * PAIRS
    last, first = np.split(predict(near)[1], 2)
    assert (last.argmax(1) != first.argmax(1)).all()
    margins = [np.diff(np.sort(logits, 1)[:, -2:]).ravel() for logits in (logit, last, first)]
    assert max(margins[1].max(), margins[2].max()) < 0.05 * np.median(margins[0])


def test_there_are_no_blends_where_all_images_get_one_answer() -> None:
    blends = BoundaryImages(3)
    blends.take(np.zeros((5, 2, 2, 1), np.uint8), np.ones(5, np.int64))
    assert len(blends.near_boundary(linear(np.zeros((4, 3)), np.zeros(3)))) == 0


def compared(difference: np.ndarray, scale: float = 1000.0, count: int = 400) -> Parity:
    """A saturated network of three classes, logits of about `scale`, and one that differs by `difference`."""
    logit = scale * np.random.default_rng(0).permuted(np.tile([-1.0, 0.0, 1.0], (count, 1)), axis=1)
    parity = Parity(list("abc"), TOLERANCES["fp32"])
    batch = Batch([""] * count, np.zeros((count, 1, 1, 1), np.uint8), logit.argmax(1))
    p = np.exp(logit - logit.max(1, keepdims=True))
    parity.add(batch, (p, logit), (p, logit + difference))
    return parity


def test_logits_may_differ_by_rounding_errors_and_not_by_a_bias_of_their_size() -> None:
    errors = np.random.default_rng(1).uniform(-1, 1, (400, 3))
    assert compared(0.01 * errors).passed  # 5e-6 of a range of 2,000
    (told,) = compared(0.01 * np.array([0, 1, 0])).problems
    assert told == "the mean Δlogit of a class is 5.0e-06 of the range, it may be 1.0e-06"
    assert compared(0.1 * errors).problems[0] == "|Δlogit| may be 2e-05 of the logits' range"


def test_the_range_counts_for_its_own_image_and_is_never_less_than_the_usual_one() -> None:
    one = np.zeros((400, 3))
    one[7, 1] = 0.03
    assert compared(one).passed
    assert not compared(one, scale=100).passed
    assert compared(1e-5 * one, scale=1e-6).passed  # less than any probability shows


@pytest.fixture(scope="module")
def saturated(project: Path) -> ServedNetwork:
    """The network of digits, trained, with logits a hundred times as large: no probability is between 0 and 1."""
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
def test_what_a_saturated_softmax_hides_is_caught(project: Path, saturated: ServedNetwork, part: str | None) -> None:
    run = Run.open(project / "runs/digits")
    exported = copy.deepcopy(saturated)
    if part is not None:
        name, change = WRONG[part]
        tensor = dict([*exported.named_parameters(), *exported.named_buffers()])[name]
        with torch.no_grad():
            tensor.copy_(change(tensor.clone()))
    parity = Parity(run.classes, TOLERANCES["fp32"])
    reference = predictor(saturated, torch.device("cpu"))
    candidate = export._session(to_onnx(exported, run.spec))
    compare(parity, reference, candidate, split_batches(run.dataset(project / "data").split("test")), run.spec)
    assert parity.blends == 2 * PAIRS
    assert parity.largest_probability < 1e-5 and not parity.top1_differences  # as if nothing were wrong
    assert parity.passed == (part is None), parity.problems

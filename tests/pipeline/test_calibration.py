"""`export --calibrate` and `--wanted-precision`: temperature, calibration error, threshold, by other means."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest

from convline.errors import ConvlineError
from pipeline.calibration import calibration, calibration_of_classes, error_interval, fit_temperature
from pipeline.dataset import Dataset
from pipeline.exporting.confidence import check_confidence_options
from pipeline.exporting.decision import decision_figures, find_threshold
from pipeline.reporting.coverage_plot import coverage_plot
from pipeline.reporting.plots import Plot
from pipeline.run import Run
from serving.model import open_model
from tests.conftest import run_command
from tests.pages import check
from tests.shared import shared_folder

TRAIN = ("pipeline", "train", "digits", "--steps", 60, "--tracking", "none")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run has validation images, exported with temperature and threshold. Do not change it."""

    def make(folder: Path) -> None:
        run_command(folder, *TRAIN, "--set", "data.validation=300")
        plain = ("pipeline", "export", "--output", folder / "plain.onnx")
        run_command(folder, *plain)
        run_command(folder, "pipeline", "export", "--calibrate", "--wanted-precision", 0.97)

    return shared_folder(tmp_path_factory, "held_out", make)


@pytest.fixture(scope="module")
def reported(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `held_out`, with a report. Do not change it."""

    def make(folder: Path) -> None:
        shutil.copytree(held_out, folder, dirs_exist_ok=True)
        run_command(folder, "pipeline", "report")

    return shared_folder(tmp_path_factory, "held_out_reported", make) / "runs/digits"


def metadata(path: Path) -> dict[str, Any]:
    return {entry.key.removeprefix("convline."): json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def images_of(project: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    run = Run.open(project / "runs/digits")
    chosen = run.split(Dataset.open(project / "data", "digits"), split)
    return chosen.images[chosen.rows], chosen.labels[chosen.rows]


def sure_logits(count: int = 400) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits of five classes, and labels drawn from their softmax at the temperature 2.5."""
    draws = np.random.default_rng(3)
    logits = draws.normal(scale=6, size=(count, 5)).astype(np.float32)
    labels = [draws.choice(5, p=row) for row in softmax(logits.astype(np.float64) / 2.5, 1)]
    return logits, np.array(labels)


def negative_log_likelihood(logits: NDArray[Any], labels: NDArray[np.int64], temperature: float) -> float:
    return float(-log_softmax(logits.astype(np.float64) / temperature, 1)[np.arange(len(labels)), labels].mean())


def test_the_temperature_is_that_of_a_minimisation_over_its_logarithm() -> None:
    logits, labels = sure_logits()
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits, labels, np.exp(log)), bounds=(-5, 5), options={"xatol": 1e-9}
    )
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(np.exp(found.x), rel=1e-5) and 2 < fitted < 3
    at_fitted = negative_log_likelihood(logits, labels, fitted)
    assert all(at_fitted <= negative_log_likelihood(logits, labels, t) for t in np.linspace(0.1, 10, 500))


def test_probabilities_that_are_not_sure_enough_get_a_temperature_below_1() -> None:
    logits, labels = sure_logits()
    assert fit_temperature((logits / 10).astype(np.float32), labels) == pytest.approx(
        fit_temperature(logits, labels) / 10, rel=1e-5
    )


def test_one_sentence_says_where_no_temperature_fits() -> None:
    logits, labels = sure_logits(50)
    with pytest.raises(ConvlineError, match=r"all 50 validation images are classified correctly.*data\.validation"):
        fit_temperature(logits, logits.argmax(1))
    with pytest.raises(ConvlineError, match="no better than chance"):
        fit_temperature(logits, logits.argmin(1))
    with pytest.raises(ConvlineError, match="not finite"):
        fit_temperature(np.full_like(logits, np.nan), labels)


def test_the_calibration_error_is_that_of_a_table_made_by_hand() -> None:
    # three images in the bin from 14/15 to 1, two in the one that ends at 8/15, one of probability 1
    confidence = np.array([0.96, 0.97, 0.98, 0.5, 0.52, 1.0], np.float32)
    is_right = np.array([True, False, True, False, True, True])
    # |0.96 + 0.97 + 0.98 + 1 - 3| = 0.91 and |0.5 + 0.52 - 1| = 0.02
    found = calibration(confidence, is_right)
    assert found.error == pytest.approx((0.91 + 0.02) / 6)
    assert (found.counts[14], found.counts[7], found.counts.sum()) == (4, 2, 6)


def test_the_interval_of_the_error_holds_it_and_narrows_with_the_number_of_images() -> None:
    draws = np.random.default_rng(0)
    confidence = draws.uniform(0.3, 1, 8000).astype(np.float32)
    is_right = draws.random(8000) < confidence - 0.1  # each is too sure by 0.1, the true error
    lowest, highest = error_interval(confidence, is_right)
    assert lowest < calibration(confidence, is_right).error < highest
    assert 0.085 < lowest < 0.1 < highest < 0.12
    fewer = error_interval(confidence[:500], is_right[:500])
    assert fewer[1] - fewer[0] > 2 * (highest - lowest)
    assert error_interval(confidence[:500], is_right[:500]) == fewer


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9])
def test_the_threshold_is_the_smallest_of_all_that_reach_the_precision(wanted: float) -> None:
    draws = np.random.default_rng(1)
    confidence = np.round(draws.random(300), 2).astype(np.float32)  # with many ties
    is_right = draws.random(300) < confidence
    reaching = [t for t in np.unique(confidence) if is_right[confidence >= t].mean() >= wanted]
    threshold = find_threshold(confidence, is_right, wanted)
    assert np.float32(threshold) == min(reaching)
    found = decision_figures(confidence, is_right, threshold)
    answered = confidence >= min(reaching)
    assert (found["answered"], found["count"]) == (answered.sum(), 300)
    assert found["precision"] == pytest.approx(is_right[answered].mean())
    assert found["coverage"] == pytest.approx(answered.mean())


def test_the_intervals_are_those_of_wilson() -> None:
    confidence = np.array([0.9] * 10 + [0.1] * 10, np.float32)
    found = decision_figures(confidence, np.array(([True] * 9 + [False]) * 2), 0.5)
    # statsmodels' proportion_confint(9, 10, method="wilson") and (10, 20)
    assert found["precision_interval"] == pytest.approx([0.595850, 0.982124], abs=1e-5)
    assert found["coverage_interval"] == pytest.approx([0.299298, 0.700702], abs=1e-5)
    assert decision_figures(confidence, np.ones(20, bool), 0.95)["precision"] is None


def test_a_precision_that_no_threshold_reaches_is_told_with_the_best_one() -> None:
    confidence, is_right = np.array([0.9, 0.8, 0.7], np.float32), np.array([False, True, True])
    with pytest.raises(ConvlineError, match=r"right in 0\.9 of the cases.*best reaches 0\.6667, with 3"):
        find_threshold(confidence, is_right, 0.9)


def test_the_file_divides_its_logits_by_the_fitted_temperature(held_out: Path) -> None:
    images, labels = images_of(held_out, "validation")
    plain, calibrated = (open_model(held_out / name, "cpu") for name in ("plain.onnx", "runs/digits/model.onnx"))
    logits = plain.run(images)[1]
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits, labels, np.exp(log)), bounds=(-5, 5), options={"xatol": 1e-9}
    )
    temperature = calibrated.metadata["calibration"]["temperature"]
    assert temperature == pytest.approx(np.exp(found.x), rel=1e-4) and abs(temperature - 1) > 0.1
    probability, same_logits = calibrated.run(images)
    assert np.array_equal(same_logits, logits)
    assert np.array_equal(probability.argmax(1), plain.run(images)[0].argmax(1))
    np.testing.assert_allclose(probability, softmax(logits / temperature, 1), atol=1e-6)


def test_the_metadata_have_the_errors_and_the_decision_on_both_splits(held_out: Path) -> None:
    found = metadata(held_out / "runs/digits/model.onnx")
    model = open_model(held_out / "runs/digits/model.onnx", "cpu")
    threshold = found["decision"]["threshold"]
    assert (found["calibration"]["split"], found["calibration"]["count"]) == ("validation", 300)
    for split, count in (("validation", 300), ("test", 359)):
        images, labels = images_of(held_out, split)
        probability, logit = model.run(images)
        errors = found["calibration"]["errors"][split]
        is_right = probability.argmax(1) == labels
        for when, scores in (("before", softmax(logit, 1)), ("after", probability)):
            lowest, highest = errors[when]["interval"]
            assert errors[when]["error"] == pytest.approx(calibration(scores.max(1), is_right).error, abs=2e-3)
            assert lowest <= errors[when]["error"] <= highest
        assert errors["after"]["error"] < errors["before"]["error"] / 2
        decision = found["decision"][split]
        is_answered = probability.max(1) >= np.float32(threshold)
        assert decision["count"] == count and decision["answered"] == pytest.approx(is_answered.sum(), abs=1)
        assert decision["precision"] == pytest.approx(is_right[is_answered].mean(), abs=2e-3)
    assert found["decision"]["wanted_precision"] == 0.97 <= found["decision"]["validation"]["precision"]


def test_export_prints_what_it_found_and_parity_proves_the_file_again(held_out: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    options = ("--calibrate", "--wanted-precision", 0.97, "--output", again)
    printed = run_command(held_out, "pipeline", "export", *options).stdout
    for text in ("temperature", "ECE, validation", "ECE, test", "threshold", "coverage"):
        assert text in printed
    assert again.read_bytes() == (held_out / "runs/digits/model.onnx").read_bytes()
    assert "parity passed" in run_command(held_out, "pipeline", "parity", again).stdout


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_are_calibrated_too(held_out: Path, tmp_path: Path, precision: str) -> None:
    path = tmp_path / "m.onnx"
    run_command(held_out, "pipeline", "export", "--calibrate", "--precision", precision, "--output", path)
    model, (images, _) = open_model(path, "cpu"), images_of(held_out, "test")
    temperature = model.metadata["calibration"]["temperature"]
    assert temperature == metadata(held_out / "runs/digits/model.onnx")["calibration"]["temperature"]
    probability, logit = model.run(images)
    np.testing.assert_allclose(probability, softmax(logit / temperature, 1), atol=1e-6)
    assert "parity passed" in run_command(held_out, "pipeline", "parity", path).stdout


def test_a_threshold_alone_needs_no_temperature(held_out: Path, tmp_path: Path) -> None:
    run_command(held_out, "pipeline", "export", "--wanted-precision", 0.97, "--output", tmp_path / "m.onnx")
    found = metadata(tmp_path / "m.onnx")
    assert "decision" in found and "calibration" not in found
    plain, decided = onnx.load(held_out / "plain.onnx"), onnx.load(tmp_path / "m.onnx")
    assert plain.graph.SerializeToString() == decided.graph.SerializeToString()


def test_a_run_without_validation_is_told_how_to_get_one(project: Path, tmp_path: Path) -> None:
    for option in (["--calibrate"], ["--wanted-precision", "0.9"], ["--unfamiliar"]):
        command = ("pipeline", "export", *option, "--output", tmp_path / "m.onnx")
        told = run_command(project, *command, status=1).stderr
        assert f"{option[0]} needs validation images" in told and "--set data.validation=0.1" in told
    assert not (tmp_path / "m.onnx").exists()


def test_a_class_named_unsure_is_refused_with_a_threshold(held_out: Path) -> None:
    run, dataset = Run.open(held_out / "runs/digits"), Dataset.open(held_out / "data", "digits")
    run.info["dataset"]["classes"][3] = "unsure"
    check_confidence_options(run, dataset, calibrate=True)
    with pytest.raises(ConvlineError, match="a class named unsure"):
        check_confidence_options(run, dataset, wanted_precision=0.9)


@pytest.mark.parametrize("wanted", ["0", "1", "nan", "-0.5"])
def test_a_wanted_precision_lies_between_0_and_1(held_out: Path, wanted: str) -> None:
    told = run_command(held_out, "pipeline", "export", "--wanted-precision", wanted, status=2).stderr
    assert "is not between 0 and 1" in told


def test_the_report_of_a_calibrated_run_marks_the_threshold_and_has_the_figures(reported: Path) -> None:
    page, found = check(reported / "report.html"), metadata(reported / "model.onnx")
    after, decision = found["calibration"]["errors"]["test"]["after"]["error"], found["decision"]
    captions = page.texts("figcaption")
    assert any(f"Expected calibration error {after:.3f}" in text for text in captions)
    assert any(f"Threshold {decision['threshold']:.4g}" in text for text in captions)
    assert any(text.startswith(f"{decision['test']['coverage']:.4f} (") for text in page.texts("td"))
    assert (reported / "pictures/coverage.png").exists()


def test_a_report_takes_no_temperature_from_the_file_of_another_training(held_out: Path, tmp_path: Path) -> None:
    shutil.copytree(held_out, tmp_path / "project")
    run = tmp_path / "project/runs/digits"
    run_command(tmp_path / "project", *TRAIN, "--overwrite")
    shutil.copy(held_out / "runs/digits/model.onnx", run)
    run_command(tmp_path / "project", "pipeline", "report")
    page = check(run / "report.html")
    assert not any("Threshold" in text for text in page.texts("figcaption"))
    assert "Temperature and threshold" not in {text for _, text in page.text}


def test_the_curve_ends_with_all_images_and_leaves_out_the_first_few() -> None:
    confidence = np.linspace(0.2, 1, 2000, dtype=np.float32)
    is_right = np.arange(2000) >= 500
    coverage, precision = curve(coverage_plot(confidence, is_right))
    assert (coverage[0], coverage[-1], precision[-1]) == (0.01, 1.0, 0.75) and len(coverage) <= 500
    assert np.interp(0.9, coverage, precision) == pytest.approx(1500 / 1800, abs=1e-3)
    assert len(curve(coverage_plot(np.full(3, np.nan, np.float32), np.zeros(3, bool)))[0]) == 0


def curve(plot: Plot) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = plot.figure.axes[0].lines[0].get_data()
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def test_the_claims_of_each_class_are_those_of_a_loop_over_its_answers() -> None:
    draws = np.random.default_rng(5)
    predicted = draws.choice(4, 600, p=[0.5, 0.3, 0.2, 0])
    confidence = draws.uniform(0.5, 1, 600).astype(np.float32)
    is_right = draws.random(600) < confidence + np.array([0, -0.3, 0.2, 0])[predicted]
    found = calibration_of_classes(predicted, confidence, is_right, 4)
    for label, verdict in enumerate(("within the interval", "claims too much", "claims too little")):
        answers = [(float(p), bool(r)) for c, p, r in zip(predicted, confidence, is_right, strict=True) if c == label]
        hits = sum(right for _, right in answers)
        expected = binomtest(hits, len(answers)).proportion_ci(method="wilson")
        assert (found[label].answers, found[label].hits) == (len(answers), hits)
        assert found[label].mean_probability == pytest.approx(sum(p for p, _ in answers) / len(answers))
        assert found[label].precision_interval == pytest.approx((expected.low, expected.high), abs=1e-6)
        assert found[label].verdict == verdict
    assert (found[3].answers, found[3].precision, found[3].mean_probability, found[3].verdict) == (0, None, None, "")


def test_the_card_and_the_report_have_the_claims_of_each_class(held_out: Path, reported: Path) -> None:
    images, labels = images_of(held_out, "test")
    probability, _ = open_model(reported / "model.onnx", "cpu").run(images)
    predicted = probability.argmax(1)
    card, told = (reported / "model-card.md").read_text(), check(reported / "report.html")
    verdicts = [text for text in told.texts("span") if "claims" in text or "interval" in text]
    for label in range(10):
        chosen = predicted == label
        interval = binomtest(int((labels[chosen] == label).sum()), int(chosen.sum())).proportion_ci(method="wilson")
        claim, share = probability.max(1)[chosen].mean(), (labels[chosen] == label).mean()
        verdict = "too much" if claim > interval.high else "too little" if claim < interval.low else "interval"
        figures = (
            f"| {label} | {chosen.sum()} | {claim:.1%} | {share:.1%} ({interval.low:.1%} to {interval.high:.1%}) |"
        )
        assert re.search(re.escape(figures) + rf" .*{verdict} \|", card)
        assert verdicts[label].endswith(verdict) and f"{claim:.1%}" in told.texts("td")
    assert "mean probability" not in json.dumps(metadata(reported / "model.onnx"))

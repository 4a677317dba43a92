"""The sections of a report with tables, figures and plots: head, training, network, accuracy, parity, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from convline.errors import ConvlineError
from convline.files import sha256
from convline.html import (
    Html,
    HtmlContent,
    card,
    cards,
    display_name,
    element,
    key_figures,
    key_value_table,
    long_table,
    muted,
    table,
    table_cards,
)
from pipeline.metrics import Interval
from pipeline.network import count_parameters
from pipeline.reporting.calibration_plot import calibration_plot
from pipeline.reporting.class_calibration_table import class_calibration_table
from pipeline.reporting.confidence_table import confidence_table
from pipeline.reporting.confusion_matrix import confusion_matrix
from pipeline.reporting.coverage_plot import coverage_plot
from pipeline.reporting.layer_plots import layer_plots
from pipeline.reporting.learning_curves import training_curves
from pipeline.reporting.network_diagram import network_diagram, shape_text, short_count
from pipeline.reporting.report_data import ReportData
from pipeline.reporting.result_files import read_result_file
from pipeline.tracking.points import Point, last_value
from serving.model import open_model

CONFUSED_PAIRS = 10  # of classes
KEYS = ("precision", "recall")


def head(data: ReportData) -> HtmlContent:
    recipe = data.run.recipe
    seconds = last_value(data.points, "training_seconds")
    speeds = [point.values["images_per_second"] for point in data.points if "images_per_second" in point.values]
    evaluation = data.test_predictions.evaluation
    lowest, highest = evaluation.interval_at(1)
    figures: list[tuple[str, HtmlContent]] = [
        ("precision @ 1 on test", f"{evaluation.precision_at(1):.2%}"),
        ("95% interval", f"{lowest:.1%} to {highest:.1%}"),
        ("parameters", f"{count_parameters(data.served.network):,}"),
        ("multiply-adds an image", short_count(sum(layer.multiply_adds for layer in data.layers))),
        ("steps", f"{data.step:,}"),
        *([("training", duration(seconds))] if seconds is not None else []),
        *([("images/s, median", f"{median(speeds):,.0f}")] if speeds else []),
    ]
    network, dataset = display_name(recipe.model.name), display_name(recipe.data.dataset)
    sentence = element("p", "The network ", network, " on the dataset ", dataset, "; averaged weights.")
    return [sentence, key_figures(figures)]


def duration(seconds: float) -> str:
    """3,723 seconds as "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def training(data: ReportData) -> HtmlContent:
    run, train = data.run, data.run.recipe.train
    image = run.spec
    rows = [
        ("images", f"{image.height}×{image.width} pixels, {'grey' if image.channels == 1 else 'colour'}"),
        *((split, f"{sum(counts.values()):,} images") for split, counts in data.dataset.meta["counts"].items()),
        *([("leaks", f"{data.dataset.leaks:,} images are in two splits")] if data.dataset.leaks else []),
        ("classes", f"{len(run.classes):,}"),
        ("training saw", f"{data.step * train.batch_size:,} images, in batches of {train.batch_size:,}"),
        ("optimiser", f"{run.recipe.optimizer.name}, learning rate {run.recipe.optimizer.learning_rate:g}"),
        ("schedule", run.recipe.schedule.name),
    ]
    recipe = element("details", element("summary", "The whole recipe"), element("pre", run.recipe.to_toml()))
    return [key_value_table(rows, "What was trained"), recipe]


def network(data: ReportData) -> HtmlContent:
    diagram = network_diagram(data.layers, data.image_shape, len(data.run.classes))
    rows = [
        (
            display_name(layer.name),
            layer.kind,
            shape_text(layer.input_shape),
            shape_text(layer.output_shape),
            f"{layer.parameters:,}",
            f"{layer.multiply_adds:,}",
        )
        for layer in data.layers
    ]
    header = ("layer", "kind", "takes", "returns", "parameters", "multiply-adds")
    return table_cards(data.plot_card(diagram), card("Its layers", long_table(header, rows, "Layers", "layers")))


def learning_curves(data: ReportData) -> HtmlContent:
    curves = training_curves(data.points)
    return [cards(*map(data.plot_card, curves.plots)), *map(muted, curves.sentences)]


def accuracy(data: ReportData) -> HtmlContent:
    """Confusion matrix, calibration, coverage, precision and recall of each class, most confused classes, and whether
    each class claims as much as it holds."""
    predictions, classes = data.test_predictions, data.run.classes
    report = predictions.evaluation.to_dict()
    intervals = report["intervals"]["classes"]
    class_table = long_table(
        ("class", "images", "precision", "recall"),
        [
            (display_name(label), f"{counts['count']:,}", *(_share(counts[key], intervals[label][key]) for key in KEYS))
            for label, counts in report["classes"].items()
        ],
        "Precision and recall of each class",
        "classes",
    )
    pairs = [
        (display_name(classes[truth]), display_name(classes[predicted]), f"{count:,}")
        for truth, predicted, count in predictions.confused(CONFUSED_PAIRS)
    ]
    header = ("truth", "predicted", "images")
    confused = table(header, pairs, "Most often confused") if pairs else muted("No classes were confused.")
    is_right = predictions.predicted == predictions.labels
    trusted = confidence_table(data.exported)
    plots = [
        confusion_matrix(predictions.evaluation.confusion, classes),
        calibration_plot(predictions.calibration()),
    ]
    remark: HtmlContent = ""
    if is_right.all() or not is_right.any():
        which = "All" if is_right.all() else "No"
        remark = muted(f"{which} images are classified correctly, so precision is the same at every coverage.")
    else:
        plots.append(coverage_plot(predictions.confidence, is_right, data.exported.get("decision")))
    tables = table_cards(
        *([card("Temperature and threshold", trusted)] if trusted else []),
        card("Precision and recall of each class", class_table),
        card("Most often confused", confused),
        card("Claims of each class", class_calibration_table(classes, predictions.calibration_of_classes())),
    )
    return [cards(*map(data.plot_card, plots)), remark, tables]


def _share(value: float | None, interval: Interval | None = None) -> str:
    """A share in percent, with its 95% interval where there is one."""
    if value is None:
        return "-"
    return f"{value:.1%}" if interval is None else f"{value:.1%} ({interval[0]:.0%} to {interval[1]:.0%})"


def layer_statistics(data: ReportData) -> HtmlContent:
    if not data.summaries:
        return muted(
            "The run has no summaries: train.summary_every in its recipe is 0, or an older convline trained it."
        )
    legend = "A stronger colour stands for more values; the first step is at the left, the last one at the right."
    plots, sentences = layer_plots(data.summaries)
    return [muted(legend) if plots else [], cards(*map(data.plot_card, plots)), *map(muted, sentences)]


def provenance(data: ReportData) -> HtmlContent:
    run = data.run
    rows: list[tuple[str, HtmlContent]] = [
        ("run", run.info["id"]),
        ("dataset", [display_name(run.info["dataset"]["name"]), ", fingerprint ", run.info["dataset"]["fingerprint"]]),
        ("seed", str(run.recipe.train.seed)),
        *([("trained", _period(data.points))] if data.points else []),
    ]
    if run.recipe.published.source:
        rows += [("source", run.recipe.published.source), ("published", _share(run.recipe.published.precision_at_1))]
    rows += _model_file(data)
    return [key_value_table(rows, "Provenance"), element("h3", "Parity of ONNX and PyTorch"), _parity(data)]


def _period(points: Sequence[Point]) -> str:
    first, last = (datetime.fromtimestamp(points[end].seconds, UTC) for end in (0, -1))
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"


def _model_file(data: ReportData) -> list[tuple[str, HtmlContent]]:
    """The hash, versions and step of the run's model.onnx, and whether the report is about the same step."""
    path = data.run.model
    if not path.exists():
        return []
    rows: list[tuple[str, HtmlContent]] = [("model.onnx", f"SHA-256 {sha256(path)}")]
    try:
        metadata = open_model(path, "cpu").metadata
    except ConvlineError as error:
        return [*rows, ("cannot be used", str(error))]
    step = metadata["run"]["step"]
    mismatch = "" if step == data.step else f"; this page is about step {data.step:,}: export the run again"
    versions = ", ".join(f"{library} {version}" for library, version in metadata["versions"].items())
    return [*rows, ("made by", versions), ("its weights", f"of step {step:,}{mismatch}")]


def _tolerance(proof: dict[str, Any]) -> str:
    """The tolerance of |Δprobability|; fp16 and int8 have none."""
    return "" if proof["tolerance"] is None else f", tolerance {proof['tolerance']:g}"


def _relative_difference(proof: dict[str, Any]) -> str:
    """The largest |Δlogit| as a share of the range; empty for fp16, int8 and files of an older convline."""
    if proof.get("logit_tolerance") is None:
        return ""
    return (
        f", {proof['relative_logit_difference']['largest']:.2g} of the range of an image's logits, tolerance "
        f"{proof['logit_tolerance']:g} (with {proof['blends']:,} boundary images)"
    )


def _parity(data: ReportData) -> Html:
    proof = read_result_file(data.run.folder / "parity.json")
    export = element("code", "pipeline export")
    if not (proof and data.run.model.exists()):
        return muted(["The run is not exported yet: ", export, " writes the file and proves that it is this network."])
    try:
        return key_value_table(_parity_rows(proof), "Parity of ONNX and PyTorch")
    except (KeyError, TypeError, ValueError, AttributeError):
        return muted(["The proof, parity.json, is damaged: ", export, " writes it again."])


def _parity_rows(proof: dict[str, Any]) -> list[tuple[str, HtmlContent]]:
    """What parity.json says, as rows of a table."""
    logit, probability, precision = proof["logit_difference"], proof["probability_difference"], proof["precision_at_1"]
    rows: list[tuple[str, HtmlContent]] = [
        ("passed", "yes" if proof["passed"] else "no"),
        ("compared", f"{proof['images']:,} images, in {proof.get('precision', 'fp32')}, on {proof['provider']}"),
        ("largest |Δlogit|", f"{logit['largest']:.2g}{_relative_difference(proof)}"),
        ("largest |Δprobability|", f"{probability['largest']:.2g}{_tolerance(proof)}"),
        ("different top-1", f"{proof['top1_differences']:,} images"),
        ("precision @ 1", f"{precision['pytorch']:.4f} PyTorch, {precision['onnx']:.4f} ONNX"),
    ]
    for contender, rate in proof.get("speed", {}).get("images_per_second", {}).items():
        rows.append((f"images/s {contender}", f"{rate:,.0f}"))
    return rows

"""What a report shows of a run in words, figures and curves, section by section."""

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
    muted,
    table,
)
from pipeline.network import count_parameters
from pipeline.reporting import diagrams
from pipeline.reporting.curves import training_curves
from pipeline.reporting.findings import read_findings
from pipeline.reporting.layer_plots import layer_pictures
from pipeline.reporting.report_data import ReportData
from pipeline.tracking.points import Point, last_value
from serving.model import open_model

CONFUSED = 10  # pairs of classes


def head(data: ReportData) -> HtmlContent:
    recipe = data.run.recipe
    seconds = last_value(data.points, "training_seconds")
    speeds = [point.values["images_per_second"] for point in data.points if "images_per_second" in point.values]
    told: list[tuple[str, HtmlContent]] = [
        ("precision @ 1 on test", f"{data.outcomes.evaluation.precision_at(1):.2%}"),
        ("parameters", f"{count_parameters(data.served.network):,}"),
        ("multiply-adds an image", diagrams.count(sum(layer.multiply_adds for layer in data.layers))),
        ("steps", f"{data.step:,}"),
        *([("training", duration(seconds))] if seconds is not None else []),
        *([("images/s, median", f"{median(speeds):,.0f}")] if speeds else []),
    ]
    network, dataset = display_name(recipe.model.name), display_name(recipe.data.dataset)
    return [
        element("p", "The network ", network, " on the dataset ", dataset, "; averaged weights."),
        key_figures(told),
    ]


def duration(seconds: float) -> str:
    """3,723 seconds as "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def trained(data: ReportData) -> HtmlContent:
    run, train = data.run, data.run.recipe.train
    image = run.spec
    told = [
        ("images", f"{image.height}×{image.width} pixels, {'grey' if image.channels == 1 else 'colour'}"),
        *((split, f"{sum(counts.values()):,} images") for split, counts in data.dataset.meta["counts"].items()),
        ("classes", f"{len(run.classes):,}"),
        ("training saw", f"{data.step * train.batch_size:,} images, in batches of {train.batch_size:,}"),
        ("optimiser", f"{run.recipe.optimizer.name}, learning rate {run.recipe.optimizer.learning_rate:g}"),
        ("schedule", run.recipe.schedule.name),
    ]
    recipe = element("details", element("summary", "The whole recipe"), element("pre", run.recipe.to_toml()))
    return [key_value_table(told, "What was trained"), recipe]


def network(data: ReportData) -> HtmlContent:
    picture = diagrams.network(data.layers, data.image_shape, len(data.run.classes))
    shape = diagrams.shape
    rows = [
        (
            display_name(one.name),
            one.kind,
            shape(one.input_shape),
            shape(one.output_shape),
            f"{one.parameters:,}",
            f"{one.multiply_adds:,}",
        )
        for one in data.layers
    ]
    header = ("layer", "kind", "takes", "returns", "parameters", "multiply-adds")
    return cards(data.card(picture), card("Its layers", table(header, rows, "Layers"), wide=True))


def learning(data: ReportData) -> HtmlContent:
    return cards(*map(data.card, training_curves(data.points)))


def judged(data: ReportData) -> HtmlContent:
    outcomes, classes = data.outcomes, data.run.classes
    of_classes = table(
        ("class", "images", "precision", "recall"),
        [
            (display_name(label), f"{told['count']:,}", _share(told["precision"]), _share(told["recall"]))
            for label, told in outcomes.evaluation.to_dict()["classes"].items()
        ],
        "Precision and recall of each class",
    )
    pairs = [
        (display_name(classes[true]), display_name(classes[other]), f"{n:,}")
        for true, other, n in outcomes.confused(CONFUSED)
    ]
    confused = table(("true", "taken for", "images"), pairs, "Most often confused") if pairs else muted("Nothing was.")
    return cards(
        data.card(diagrams.confusion(outcomes.evaluation.confusion, classes)),
        data.card(diagrams.calibration(*outcomes.calibration())),
        card("Precision and recall of each class", of_classes),
        card("Most often confused", confused),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def insides(data: ReportData) -> HtmlContent:
    if not data.summaries:
        return muted("The run has no summaries: train.summary_every in its recipe is 0, or it is older than they are.")
    told = "The stronger the colour, the more values; the first step is at the left, the last one at the right."
    return [muted(told), cards(*map(data.card, layer_pictures(data.summaries)))]


def provenance(data: ReportData) -> HtmlContent:
    run = data.run
    told: list[tuple[str, HtmlContent]] = [
        ("run", run.info["id"]),
        ("dataset", [display_name(run.info["dataset"]["name"]), ", fingerprint ", run.info["dataset"]["fingerprint"]]),
        ("seed", str(run.recipe.train.seed)),
        *([("trained", _period(data.points))] if data.points else []),
    ]
    if run.recipe.published.source:
        told += [("source", run.recipe.published.source), ("published", _share(run.recipe.published.precision_at_1))]
    told += _exported(data)
    return [key_value_table(told, "Provenance"), element("h3", "Parity of ONNX and PyTorch"), _parity(data)]


def _period(points: Sequence[Point]) -> str:
    first, last = (datetime.fromtimestamp(points[end].seconds, UTC) for end in (0, -1))
    return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"


def _exported(data: ReportData) -> list[tuple[str, HtmlContent]]:
    """What the run's model.onnx is, and whether it is of the weights that the report is on."""
    path = data.run.model
    if not path.exists():
        return []
    told: list[tuple[str, HtmlContent]] = [("model.onnx", f"SHA-256 {sha256(path)}")]
    try:
        metadata = open_model(path, "cpu").metadata
    except ConvlineError as error:
        return [*told, ("cannot be used", str(error))]
    step = metadata["run"]["step"]
    is_older = "" if step == data.step else f", not of step {data.step:,} as this page: export the run again"
    versions = ", ".join(f"{library} {version}" for library, version in metadata["versions"].items())
    return [*told, ("made by", versions), ("its weights", f"of step {step:,}{is_older}")]


def _tolerance(proof: dict[str, Any]) -> str:
    """fp16 and int8 are judged by precision @ 1 alone."""
    return "" if proof["tolerance"] is None else f", tolerance {proof['tolerance']:g}"


def _of_range(proof: dict[str, Any]) -> str:
    """What older proofs do not say; fp16 and int8 are judged by precision @ 1 alone."""
    if proof.get("logit_tolerance") is None:
        return ""
    return (
        f", {proof['relative_logit_difference']['largest']:.2g} of the range of an image's logits, tolerance "
        f"{proof['logit_tolerance']:g} (with {proof['blends']:,} blends near the decision boundary)"
    )


def _parity(data: ReportData) -> Html:
    proof = read_findings(data.run.folder / "parity.json")
    export = element("code", "pipeline export")
    if not (proof and data.run.model.exists()):
        return muted(["The run is not exported yet: ", export, " writes the file, and proves that it is this network."])
    try:
        return key_value_table(_proven(proof), "Parity of ONNX and PyTorch")
    except (KeyError, TypeError, ValueError, AttributeError):
        return muted(["The proof, parity.json, is damaged: ", export, " makes it again."])


def _proven(proof: dict[str, Any]) -> list[tuple[str, HtmlContent]]:
    """What parity.json says, for a table."""
    logit, probability, precision = proof["logit_difference"], proof["probability_difference"], proof["precision_at_1"]
    told: list[tuple[str, HtmlContent]] = [
        ("passed", "yes" if proof["passed"] else "no"),
        ("compared", f"{proof['images']:,} images, in {proof.get('precision', 'fp32')}, on {proof['provider']}"),
        ("largest |Δlogit|", f"{logit['largest']:.2g}{_of_range(proof)}"),
        ("largest |Δprobability|", f"{probability['largest']:.2g}{_tolerance(proof)}"),
        ("other top-1", f"{proof['top1_differences']:,} images"),
        ("precision @ 1", f"{precision['pytorch']:.4f} PyTorch, {precision['onnx']:.4f} ONNX"),
    ]
    for what, rate in proof.get("speed", {}).get("images_per_second", {}).items():
        told.append((f"images/s {what}", f"{rate:,.0f}"))
    return told

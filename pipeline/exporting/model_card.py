"""The model card beside an exported file: what it is for, how good it is, what it learned from (Mitchell et al., "Model
Cards for Model Reporting", 2019, arXiv:1810.03993). All of it is from the file's metadata and its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.calibration import ABOUT_VERDICTS, calibration_of_classes
from pipeline.exporting.confidence import Confidences, with_interval
from pipeline.metrics import Evaluation, Interval

Metadata = Mapping[str, Any]


def model_card(
    name: str,
    metadata: Metadata,
    counts: Mapping[str, Mapping[str, int]],
    test: Evaluation,
    confidences: Confidences | None = None,
) -> str:
    """Markdown. `metadata`: of the file, without the prefix; `counts`: images by split and class; `test`: the file's
    evaluation on the test split; `confidences`: of its answers there, where they were measured."""
    return "\n".join(
        [
            *_purpose(name, metadata),
            *_figures(test),
            *_confidence(metadata),
            *_confidence_of_classes(metadata["classes"], confidences),
            *_data(metadata["dataset"], counts),
            *_training(metadata),
            *_proof(metadata),
        ]
    )


def _purpose(name: str, metadata: Metadata) -> Iterator[str]:
    image, classes = metadata["image"], metadata["classes"]
    colours = "grey" if image["channels"] == 1 else "RGB"
    yield from (f"# {_text(name)}", "")
    yield f"Classifies images: the answer is one of {len(classes)} classes, {_listed(classes)}."
    yield "Every image gets one of them, also an image that shows none; the probabilities say how sure it is."
    size = f"{image['height']}x{image['width']}"
    yield from ("", f"Input: {size} pixels (height x width), {colours}, bytes. `serving classify` resizes images.", "")


def _figures(test: Evaluation) -> Iterator[str]:
    value = _share(test.precision_at(1), test.interval_at(1))
    yield from ("## On test", "", f"precision @ 1 = {value}, on {test.count:,} images. Brackets are 95% intervals.", "")
    figures = test.to_dict()
    intervals = figures["intervals"]["classes"]
    rows = [
        (name, f"{of_class['count']:,}", *(_share(of_class[k], intervals[name][k]) for k in ("precision", "recall")))
        for name, of_class in figures["classes"].items()
    ]
    yield from _table(("class", "test images", "precision", "recall"), rows)


def _confidence(metadata: Metadata) -> Iterator[str]:
    """What `--calibrate`, `--wanted-precision` and `--unfamiliar` gave on test."""
    lines = []
    if calibration := metadata.get("calibration"):
        error = calibration["errors"]["test"]["after"]
        lines.append(f"- expected calibration error on test: {with_interval(error['error'], error['interval'])}")
    if decision := metadata.get("decision"):
        found = decision["test"]
        lines += [
            f"- answers with a probability below {decision['threshold']:.6g} are `unsure`",
            f"- precision of the others on test: {with_interval(found['precision'], found['precision_interval'])}; "
            f"wanted was {decision['wanted_precision']:g}, on validation",
            f"- they are this share of all: {with_interval(found['coverage'], found['coverage_interval'])}",
        ]
    if unfamiliar := metadata.get("unfamiliar"):
        found = unfamiliar["test"]
        share = _share(found["above_1"] / found["count"], found["interval"])
        lines.append(f"- `unfamiliar` is above 1 for images unlike the training images; on test for {share}")
    if lines:
        yield from ("## How sure it is", "", *lines, "")


def _confidence_of_classes(classes: Sequence[str], test: Confidences | None) -> Iterator[str]:
    """What the answers of each class claim on test, and how often they are right."""
    if test is None:
        return
    of_classes = calibration_of_classes(test.predicted, test.confidence, test.is_right, len(classes))
    yield from ("### Answers of each class on test", "", ABOUT_VERDICTS, "")
    rows = [
        (
            name,
            f"{found.answers:,}",
            "–" if found.mean_probability is None else f"{found.mean_probability:.1%}",
            _share(found.precision, found.precision_interval),
            found.verdict or "–",
        )
        for name, found in zip(classes, of_classes, strict=True)
    ]
    yield from _table(("class", "answers", "mean probability", "right", "verdict"), rows)


def _data(dataset: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    images = ", ".join(f"{sum(of_split.values()):,} {split}" for split, of_split in counts.items())
    source = dataset["source"]
    yield from ("## Data", "", f"- dataset: {_text(dataset['name'])}, {images} images")
    yield f"- source: {_text(source['name'])}, SHA-256 {source['sha256']}"
    yield f"- fingerprint of the prepared images: {dataset['fingerprint']}"
    if leaks := dataset.get("leaks"):
        yield f"- {leaks:,} images are in two splits, with the same pixels: the figures above are too good"
    yield ""


def _training(metadata: Metadata) -> Iterator[str]:
    recipe, run = metadata["recipe"], metadata["run"]
    yield from ("## Training", "", f"- recipe: {_text(recipe['name'])}, network {_text(recipe['model']['name'])}")
    yield f"- {run['step']:,} steps, batches of {recipe['train']['batch_size']}, seed {run['seed']}; averaged weights"
    if pretrained := metadata.get("pretrained"):
        yield f"- started from pretrained weights: {_text(pretrained['name'])}, SHA-256 {pretrained['sha256']}"
    yield from (f"- run: {_text(run['name'])}, {run['id']}", "")


def _proof(metadata: Metadata) -> Iterator[str]:
    parity = metadata["parity"]
    largest = f"largest difference of a probability {parity['probability_difference']['largest']:.2g}"
    compared = f"Compared with PyTorch on {parity['images']:,} images, in {parity['precision']} by onnxruntime"
    yield from ("## Proof", "", f"{compared} ({parity['provider']}): {largest}.")
    versions = ", ".join(f"{library} {version}" for library, version in metadata["versions"].items())
    yield from ("", f"Made with {versions}.", "")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for first, *others in rows:
        yield f"| {' | '.join([_text(first), *others])} |"
    yield ""


def _share(share: float | None, interval: Interval) -> str:
    return "–" if share is None else f"{share:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(_text, names[:20]))
    return f"{shown}, …" if len(names) > 20 else shown


def _text(name: str) -> str:
    """A name that may be anything, as Markdown shows it literally, on one line."""
    escaped = "".join(f"\\{character}" if character in "\\`*_[]<>|~" else character for character in name)
    return " ".join(escaped.split())

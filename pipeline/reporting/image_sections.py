"""What a report shows of a run in images: of the dataset, of what was right and wrong, of filters and distortions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from convline.errors import ConvlineError
from convline.html import Html, HtmlContent, card, cards, data_uri, display_name, element, muted, tile, tiles
from pipeline.network import build_network
from pipeline.recipe import AugmentSection
from pipeline.reporting.filters import filter_sheet, first_filters
from pipeline.reporting.image_grid import grid, pixels
from pipeline.reporting.report_data import ReportData
from pipeline.tracking.points import last_value, unpacked
from pipeline.training.augmentations import Augmentations
from pipeline.training.pretrained import load_pretrained

SHOWN_CLASSES, EXAMPLES = 20, 6
WORTH_A_LOOK = 24  # mistakes, and as many hits
DISTORTED, DRAWS = 4, 8

Pixels = NDArray[np.uint8]


def dataset(data: ReportData) -> HtmlContent:
    """A few training images of each class."""
    classes, split = data.run.classes, data.run.split(data.dataset, "train")
    labels = split.labels[split.rows]
    shown = [
        (label, split.images[split.rows[labels == number][:EXAMPLES]])
        for number, label in enumerate(classes[:SHOWN_CLASSES])
    ]
    data.keep("dataset", grid([(label, list(map(pixels, images))) for label, images in shown]))
    more = [muted(f"The first {SHOWN_CLASSES} of {len(classes):,} classes.")] if len(classes) > SHOWN_CLASSES else []
    return [
        more,
        cards(*(card(display_name(label), tiles(_tile(image, label) for image in images)) for label, images in shown)),
    ]


def _tile(image: Pixels, alt: str, *lines: HtmlContent) -> Html:
    return tile(data_uri(pixels(image)), alt, *lines, smooth=max(image.shape[:2]) > 64)


def judged(data: ReportData) -> HtmlContent:
    """The most confident mistakes, and the least confident hits."""
    outcomes = data.outcomes
    return [
        element("h3", "The most confident mistakes"),
        _positions(data, "mistakes", outcomes.mistakes(WORTH_A_LOOK)),
        element("h3", "The least confident hits"),
        _positions(data, "narrow-hits", outcomes.narrow_hits(WORTH_A_LOOK)),
    ]


def _positions(data: ReportData, key: str, positions: NDArray[np.int64]) -> Html:
    if not len(positions):
        return muted("There are none.")
    split = data.outcomes.split
    images = [split.images[row] for row in split.rows[positions]]
    data.keep(key, grid([("", list(map(pixels, images[start : start + 8]))) for start in range(0, len(images), 8)]))
    return tiles(_outcome(data, image, position) for image, position in zip(images, positions, strict=True))


def _outcome(data: ReportData, image: Pixels, position: int) -> Html:
    outcomes, classes = data.outcomes, data.run.classes
    true, predicted = classes[outcomes.labels[position]], classes[outcomes.predicted[position]]
    percent = f"{outcomes.confidence[position]:.1%}"
    if true == predicted:
        return _tile(image, f"{true}, {percent}", [display_name(true), f" {percent}"])
    taken = element("span", display_name(predicted), f" {percent}", class_="wrong")
    return _tile(image, f"{true}, taken for {predicted}, {percent}", taken, ["is ", display_name(true)])


def first_layer(data: ReportData) -> HtmlContent:
    """The first layer's weights as images, as they began and as they ended."""
    begun = build_network(data.run.recipe, data.run.info["dataset"])
    networks = {"before": begun.network, "after": data.served.network}
    shown = []
    try:
        load_pretrained(begun.network, data.run.recipe.model)
    except ConvlineError as error:
        shown.append(muted(f"How it began cannot be shown: {error}"))
        del networks["before"]
    for key, network in networks.items():
        weights = first_filters(network, data.image_shape)
        if weights is None:
            return muted("The first layer's weights are no images.")
        sheet = filter_sheet(weights)
        data.keep(f"filters-{key}", sheet)
        told = f"{len(weights)} filters of {weights.shape[2]}×{weights.shape[3]}, each on its own scale"
        picture = element("img", src=data_uri(sheet, lossless=True), alt=f"{told}, {key} training")
        shown.append(card(f"{key.capitalize()} training", picture, told + "."))
    return cards(*shown)


def distortions(data: ReportData) -> HtmlContent:
    """The same image several times, as training sees it; then a batch that it saw."""
    return [_drawn_again(data), _batch(data)]


def _drawn_again(data: ReportData) -> HtmlContent:
    recipe, split = data.run.recipe, data.run.split(data.dataset, "train")
    if recipe.augment == AugmentSection():
        return muted("Training images were not distorted.")
    distort = Augmentations(recipe.augment, data.served.preprocessing, recipe.train.seed, DRAWS)
    rows: list[list[Pixels]] = []
    for step, image in enumerate(split.images[split.rows[:DISTORTED]]):
        drawn = distort(torch.from_numpy(image).repeat(DRAWS, 1, 1, 1), step)
        rows.append([image, *drawn.clamp(0, 255).to(torch.uint8).numpy()])
    data.keep("distortions", grid([("", list(map(pixels, row))) for row in rows]))
    shown = [
        tiles(_tile(image, f"distorted, {number}" if number else "as stored") for number, image in enumerate(row))
        for row in rows
    ]
    return [muted("The first of each row is the image as stored, the others what training may see of it."), shown]


def _batch(data: ReportData) -> HtmlContent:
    """The newest images among the run's summaries."""
    if (newest := last_value(data.summaries, "images")) is None:
        return []
    images = list(unpacked(newest))
    data.keep("batch", grid([("", list(map(pixels, images)))]))
    told = "Of one of the last batches, as the network saw it, each scaled to the range from black to white:"
    return [muted(told), tiles(_tile(image, f"in a batch, {number}") for number, image in enumerate(images, 1))]

"""What a report shows of a run in images: of the dataset, of what was right and wrong, of filters and distortions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.engine.augment import Distortions
from pipeline.engine.filters import filter_sheet, first_filters
from pipeline.engine.network import build_served
from pipeline.engine.points import last_value, unpacked
from pipeline.engine.pretrained import load_pretrained
from pipeline.engine.subject import Subject
from pipeline.recipe import Augment
from pipeline.samples import grid, pixels
from serving.errors import ConvlineError
from serving.page import Content, Html, card, cards, element, name, note, tile, tiles, uri

SHOWN_CLASSES, EXAMPLES = 20, 6
WORTH_A_LOOK = 24  # mistakes, and as many hits
DISTORTED, DRAWS = 4, 8

Pixels = NDArray[np.uint8]


def dataset(subject: Subject) -> Content:
    """A few training images of each class."""
    classes, split = subject.run.classes, subject.run.split(subject.dataset, "train")
    labels = split.labels[split.rows]
    shown = [
        (label, split.images[split.rows[labels == number][:EXAMPLES]])
        for number, label in enumerate(classes[:SHOWN_CLASSES])
    ]
    subject.keep("dataset", grid([(label, list(map(pixels, images))) for label, images in shown]))
    more = [note(f"The first {SHOWN_CLASSES} of {len(classes):,} classes.")] if len(classes) > SHOWN_CLASSES else []
    return [
        more,
        cards(*(card(name(label), tiles(_tile(image, label) for image in images)) for label, images in shown)),
    ]


def _tile(image: Pixels, alt: str, *lines: Content) -> Html:
    return tile(uri(pixels(image)), alt, *lines, smooth=max(image.shape[:2]) > 64)


def judged(subject: Subject) -> Content:
    """The most confident mistakes, and the least confident hits."""
    outcomes = subject.outcomes
    return [
        element("h3", "The most confident mistakes"),
        _positions(subject, "mistakes", outcomes.mistakes(WORTH_A_LOOK)),
        element("h3", "The least confident hits"),
        _positions(subject, "narrow-hits", outcomes.narrow_hits(WORTH_A_LOOK)),
    ]


def _positions(subject: Subject, key: str, positions: NDArray[np.int64]) -> Html:
    if not len(positions):
        return note("There are none.")
    split = subject.outcomes.split
    images = [split.images[row] for row in split.rows[positions]]
    subject.keep(key, grid([("", list(map(pixels, images[start : start + 8]))) for start in range(0, len(images), 8)]))
    return tiles(_outcome(subject, image, position) for image, position in zip(images, positions, strict=True))


def _outcome(subject: Subject, image: Pixels, position: int) -> Html:
    outcomes, classes = subject.outcomes, subject.run.classes
    true, predicted = classes[outcomes.labels[position]], classes[outcomes.predicted[position]]
    percent = f"{outcomes.confidence[position]:.1%}"
    if true == predicted:
        return _tile(image, f"{true}, {percent}", [name(true), f" {percent}"])
    taken = element("span", name(predicted), f" {percent}", class_="wrong")
    return _tile(image, f"{true}, taken for {predicted}, {percent}", taken, ["is ", name(true)])


def first_layer(subject: Subject) -> Content:
    """The first layer's weights as images, as they began and as they ended."""
    begun = build_served(subject.run.recipe, subject.run.info["dataset"])
    networks = {"before": begun.network, "after": subject.served.network}
    shown = []
    try:
        load_pretrained(begun.network, subject.run.recipe.model)
    except ConvlineError as error:
        shown.append(note(f"How it began cannot be shown: {error}"))
        del networks["before"]
    for key, network in networks.items():
        weights = first_filters(network, subject.image_shape)
        if weights is None:
            return note("The first layer's weights are no images.")
        sheet = filter_sheet(weights)
        subject.keep(f"filters-{key}", sheet)
        told = f"{len(weights)} filters of {weights.shape[2]}×{weights.shape[3]}, each on its own scale"
        picture = element("img", src=uri(sheet, lossless=True), alt=f"{told}, {key} training")
        shown.append(card(f"{key.capitalize()} training", picture, told + "."))
    return cards(*shown)


def distortions(subject: Subject) -> Content:
    """The same image several times, as training sees it; then a batch that it saw."""
    return [_drawn_again(subject), _batch(subject)]


def _drawn_again(subject: Subject) -> Content:
    recipe, split = subject.run.recipe, subject.run.split(subject.dataset, "train")
    if recipe.augment == Augment():
        return note("Training images were not distorted.")
    distort = Distortions(recipe.augment, subject.served.preprocessing, recipe.train.seed, DRAWS)
    rows: list[list[Pixels]] = []
    for step, image in enumerate(split.images[split.rows[:DISTORTED]]):
        drawn = distort(torch.from_numpy(image).repeat(DRAWS, 1, 1, 1), step)
        rows.append([image, *drawn.clamp(0, 255).to(torch.uint8).numpy()])
    subject.keep("distortions", grid([("", list(map(pixels, row))) for row in rows]))
    shown = [
        tiles(_tile(image, f"distorted, {number}" if number else "as stored") for number, image in enumerate(row))
        for row in rows
    ]
    return [note("The first of each row is the image as stored, the others what training may see of it."), shown]


def _batch(subject: Subject) -> Content:
    """The newest images among the run's summaries."""
    if (newest := last_value(subject.summaries, "images")) is None:
        return []
    images = list(unpacked(newest))
    subject.keep("batch", grid([("", list(map(pixels, images)))]))
    told = "Of one of the last batches, as the network saw it, each scaled to the range from black to white:"
    return [note(told), tiles(_tile(image, f"in a batch, {number}") for number, image in enumerate(images, 1))]

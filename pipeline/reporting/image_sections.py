"""The sections of a report that show images: dataset, mistakes, first-layer filters, augmented images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convline.errors import ConvlineError
from convline.html import Html, HtmlContent, card, cards, data_uri, display_name, element, muted, picture_tile, tiles
from pipeline.network import build_network, predictor
from pipeline.pretrained.load import load_weights_of_run
from pipeline.reporting.filters import filter_sheet, first_filters
from pipeline.reporting.image_grid import grid, to_pil
from pipeline.reporting.network_input import augmented_images
from pipeline.reporting.occlusion import occlusion_map, overlay
from pipeline.reporting.report_data import ReportData
from pipeline.reporting.source_thumbnails import SIDE, Thumbnails, source_thumbnails
from pipeline.tracking.points import last_value, unpacked

SHOWN_CLASSES, IMAGES_PER_CLASS = 20, 6
SHOWN_MISTAKES = 24  # and as many hits
SHOWN_MAPS = 8  # of the mistakes, and as many of the hits: each needs the network 65 times
AUGMENTED_IMAGES, AUGMENTED_STEPS = 4, 8

Pixels = NDArray[np.uint8]


def dataset_images(data: ReportData) -> HtmlContent:
    """A few training images of each class."""
    classes, split = data.run.classes, data.run.split(data.dataset, "train")
    labels = split.labels[split.rows]
    examples = [
        (label, split.images[split.rows[labels == number][:IMAGES_PER_CLASS]])
        for number, label in enumerate(classes[:SHOWN_CLASSES])
    ]
    data.add_png("dataset", grid([(label, list(map(to_pil, images))) for label, images in examples]))
    is_cut = len(classes) > SHOWN_CLASSES
    return [
        muted(f"The first {SHOWN_CLASSES} of {len(classes):,} classes.") if is_cut else [],
        cards(
            *(card(display_name(label), tiles(_tile(image, label) for image in images)) for label, images in examples)
        ),
    ]


def _tile(image: Pixels | Image.Image, alt: str, *lines: HtmlContent) -> Html:
    return picture_tile(image if isinstance(image, Image.Image) else to_pil(image), alt, *lines)


def notable_predictions(data: ReportData) -> HtmlContent:
    """The most confident mistakes, and the least confident hits."""
    predictions = data.test_predictions
    shown = {"mistakes": predictions.mistakes(SHOWN_MISTAKES), "narrow-hits": predictions.narrow_hits(SHOWN_MISTAKES)}
    thumbnails: Thumbnails = {}
    if data.test_paths is not None:
        paths = {position: data.test_paths[position] for positions in shown.values() for position in positions.tolist()}
        thumbnails = source_thumbnails(data.dataset, predictions.split, paths)
    return [
        element("h3", "The most confident mistakes"),
        _prediction_tiles(data, "mistakes", shown["mistakes"], thumbnails),
        element("h3", "The least confident hits"),
        _prediction_tiles(data, "narrow-hits", shown["narrow-hits"], thumbnails),
        element("h3", "Where it looked"),
        _occlusion_tiles(data, np.concatenate([positions[:SHOWN_MAPS] for positions in shown.values()])),
    ]


def _prediction_tiles(data: ReportData, png_name: str, positions: NDArray[np.int64], thumbnails: Thumbnails) -> Html:
    if not len(positions):
        return muted("There are none.")
    split = data.test_predictions.split
    images = [split.images[row] for row in split.rows[positions]]
    rows = [("", list(map(to_pil, images[start : start + 8]))) for start in range(0, len(images), 8)]
    data.add_png(png_name, grid(rows))
    shown = zip(images, positions.tolist(), strict=True)
    return tiles(
        (_prediction_tile(data, thumbnails.get(position, image), position) for image, position in shown),
        large=bool(thumbnails) or min(split.images.shape[1:3]) >= SIDE // 2,
    )


def _occlusion_tiles(data: ReportData, positions: NDArray[np.int64]) -> HtmlContent:
    """The first mistakes, then the first narrow hits."""
    predictions, classes = data.test_predictions, data.run.classes
    split, predict = predictions.split, predictor(data.served, next(data.served.parameters()).device)
    images = [split.images[row] for row in split.rows[positions]]
    answers = predictions.predicted[positions].tolist()
    maps = [
        overlay(image, occlusion_map(predict, image, answer)) for image, answer in zip(images, answers, strict=True)
    ]
    if not maps:
        return muted("There are no images to show.")
    data.add_png("occlusion", grid([("", maps[start : start + 8]) for start in range(0, len(maps), 8)]))
    explanation = (
        "The same images in grey; warm where the answer becomes less probable when that part is covered with the "
        "image's mean colour."
    )
    shown = (
        _tile(picture, f"where it looked for {classes[answer]}", display_name(classes[answer]))
        for picture, answer in zip(maps, answers, strict=True)
    )
    return [muted(explanation), tiles(shown, large=True)]


def _prediction_tile(data: ReportData, image: Pixels | Image.Image, position: int) -> Html:
    predictions, classes = data.test_predictions, data.run.classes
    truth, predicted = classes[predictions.labels[position]], classes[predictions.predicted[position]]
    percent = f"{predictions.confidence[position]:.1%}"
    file = [] if data.test_paths is None else [display_name(data.test_paths[position])]
    if truth == predicted:
        return _tile(image, f"{truth}, {percent}", [display_name(truth), f" {percent}"], *file)
    answer = element("span", "predicted ", display_name(predicted), f" {percent}", class_="wrong")
    return _tile(
        image, f"predicted {predicted} {percent}, truth {truth}", answer, ["truth ", display_name(truth)], *file
    )


def first_layer(data: ReportData) -> HtmlContent:
    """The filters of the first layer as images, before and after training."""
    untrained = build_network(data.run.recipe, data.run.info["dataset"])
    networks = {"before": untrained.network, "after": data.served.network}
    shown = []
    try:
        load_weights_of_run(untrained, data.run)
    except ConvlineError as error:
        shown.append(muted(f"The weights before training cannot be shown: {error}"))
        del networks["before"]
    for when, network in networks.items():
        weights = first_filters(network, data.image_shape)
        if weights is None:
            return muted("The first layer's weights cannot be shown as images.")
        sheet = filter_sheet(weights)
        data.add_png(f"filters-{when}", sheet)
        description = f"{len(weights)} filters of {weights.shape[2]}×{weights.shape[3]}, each on its own scale"
        image = element("img", src=data_uri(sheet, lossless=True), alt=f"{description}, {when} training")
        shown.append(card(f"{when.capitalize()} training", image, description + "."))
    return cards(*shown)


def augmentation(data: ReportData) -> HtmlContent:
    """A few images, each as training may see it at several steps; then images of a training batch."""
    return [_augmented_images(data), _batch_images(data)]


def _augmented_images(data: ReportData) -> HtmlContent:
    recipe, split = data.run.recipe, data.run.split(data.dataset, "train")
    if recipe.augment.is_off:
        return muted("Training images were not augmented.")
    stored = split.images[split.rows[:AUGMENTED_IMAGES]]
    augmented = augmented_images(stored, recipe, data.served.preprocessing, AUGMENTED_STEPS)
    rows: list[list[Pixels]] = [[image, *seen] for image, seen in zip(stored, augmented, strict=True)]
    data.add_png("augmented", grid([("", list(map(to_pil, row))) for row in rows]))
    row_tiles = [
        tiles(_tile(image, f"augmented, {number}" if number else "as stored") for number, image in enumerate(row))
        for row in rows
    ]
    return [muted("In each row, the first image is as stored, the others are what training may see of it."), row_tiles]


def _batch_images(data: ReportData) -> HtmlContent:
    """The newest images in the run's summaries."""
    if (newest := last_value(data.summaries, "images")) is None:
        return []
    images = list(unpacked(newest))
    data.add_png("batch", grid([("", list(map(to_pil, images)))]))
    explanation = "Images of one of the last batches as the network saw them, each scaled from black to white:"
    return [muted(explanation), tiles(_tile(image, f"in a batch, {number}") for number, image in enumerate(images, 1))]

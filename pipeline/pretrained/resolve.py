"""Resolves what a recipe says of pretrained weights: where they are, and how pixels are standardised for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convline.errors import ConvlineError
from convline.files import sha256
from pipeline.pretrained.weight_sources import PretrainedWeights, WeightSource, find_source
from pipeline.recipe import Recipe
from pipeline.recipe_sections import Standardization
from pipeline.run import Run

NAMED_BY_HAND = "set preprocess.standardize={mean=[...], std=[...]}, in units of x / 255, as they were trained"


def resolve_weights(
    recipe: Recipe, meta: dict[str, Any], folder: Path, *, starts_new: bool
) -> tuple[Recipe, PretrainedWeights | None]:
    """The recipe with numbers where `preprocess.standardize` is "weights", and the weights to start from (None for
    none).

    `meta` describes the dataset, `folder` is the run's; other runs are beside it. A run that does not start anew needs
    no weights: they are not looked for, and the numbers are those of its own recipe.
    Raises ConvlineError where weights are missing, are of another network, or were trained with other pixels.
    """
    if not starts_new:
        return _as_started(recipe, folder), None
    if recipe.model.weights == "none":
        return resolve_pixels(recipe, meta, folder.parent), None
    source = find_source(recipe.model, folder.parent)
    resolved = _with_pixels_of(recipe, source, meta)
    path = source.locate()
    return resolved, PretrainedWeights(source, path, sha256(path))


def resolve_pixels(recipe: Recipe, meta: dict[str, Any], runs_dir: Path) -> Recipe:
    """The recipe with numbers where `preprocess.standardize` is "weights"; the weights themselves are not needed.

    Raises ConvlineError as `resolve_weights` does.
    """
    if recipe.model.weights != "none":
        return _with_pixels_of(recipe, find_source(recipe.model, runs_dir), meta)
    if recipe.preprocess.standardize == "weights":
        raise ConvlineError(
            "preprocess.standardize=weights needs pretrained weights, and model.weights is none; set model.weights, or "
            "preprocess.standardize=per-channel"
        )
    return recipe


def _as_started(recipe: Recipe, folder: Path) -> Recipe:
    if recipe.preprocess.standardize != "weights":
        return recipe
    return _standardized(recipe, Run.open(folder).recipe.preprocess.standardize)


def _with_pixels_of(recipe: Recipe, source: WeightSource, meta: dict[str, Any]) -> Recipe:
    wanted, known = recipe.preprocess.standardize, source.trained_with
    where = f"model.weights={recipe.model.weights}"
    if isinstance(wanted, Standardization) or wanted == known.word:
        return recipe
    if known.standardize is None:
        raise ConvlineError(f"{where}: a file does not tell how its pixels were standardised; {NAMED_BY_HAND}")
    if wanted != "weights":
        raise ConvlineError(
            f"{where}: these weights were trained with {known.description()}, not with preprocess.standardize="
            f"{wanted}; set preprocess.standardize=weights, or to the mean and std that you want"
        )
    if isinstance(known.standardize, Standardization):
        return _standardized(recipe, _for_channels(known.standardize, meta["image"]["channels"], where))
    return _standardized(recipe, known.standardize)


def _for_channels(pixels: Standardization, channels: int, where: str) -> Standardization:
    """For grey images the means of three channels. Raises ConvlineError for weights of grey images and RGB images."""
    if len(pixels.mean) == channels:
        return pixels
    if channels != 1:
        raise ConvlineError(
            f"{where}: these weights were trained on grey images, and the dataset's are RGB; prepare it with "
            "--channels 1, or choose other weights"
        )
    mean, std = (sum(values) / len(values) for values in (pixels.mean, pixels.std))
    return Standardization(mean=[mean], std=[std])


def _standardized(recipe: Recipe, standardize: Any) -> Recipe:
    preprocess = recipe.preprocess.model_copy(update={"standardize": standardize})
    return recipe.model_copy(update={"preprocess": preprocess})

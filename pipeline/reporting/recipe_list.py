"""The list of shipped recipes that `pipeline recipes` prints, with parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator

from models import build
from pipeline.network import count_parameters, multiply_adds
from pipeline.preparing.official_datasets import known_datasets
from pipeline.recipe import Recipe, load, names

OWN_CLASSES = 10
HEADER = ("recipe", "dataset", "network", "parameters", "multiply-adds", "published")


def recipe_rows() -> Iterator[tuple[str, ...]]:
    """A row for each shipped recipe, under HEADER; multiply-adds are for one image."""
    for recipe in map(load, names()):
        shape, classes = _input_shape_and_classes(recipe)
        network = build(recipe.model.name, shape, classes, **recipe.model.options)
        figure = recipe.published.precision_at_1
        yield (
            recipe.name,
            recipe.data.dataset if recipe.data.dataset in known_datasets() else "(yours)",
            recipe.model.name,
            f"{count_parameters(network):,}",
            f"{multiply_adds(network, shape):,}",
            "-" if figure is None else f"{figure:.2%}",
        )


def _input_shape_and_classes(recipe: Recipe) -> tuple[tuple[int, int, int], int]:
    """The shape (channels, height, width) of the network's input, and the number of classes; for images of the user's,
    those of the recipe's size, and OWN_CLASSES."""
    if recipe.data.dataset not in known_datasets():
        assert recipe.data.image_size is not None
        return (3, recipe.data.image_size, recipe.data.image_size), OWN_CLASSES
    dataset = known_datasets()[recipe.data.dataset]
    height, width, channels = dataset.image
    return (channels, *(recipe.preprocess.crop_size or (height, width))), len(dataset.classes)

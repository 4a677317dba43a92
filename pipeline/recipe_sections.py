"""The sections of a recipe, each with its fields and what they mean. Those of the optimiser and of the schedule stand
beside what they set up: pipeline/training/optimizers.py and schedules.py."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    create_model,
    model_validator,
)

from models import NETWORKS, options
from pipeline.pretrained.weight_names import check_weights
from pipeline.training.recipe_section import RecipeSection

SplitName = Literal["train", "validation", "test"]


def _count_or_fraction(value: int | float) -> int | float:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_fraction = isinstance(value, float) and 0 <= value < 1
    if not (is_count or is_fraction):
        raise ValueError("must be a count of images (0, 5000) or a fraction below 1 (0.1)")
    return value


class DataSection(RecipeSection):
    """`validation`: how much of the training split to hold out (a count or a fraction; 0: nothing), stratified
    and drawn by the seed; a dataset with a validation split of its own keeps that one. `sampling`: "epoch" for shuffled
    passes; "independent" for a new draw without repeats at each step; "balanced" for shuffled passes over each class,
    all classes equally often. `image_size`: side in pixels of the images that `pipeline preprocess --recipe` and
    `make` prepare for this recipe, where none is given."""

    dataset: str
    validation: Annotated[int | float, BeforeValidator(_count_or_fraction)] = 0
    sampling: Literal["epoch", "independent", "balanced"] = "epoch"
    image_size: PositiveInt | None = None


class Standardization(RecipeSection):
    """(x / 255 - mean) / std, with one value per channel: 3 for RGB, 1 for grey images."""

    mean: list[float] = Field(min_length=1, max_length=3)
    std: list[PositiveFloat] = Field(min_length=1, max_length=3)

    @model_validator(mode="after")
    def _check(self) -> Standardization:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one each per channel")
        return self


def _word_or_numbers(value: Any) -> Any:
    """Refuses an unknown word here, because pydantic would describe every type that the field may have."""
    if not isinstance(value, (dict, Standardization)) and value not in get_args(StandardizationWord):
        words = ", ".join(get_args(StandardizationWord))
        raise ValueError(f"use {words}, or {{mean = [...], std = [...]}} of x / 255")
    return value


StandardizationWord = Literal["scale", "per-image", "per-channel", "weights"]
Standardize = Annotated[
    Annotated[StandardizationWord, Tag("word")] | Annotated[Standardization, Tag("numbers")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "numbers"),
    BeforeValidator(_word_or_numbers),
]


def _side_or_sides(value: Any) -> Any:
    """Refuses here what is neither, because pydantic would describe each type that the field may have."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or any(type(side) is not int or side <= 0 for side in sides):
        raise ValueError("use a side in pixels, such as 24, or [height, width], each greater than 0")
    return value if isinstance(value, int) else tuple(sides)


class PreprocessSection(RecipeSection):
    """`crop`: side, or [height, width], of the centre crop in pixels, which becomes part of the exported graph; without
    it the whole image. `standardize`: "scale" is x / 255; "per-image"; "per-channel" uses the mean and std of the
    dataset; "weights" those that the pretrained weights were trained with, which stand in the run's recipe as numbers;
    or these numbers."""

    crop: Annotated[int | tuple[int, int], BeforeValidator(_side_or_sides)] | None = None
    standardize: Standardize = "scale"

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """Height and width of the crop; None for the whole image."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop


class ModelSection(BaseModel):
    """`name`: a key of `models.NETWORKS`, "torchvision/…" or "timm/…". `weights`: the pretrained weights that training
    starts from (see pipeline/pretrained/weight_names.py). Every other key is an option of that network."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str
    weights: str = "none"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, fields: Any) -> Any:
        """Check the options against the signature of the network, and fill in its defaults."""
        if not isinstance(fields, dict) or "name" not in fields:
            return fields
        name = fields["name"]
        try:
            accepted = options(name)
        except (KeyError, AttributeError) as error:
            raise ValueError(
                f"there is no network {name!r}; use one of {', '.join(sorted(NETWORKS))}, or a network of torchvision "
                "or timm, such as torchvision/resnet18 or timm/tf_efficientnet_lite0"
            ) from error
        fields_of_model: dict[str, Any] = {key: (each.annotation, each.default) for key, each in accepted.items()}
        schema = create_model("Options", __base__=RecipeSection, weights=(str, "none"), **fields_of_model)
        checked = schema(**{k: v for k, v in fields.items() if k != "name"}).model_dump()
        check_weights(name, checked["weights"])
        return {"name": name, **checked}


class TrainSection(RecipeSection):
    """`steps`: updates, each on `batch_size` images (over all devices). `epochs`: passes over the training images,
    after `freeze_steps`; with both, whichever is longer. `loss`: the mean or the sum of the batch's
    cross-entropies. `label_smoothing`: the share of each label that is spread over all classes. `class_weights`:
    "balanced" weighs each class's loss by 1 / its number of training images (mean 1). `l2`: for each layer named,
    the coefficient of ‖weight‖² / 2 in the loss. `accumulate`: the forward and backward pass takes the batch in
    this many parts, one after the other. `clip_norm`: the most that the norm of all gradients may be, 0 for no
    limit. `average_decay`: of the moving average of the weights, 0 for none.

    `freeze`: "backbone" trains the head alone, for `freeze_steps` steps, or for good where they are 0.
    `freeze_statistics`: BatchNorm keeps the running statistics of the pretrained weights, and uses them.

    `keep`: which checkpoint counts in the end, the "last" or the "best" on validation. `patience`: stop after this many
    evaluations without a better one, 0 for never.

    `log_every`, `checkpoint_every`, `summary_every`, `evaluate_every`: in steps; 0 is never, for the last two.
    `evaluate_limit`: evaluate the first N images of each of `evaluate_splits`; all of validation, where that decides
    by `keep` or `patience`. `precision`: of forward and backward pass ("bfloat16" and, on CUDA, "float16" by autocast;
    the weights stay float32; "auto" is bfloat16 where the processor computes in it, and stands in the run's recipe as
    what it was). `compile`: use torch.compile, on CUDA with CUDA graphs."""

    steps: NonNegativeInt = 0
    epochs: NonNegativeFloat = 0.0
    batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    loss: Literal["mean", "sum"] = "mean"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    l2: dict[str, NonNegativeFloat] = Field(default={})
    accumulate: PositiveInt = 1
    clip_norm: NonNegativeFloat = 0.0
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    freeze: Literal["none", "backbone"] = "none"
    freeze_steps: NonNegativeInt = 0
    freeze_statistics: bool = False
    keep: Literal["last", "best"] = "last"
    patience: NonNegativeInt = 0
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 1000
    summary_every: NonNegativeInt = 100
    evaluate_every: NonNegativeInt = 0
    evaluate_splits: list[SplitName] = Field(default=["test"], min_length=1)
    evaluate_limit: PositiveInt | None = None
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    compile: bool = False

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if not (self.steps or self.epochs):
            raise ValueError("steps or epochs must be given, and greater than 0")
        if self.freeze_steps and self.freeze == "none":
            raise ValueError('freeze_steps has no effect without freeze = "backbone"')
        if (self.keep == "best" or self.patience) and not self.evaluate_every:
            raise ValueError('keep = "best" and patience need evaluations: set evaluate_every')
        return self

    @property
    def frozen_steps(self) -> int:
        """The number of steps, from the first, in which the backbone is frozen."""
        if self.freeze == "none":
            return 0
        return min(self.freeze_steps, self.steps) if self.freeze_steps else self.steps

    @property
    def evaluated_splits(self) -> list[SplitName]:
        """The splits that are evaluated during the training."""
        if not self.evaluate_every:
            return []
        decisive: list[SplitName] = ["validation"] if self.uses_validation else []
        return list(dict.fromkeys([*self.evaluate_splits, *decisive]))

    @property
    def uses_validation(self) -> bool:
        """Whether validation images decide which weights count, or when training ends."""
        return self.keep == "best" or self.patience > 0

    def with_steps(self, images: int) -> TrainSection:
        """The same with `steps` instead of `epochs`, for a training split of this many images."""
        if not self.epochs:
            return self
        passes = self.freeze_steps + math.ceil(self.epochs * images / self.batch_size)
        return self.model_copy(update={"steps": max(self.steps, passes), "epochs": 0.0})


Range = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)]


class ResizedCrop(RecipeSection):
    """`scale`: the share of the image's area that the crop takes. `ratio`: its width / height."""

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _check(self) -> ResizedCrop:
        for name, (lowest, highest) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < lowest <= highest:
                raise ValueError(f"{name} is [lowest, highest], in this order, and above 0")
        if self.scale[1] > 1:
            raise ValueError("scale is a share of the image's area, so 1 at most")
        return self


class ColorJitter(RecipeSection):
    """Each factor is drawn from U(1 - value, 1 + value), not below 0; the hue is turned by U(-hue, hue), where 0.5 is
    half a turn of the colour wheel. The four follow one another in an order that is drawn, too."""

    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


def _flip(value: Any) -> Any:
    """Refuses other values here, because pydantic would describe each type that the field may have."""
    if not isinstance(value, bool) and value != "alternating":
        raise ValueError('use true, false or "alternating"')
    return value


class AugmentSection(RecipeSection):
    """Random changes of the training images, drawn for each image; evaluation sees the unchanged centre crop.

    `random_crop`: a crop of size `preprocess.crop` (default: the image's size) at a random position in the image with a
    border of `padding` pixels: black, or, with `padding_mode` "reflect", the image mirrored at its edge.
    `resized_crop`: a part of random size, shape and position, resized to that size with antialiasing (torchvision's
    RandomResizedCrop). `flip`, `vertical_flip`: mirror left to right, or top to bottom, with probability 1/2; `flip`
    "alternating" draws that once for each image, and does the opposite in every other pass (Jordan 2024,
    arXiv:2404.00498, section 3.6). `rotate`: by U(-rotate, rotate) degrees. `trivial`: one operation of TrivialAugment
    (Müller and Hutter, 2021). `color_jitter`: torchvision's ColorJitter. `brightness`: add U(-brightness, brightness),
    in pixel units of 0 to 255. `contrast`: multiply the distance from each channel's mean by U(lowest, highest);
    neither is clipped. `erasing`: with this probability, set a rectangle to black (Zhong et al., 2020). `mixup`,
    `cutmix`: blend with another image of the batch, or replace a rectangle by its, the share drawn from
    Beta(value, value) (Zhang et al., 2018; Yun et al., 2019); with both, each image takes one of them.

    `while_frozen`: augment also while the backbone is frozen (train.freeze), whose outputs must then be computed at
    every step."""

    random_crop: bool = False
    padding: NonNegativeInt = 0
    padding_mode: Literal["black", "reflect"] = "black"
    resized_crop: ResizedCrop | None = None
    flip: Annotated[bool | Literal["alternating"], BeforeValidator(_flip)] = False
    vertical_flip: bool = False
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    trivial: bool = False
    color_jitter: ColorJitter = ColorJitter()
    brightness: NonNegativeFloat = 0.0
    contrast: Range = (1.0, 1.0)
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    while_frozen: bool = False

    @property
    def is_off(self) -> bool:
        """Whether no image is changed."""
        return self.model_copy(update={"while_frozen": False}) == AugmentSection()

    @model_validator(mode="after")
    def _check(self) -> AugmentSection:
        if self.padding and not self.random_crop:
            raise ValueError("padding has no effect without random_crop = true")
        if self.padding_mode != "black" and not self.padding:
            raise ValueError("padding_mode has no effect without padding")
        if self.random_crop and self.resized_crop:
            raise ValueError("random_crop and resized_crop exclude each other; choose one")
        if self.contrast[0] > self.contrast[1]:
            raise ValueError("contrast is [lowest, highest], in this order")
        return self


class PublishedSection(RecipeSection):
    """The figures that the source of this recipe published."""

    precision_at_1: Annotated[float, Field(ge=0, le=1)] | None = None
    seconds: PositiveFloat | None = None
    source: str = ""

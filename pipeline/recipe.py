"""Recipes: TOML files that say what to train on, which network and how. Every field is checked."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from convline.errors import ConvlineError
from models import NETWORKS, TORCHVISION, options, weights_of
from pipeline.training.optimizers import OptimizerSection
from pipeline.training.recipe_section import RecipeSection
from pipeline.training.schedules import Constant, ScheduleSection

RECIPES = Path(__file__).parent / "recipes"

SplitName = Literal["train", "validation", "test"]


def _count_or_fraction(value: int | float) -> int | float:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_fraction = isinstance(value, float) and 0 <= value < 1
    if not (is_count or is_fraction):
        raise ValueError("must be a count of images (0, 5000) or a fraction below 1 (0.1)")
    return value


class DataSection(RecipeSection):
    """`validation`: how much of the training split to hold out (a count or a fraction; 0: nothing), stratified
    and drawn by the seed. `sampling`: "epoch" for shuffled passes; "independent" for a new draw without repeats at each
    step."""

    dataset: str
    validation: Annotated[int | float, BeforeValidator(_count_or_fraction)] = 0
    sampling: Literal["epoch", "independent"] = "epoch"


class PreprocessSection(RecipeSection):
    """`crop`: side of the centre crop in pixels, which becomes part of the exported graph; without it the whole image.
    `standardize`: "scale" is x / 255; "per-image"; "per-channel" uses the mean and std of the dataset."""

    crop: PositiveInt | None = None
    standardize: Literal["scale", "per-image", "per-channel"] = "scale"


class ModelSection(BaseModel):
    """`name`: a key of `models.NETWORKS`, "torchvision/…" or "timm/…"; every other key is an option of that network."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

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
        weights = fields.get("weights", "none")
        if name.startswith(TORCHVISION) and weights not in (known_weights := weights_of(name)):
            raise ValueError(f"{name} has no weights {weights!r}; use one of {', '.join(known_weights)}")
        fields_of_model: dict[str, Any] = {key: (each.annotation, each.default) for key, each in accepted.items()}
        schema = create_model("Options", __base__=RecipeSection, **fields_of_model)
        return {"name": name, **schema(**{k: v for k, v in fields.items() if k != "name"}).model_dump()}


class TrainSection(RecipeSection):
    """`steps`: updates, each on `batch_size` images (over all devices). `loss`: the mean or the sum of the batch's
    cross-entropies. `l2`: for each layer named, the coefficient of ‖weight‖² / 2 in the loss. `average_decay`: of the
    moving average of the weights, 0 for none. `log_every`, `checkpoint_every`, `summary_every`, `evaluate_every`: in
    steps; 0 is never, for the last two. `evaluate_limit`: evaluate the first N images of each of `evaluate_splits`.
    `precision`: of forward and backward pass ("bfloat16" by autocast; the weights stay float32). `compile`: use
    torch.compile, on CUDA with CUDA graphs."""

    steps: PositiveInt
    batch_size: PositiveInt
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    loss: Literal["mean", "sum"] = "mean"
    l2: dict[str, NonNegativeFloat] = Field(default={})
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 1000
    summary_every: NonNegativeInt = 100
    evaluate_every: NonNegativeInt = 0
    evaluate_splits: list[SplitName] = Field(default=["test"], min_length=1)
    evaluate_limit: PositiveInt | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False


class AugmentSection(RecipeSection):
    """Random changes of the training images, drawn for each image; evaluation sees the unchanged centre crop.

    `random_crop`: a crop of size `preprocess.crop` (default: the image's size) at a random position in the image with a
    border of `padding` black pixels. `flip`: mirror left to right with probability 1/2. `brightness`: add
    U(-brightness, brightness), in pixel units of 0 to 255. `contrast`: multiply the distance from each channel's
    mean by U(lowest, highest). Nothing is clipped."""

    random_crop: bool = False
    padding: NonNegativeInt = 0
    flip: bool = False
    brightness: NonNegativeFloat = 0.0
    contrast: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> AugmentSection:
        if self.padding and not self.random_crop:
            raise ValueError("padding has no effect without random_crop = true")
        if self.contrast[0] > self.contrast[1]:
            raise ValueError("contrast is [lowest, highest], in this order")
        return self


class PublishedSection(RecipeSection):
    """The figures that the source of this recipe published."""

    precision_at_1: Annotated[float, Field(ge=0, le=1)] | None = None
    seconds: PositiveFloat | None = None
    source: str = ""


class Recipe(RecipeSection):
    """A whole recipe. `name` is the name of its file."""

    name: str = ""
    data: DataSection
    preprocess: PreprocessSection = PreprocessSection()
    augment: AugmentSection = AugmentSection()
    model: ModelSection
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = Constant()
    published: PublishedSection = PublishedSection()

    def to_dict(self) -> dict[str, Any]:
        """Every field, defaults included; None is left out, because TOML has no null."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())


# fields that may change when a run is resumed, because they do not influence the weights
WITHOUT_INFLUENCE = {
    "name",
    "published",
    "train.log_every",
    "train.checkpoint_every",
    "train.summary_every",
    "train.evaluate_every",
    "train.evaluate_splits",
    "train.evaluate_limit",
}


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The dotted names of the fields by which two recipes would train different weights."""
    a, b = flat(one.to_dict()), flat(other.to_dict())
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return [key for key in changed if key not in WITHOUT_INFLUENCE and key.split(".")[0] not in WITHOUT_INFLUENCE]


def names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find(name: str) -> Path:
    """The file of a recipe: of a shipped one by its name, of any other by its path."""
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConvlineError(f"no recipe file at {path}")
        return path
    if name not in names():
        similar = get_close_matches(name, names(), 1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise ConvlineError(
            f"there is no recipe {name!r}: {hint}use one of {', '.join(names())}, or the path of a .toml file"
        )
    return RECIPES / f"{name}.toml"


def read(name: str) -> str:
    """The text of a recipe's file. Raises ConvlineError for a file that is not UTF-8."""
    path = find(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConvlineError(f"{path} is not valid TOML, because it is not UTF-8: {error}") from error


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or path, with overrides of the form "section.field=value" (values as in TOML; an empty value
    resets the field to its default).

    Raises ConvlineError that names the wrong field and what it accepts.
    """
    path = find(name)
    try:
        fields = tomllib.loads(read(name))
    except tomllib.TOMLDecodeError as error:
        raise ConvlineError(f"{path} is not valid TOML: {error}") from error
    fields.setdefault("name", path.stem)
    for override in overrides:
        _override(fields, override)
    if any(override.partition("=")[0].strip() == "data.dataset" for override in overrides):
        fields.pop("published", None)  # it was measured on other images
    loaded = parse(fields, f"recipe {name}")
    warmup = getattr(loaded.schedule, "warmup", 0)
    if warmup >= loaded.train.steps:
        raise ConvlineError(
            f"recipe {name}: schedule.warmup {warmup} is not shorter than train.steps {loaded.train.steps}; lower "
            "schedule.warmup or raise train.steps"
        )
    return loaded


def parse(fields: dict[str, Any], where: str) -> Recipe:
    """A recipe from its fields. Raises ConvlineError for the first invalid field; `where` begins the message."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConvlineError(f"{where}: {_describe(error, fields)}") from error


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot and section and field):
        raise ConvlineError(f"--set {override}: write it as section.field=value, such as train.steps=500")
    if not text.strip():
        _reset(fields, key.strip())
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    table = fields.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConvlineError(f"--set {override}: {section} is not a section")
    if field == "name" and table.get("name") != value:
        # the options of the previous optimiser, schedule or network do not fit the new one
        shared = {"learning_rate"} if section == "optimizer" else set()
        fields[section] = table = {k: v for k, v in table.items() if k in shared}
    inner, dot, key = field.partition(".")
    if dot and isinstance(table.setdefault(inner, {}), dict):
        table[inner][key] = value  # as in train.l2.local3=0.004
    else:
        table[field] = value


def _reset(fields: dict[str, Any], key: str) -> None:
    """Reset a field to its default."""
    *sections, field = key.split(".")
    for section in sections:
        fields = fields.get(section, {})
    fields.pop(field, None)


def _describe(error: ValidationError, fields: dict[str, Any]) -> str:
    """The first problem as a sentence."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if len(path) > 2 and path[0] in ("optimizer", "schedule"):
        del path[1]  # the tag of the union, which is not a field
    field = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = ".".join(path[:-1])
        return f"{field} is not a known field; {owner or 'a recipe'} accepts {', '.join(_accepted(owner, fields))}"
    if first["type"] == "union_tag_not_found":
        return f"{field}.name is missing; use one of {', '.join(_choices(field))}"
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if isinstance(first["input"], dict) else f" (it is {first['input']!r})"
    return f"{field}: {message[0].lower()}{message[1:]}{value}"


def _choices(section: str) -> list[str]:
    """The names of all optimisers or schedules."""
    members = get_args(Recipe.model_fields[section].annotation)
    return [name for member in members for name in get_args(member.model_fields["name"].annotation)]


def _accepted(section: str, fields: dict[str, Any]) -> list[str]:
    """The fields that a section accepts; for a model, optimiser or schedule they depend on its name."""
    schema: Any = Recipe.model_fields[section].annotation if section else Recipe
    if section == "model":
        return ["name", *options(fields[section]["name"])]
    if members := get_args(schema):
        name = fields[section].get("name", "constant")
        schema = next(member for member in members if name in get_args(member.model_fields["name"].annotation))
    return list(schema.model_fields)


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"train": {"steps": 1}} -> {"train.steps": 1}."""
    dotted: dict[str, Any] = {}
    for key, value in fields.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted

"""Recipes: what to train on, what network, how. TOML files, checked to the last field."""

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
from pipeline.training.optimizers import Constant, OptimizerSection, ScheduleSection
from pipeline.training.recipe_section import Section

RECIPES = Path(__file__).parent / "recipes"

Split = Literal["train", "validation", "test"]


def _count_or_fraction(value: int | float) -> int | float:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_fraction = isinstance(value, float) and 0 <= value < 1
    if not (is_count or is_fraction):
        raise ValueError("is a count of images (0, 5000) or a fraction below 1 (0.1)")
    return value


class Data(Section):
    """`validation`: how much of train to hold out (a count or a fraction; 0: nothing), seeded, stratified.
    `sampling`: "epoch", shuffled passes; "independent", a fresh draw without repeats each step."""

    dataset: str
    validation: Annotated[int | float, BeforeValidator(_count_or_fraction)] = 0
    sampling: Literal["epoch", "independent"] = "epoch"


class Preprocess(Section):
    """`crop`: side of the centre crop in pixels, inside the served graph; without it the whole image.
    `standardize`: "scale" x / 255; "per-image"; "per-channel" with the dataset's mean and std."""

    crop: PositiveInt | None = None
    standardize: Literal["scale", "per-image", "per-channel"] = "scale"


class Model(BaseModel):
    """`name` in `models.NETWORKS`, or "torchvision/…"; every other key is an option of that network."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, fields: Any) -> Any:
        """Check the options against the network's own signature and fill in its defaults."""
        if not isinstance(fields, dict) or "name" not in fields:
            return fields
        name = fields["name"]
        try:
            known = options(name)
        except (KeyError, AttributeError) as error:
            raise ValueError(
                f"there is no network {name!r}; there are {', '.join(sorted(NETWORKS))}, and torchvision's as "
                "torchvision/resnet18"
            ) from error
        weights = fields.get("weights", "none")
        if name.startswith(TORCHVISION) and weights not in (known_weights := weights_of(name)):
            raise ValueError(f"{name} has no weights {weights!r}; there are {', '.join(known_weights)}")
        accepted: dict[str, Any] = {key: (option.annotation, option.default) for key, option in known.items()}
        schema = create_model("Options", __base__=Section, **accepted)
        return {"name": name, **schema(**{k: v for k, v in fields.items() if k != "name"}).model_dump()}


class Train(Section):
    """`steps` updates of `batch_size` images (over all devices); `loss`: the batch's cross-entropies as a
    mean or a sum; `l2`: by layer, the coefficient of ‖weight‖² / 2 in the loss; `average_decay` of the moving
    average, 0 for none; the `_every` are in steps, 0: never; `evaluate_limit`: the first N images of each of
    `evaluate_splits`. `precision` of forward and backward pass ("bfloat16": autocast; the weights stay float32);
    `compile`: the network by torch.compile, with CUDA graphs on CUDA."""

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
    evaluate_splits: list[Split] = Field(default=["test"], min_length=1)
    evaluate_limit: PositiveInt | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False


class Augment(Section):
    """Distortions of the images in training, each its own draw; evaluation sees the centre crop.

    `random_crop`: the window of `preprocess.crop` (without it: of the image's size) lies anywhere in the image
    and a border of `padding` black pixels; `flip`: each is mirrored with probability 1/2; `brightness`: plus
    U(-brightness, brightness), in pixel units of 0 to 255; `contrast`: times U(lowest, highest) about each
    channel's mean. Nothing is clipped."""

    random_crop: bool = False
    padding: NonNegativeInt = 0
    flip: bool = False
    brightness: NonNegativeFloat = 0.0
    contrast: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Field(strict=False)] = (1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> Augment:
        if self.padding and not self.random_crop:
            raise ValueError("padding has no effect without random_crop = true")
        if self.contrast[0] > self.contrast[1]:
            raise ValueError("contrast is [lowest, highest], in this order")
        return self


class Published(Section):
    """What the source of this recipe published."""

    precision_at_1: Annotated[float, Field(ge=0, le=1)] | None = None
    seconds: PositiveFloat | None = None
    source: str = ""


class Recipe(Section):
    """A whole recipe. `name` is the file's."""

    name: str = ""
    data: Data
    preprocess: Preprocess = Preprocess()
    augment: Augment = Augment()
    model: Model
    train: Train
    optimizer: OptimizerSection
    schedule: ScheduleSection = Constant()
    published: Published = Published()

    def to_dict(self) -> dict[str, Any]:
        """Every field, defaults included; those that are unset are left out, as TOML has no null."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())


# what may differ between a run and its continuation: it changes what is seen, not what is learnt
OBSERVATION = {
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
    """The dotted fields in which two recipes would train differently."""
    a, b = flat(one.to_dict()), flat(other.to_dict())
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return [key for key in changed if key not in OBSERVATION and key.split(".")[0] not in OBSERVATION]


def names() -> list[str]:
    """The shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find(name: str) -> Path:
    """The file of a recipe: a shipped one by name, any other by its path."""
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise ConvlineError(f"no recipe file at {path}")
        return path
    if name not in names():
        close = get_close_matches(name, names(), 1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ConvlineError(f"there is no recipe {name!r}: {meant}there are {', '.join(names())}, or a path to a .toml")
    return RECIPES / f"{name}.toml"


def read(name: str) -> str:
    """A recipe as it is written. Raises ConvlineError for a file that is no text."""
    path = find(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConvlineError(f"{path} is not valid TOML, which is UTF-8: {error}") from error


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or path, with overrides of the form "section.field=value" (values as in TOML; without one
    the field is left to its default).

    Raises ConvlineError naming the field, and what would be accepted.
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
        fields.pop("published", None)  # a figure on other images
    loaded = parse(fields, f"recipe {name}")
    warmup = getattr(loaded.schedule, "warmup", 0)
    if warmup >= loaded.train.steps:
        raise ConvlineError(
            f"recipe {name}: schedule.warmup {warmup} leaves nothing of train.steps {loaded.train.steps}; make it "
            "shorter, or train for longer"
        )
    return loaded


def parse(fields: dict[str, Any], where: str) -> Recipe:
    """Raises ConvlineError for the first field that does not fit; `where` begins its sentence."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ConvlineError(f"{where}: {_complaint(error, fields)}") from error


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot and section and field):
        raise ConvlineError(f"--set {override}: write it as section.field=value, such as train.steps=500")
    if not text.strip():
        _forget(fields, key.strip())
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    table = fields.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConvlineError(f"--set {override}: {section} is no section")
    if field == "name" and table.get("name") != value:
        # another optimiser, schedule or network: the options of the old one do not fit it
        kept = {"learning_rate"} if section == "optimizer" else set()
        fields[section] = table = {k: v for k, v in table.items() if k in kept}
    inner, dot, key = field.partition(".")
    if dot and isinstance(table.setdefault(inner, {}), dict):
        table[inner][key] = value  # as in train.l2.local3=0.004
    else:
        table[field] = value


def _forget(fields: dict[str, Any], key: str) -> None:
    """Leave a field to its default."""
    *sections, field = key.split(".")
    for section in sections:
        fields = fields.get(section, {})
    fields.pop(field, None)


def _complaint(error: ValidationError, fields: dict[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    if len(path) > 2 and path[0] in ("optimizer", "schedule"):
        del path[1]  # the union's tag, which is no field
    field = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = ".".join(path[:-1])
        return f"{field} is not a known field; {owner or 'a recipe'} accepts {', '.join(_accepted(owner, fields))}"
    if first["type"] == "union_tag_not_found":
        return f"{field}.name is missing; there are {', '.join(_tags(field))}"
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f" (it is {first['input']!r})"
    return f"{field}: {message[0].lower()}{message[1:]}{given}"


def _tags(section: str) -> list[str]:
    """The names of optimisers or schedules."""
    members = get_args(Recipe.model_fields[section].annotation)
    return [name for member in members for name in get_args(member.model_fields["name"].annotation)]


def _accepted(section: str, fields: dict[str, Any]) -> list[str]:
    """The fields of a section; those of a model, optimiser or schedule depend on its name."""
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

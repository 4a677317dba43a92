"""Recipes: TOML files that say what to train on, which network and how. Every field is checked."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel, ValidationError, model_validator

from convline.errors import ConvlineError
from models import options
from pipeline.recipe_sections import (
    AugmentSection,
    DataSection,
    ModelSection,
    PreprocessSection,
    PublishedSection,
    TrainSection,
)
from pipeline.training.optimizers import OptimizerSection
from pipeline.training.recipe_section import RecipeSection
from pipeline.training.schedules import Constant, ScheduleSection

RECIPES = Path(__file__).parent / "recipes"


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

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.train.freeze == "backbone" and self.model.weights == "none":
            raise ValueError('train.freeze = "backbone" needs pretrained weights: set model.weights, or train.freeze')
        if self.augment.flip == "alternating" and self.data.sampling != "epoch":
            raise ValueError(
                'augment.flip = "alternating" goes by passes over the images: it needs data.sampling = "epoch"'
            )
        return self

    def with_precision(self, precision: str) -> Recipe:
        """The same, trained in this precision."""
        return self.model_copy(update={"train": self.train.model_copy(update={"precision": precision})})

    @property
    def treats_head_apart(self) -> bool:
        """Whether the network's last layers are trained differently from the others."""
        optimizer = self.optimizer
        return self.train.freeze != "none" or optimizer.head_multiplier != 1 or optimizer.name == "muon"

    def learning_rate(self, step: int) -> float:
        """The highest learning rate at `step`, before head_multiplier. The schedule runs from its beginning to its end
        while the backbone is frozen, and once more after that."""
        settings = self.train
        if step < settings.frozen_steps:
            factor = self.schedule.factor(step, settings.frozen_steps)
        else:
            factor = self.schedule.factor(step - settings.frozen_steps, settings.steps - settings.frozen_steps)
        return self.optimizer.learning_rate * factor

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
# but these decide which weights count, or when training ends, where validation decides that
DECIDES_ON_VALIDATION = {"train.evaluate_every"}


def differences(one: Recipe, other: Recipe) -> list[str]:
    """The dotted names of the fields by which two recipes would train different weights."""
    a, b = flat(one.to_dict()), flat(other.to_dict())
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    decisive = DECIDES_ON_VALIDATION if one.train.uses_validation and other.train.uses_validation else set()
    free = WITHOUT_INFLUENCE - decisive
    return [key for key in changed if key not in free and key.split(".")[0] not in free]


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
    if not loaded.train.epochs:
        check_warmup(loaded)
    return loaded


def check_warmup(recipe: Recipe) -> None:
    """Raises ConvlineError where a warm-up of a fixed number of steps would never end."""
    warmup, settings = recipe.schedule.warmup, recipe.train
    if warmup >= settings.steps:
        raise ConvlineError(
            f"recipe {recipe.name}: schedule.warmup {warmup} is not shorter than train.steps {settings.steps}; lower "
            "schedule.warmup or raise train.steps"
        )
    frozen = settings.frozen_steps
    for phase, steps in (("with a frozen backbone", frozen), ("after that", settings.steps - frozen)):
        if 0 < steps <= warmup:
            raise ConvlineError(
                f"recipe {recipe.name}: schedule.warmup {warmup} is not shorter than the {steps} steps {phase}, and "
                "each of the two has its own; lower schedule.warmup, or make it a fraction"
            )


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
    if section == "train" and field in ("steps", "epochs"):
        table.pop("epochs" if field == "steps" else "steps", None)  # the one that was set decides alone
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
    if path[:2] == ["preprocess", "standardize"]:
        del path[2:3]
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
    if section == "model":
        return ["name", "weights", *options(fields[section]["name"])]
    schema: Any = Recipe
    for part in section.split(".") if section else ():
        fields = fields[part]
        members = _sections(schema.model_fields[part].annotation)
        name = fields.get("name", "constant")
        schema = next(m for m in members if len(members) == 1 or name in get_args(m.model_fields["name"].annotation))
    return sorted(schema.model_fields, key=lambda field: field != "name")


def _sections(annotation: Any) -> list[Any]:
    """The sections that a field may hold, by its type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for member in get_args(annotation) for section in _sections(member)]


def flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys: {"train": {"steps": 1}} -> {"train.steps": 1}."""
    dotted: dict[str, Any] = {}
    for key, value in fields.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted

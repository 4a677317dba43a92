import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from pipeline import recipe
from pipeline.recipe import differences, load, parse
from pipeline.recipe_sections import TrainSection
from pipeline.run import Run
from tests.conftest import ROOT, Cli
from tests.pipeline.helpers import contents, refused

OWN = """
[data]
dataset = "pets"
[model]
name = "softmax_regression"
[train]
steps = 5
batch_size = 2
[optimizer]
name = "sgd"
learning_rate = 0.5
momentum = 0.9
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    return path


def field(loaded: recipe.Recipe, dotted: str) -> object:
    return recipe.flat(loaded.to_dict())[dotted]


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_loads_under_its_name(name: str) -> None:
    assert load(name).name == name


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_survives_being_written_as_toml(name: str) -> None:
    loaded = load(name)
    assert parse(tomllib.loads(loaded.to_toml()), "again") == loaded


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_begins_with_a_comment_that_names_source_and_figures(name: str) -> None:
    opening = recipe.find(name).read_text().split("\n\n")[0]
    assert all(line.startswith("# ") for line in opening.splitlines())
    assert "# Source: " in opening
    assert "# Measured here" in opening
    assert load(name).published.precision_at_1 is None or "# Published: " in opening


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (
            "softmax-regression",
            {
                "data.dataset": "mnist",
                "data.validation": 5000,
                "preprocess.standardize": "scale",
                "train.steps": 30000,
                "train.batch_size": 100,
                "train.loss": "sum",
                "optimizer.name": "sgd",
                "optimizer.learning_rate": 0.001,
                "published.precision_at_1": 0.922,
                "published.seconds": 44,
            },
        ),
        (
            "simple-convnet",
            {
                "data.dataset": "mnist",
                "data.validation": 0,
                "data.sampling": "independent",
                "preprocess.standardize": "scale",
                "train.steps": 6000,
                "train.batch_size": 100,
                "train.loss": "mean",
                "optimizer.name": "adagrad",
                "optimizer.learning_rate": 0.06,
                "optimizer.epsilon": 1e-7,
                "published.precision_at_1": 0.986,
            },
        ),
    ],
)
def test_a_shipped_recipe_is_the_system_it_reproduces(name: str, fields: dict[str, object]) -> None:
    resolved = recipe.flat(load(name).to_dict())
    assert {field: resolved[field] for field in fields} == fields


def test_a_resolved_recipe_states_the_defaults_of_its_network() -> None:
    assert {"model.filters", "model.hidden_size"} <= recipe.flat(load("digits").to_dict()).keys()
    assert "filters" not in tomllib.loads(recipe.find("digits").read_text())["model"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=500", 500),
        ("train.steps = 500", 500),
        ("train.steps=2_000", 2000),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("data.validation=5000", 5000),
        ("data.validation=0.1", 0.1),
        ("data.dataset=pets", "pets"),
        ('data.dataset="pets"', "pets"),
        ("data.sampling=independent", "independent"),
        ('published.source="a = b"', "a = b"),
        ('train.evaluate_splits=["train", "test"]', ["train", "test"]),
        ("preprocess.crop=6", 6),
        ("model.filters=8", 8),
    ],
)
def test_an_override_sets_any_field(override: str, value: object) -> None:
    loaded = load("digits", [override])
    value_set = field(loaded, override.split("=")[0].strip())
    assert value_set == value and type(value_set) is type(value)
    assert load("digits") != loaded


def test_a_flag_is_overridden() -> None:
    overrides = ["optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"]
    assert field(load("digits", overrides), "optimizer.nesterov") is True


def test_the_last_of_two_overrides_holds() -> None:
    assert load("digits", ["train.steps=5", "train.steps=7"]).train.steps == 7


def test_an_override_may_add_a_section(own: Path) -> None:
    assert field(load(str(own), ["schedule.name=cosine", "schedule.floor=0.1"]), "schedule.floor") == 0.1


@pytest.mark.parametrize(
    ("override", "field", "accepted"),
    [
        ("trian.steps=5", "trian", ["train", "data", "optimizer"]),
        ("train.stepz=5", "train.stepz", ["steps", "batch_size"]),
        ("data.set=mnist", "data.set", ["dataset", "validation", "sampling"]),
        ("train.steps.of=5", "train.steps.of", ["steps", "batch_size"]),
        ("model.name=lenet", "model", ["digits_convnet", "simple_convnet", "softmax_regression"]),
        ("model.layers=3", "model.layers", ["name", "filters", "hidden_size"]),
        ("optimizer.name=rmsprop", "optimizer", ["sgd", "adam", "adagrad"]),
        ("optimizer.momentum=0.9", "optimizer.momentum", ["learning_rate", "beta1", "beta2", "epsilon"]),
        ("schedule.name=triangular", "schedule", ["constant", "cosine", "exponential", "linear"]),
        ("schedule.power=2", "schedule.power", ["name", "floor"]),
        ("data.sampling=random", "data.sampling:", ["epoch", "independent"]),
        ("train.loss=max", "train.loss:", ["mean", "sum"]),
        ('train.evaluate_splits=["tset"]', "train.evaluate_splits", ["train", "validation", "test"]),
        ("preprocess.standardize=yes", "preprocess.standardize:", ["scale", "per-image", "per-channel"]),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_are_accepted(
    override: str, field: str, accepted: list[str]
) -> None:
    with refused("recipe digits", field, *accepted):
        load("digits", [override])


@pytest.mark.parametrize(
    ("override", "accepted"),
    [
        ("train.steps=many", "integer"),
        ("train.steps=1.5", "integer"),
        ("train.steps=-1", "greater than or equal to 0"),
        ("train.epochs=-1", "greater than or equal to 0"),
        ("train.accumulate=0", "greater than 0"),
        ("train.label_smoothing=1", "less than 1"),
        ("train.batch_size=-1", "greater than 0"),
        ("train.seed=-1", "greater than or equal to 0"),
        ("train.average_decay=1", "less than 1"),
        ("train.steps=[5]", "integer"),
        ("preprocess.crop=0", "greater than 0"),
        ("data.validation=1.5", "fraction below 1"),
        ("data.validation=-1", "a count"),
        ("data.validation=many", "count"),
        ("data.dataset=5", "string"),
        ("optimizer.learning_rate=fast", "number"),
        ("optimizer.learning_rate=0", "greater than 0"),
        ("optimizer.learning_rate=nan", "finite"),
        ("optimizer.learning_rate=inf", "finite"),
        ("schedule.floor=-1", "greater than or equal to 0"),
        ("published.precision_at_1=98.6", "less than or equal to 1"),
        ("model.filters=many", "integer"),
    ],
)
def test_an_invalid_value_is_refused_with_what_is_accepted(override: str, accepted: str) -> None:
    with refused(f"{override.split('=')[0]}:", accepted):
        load("digits", [override])


@pytest.mark.parametrize(
    "override",
    [
        'train.steps="500"',
        "train.steps=true",
        "data.validation=true",
        'optimizer.learning_rate="0.1"',
        "model.filters=true",
    ],
)
def test_a_value_of_another_type_is_not_converted(override: str) -> None:
    with refused(override.split("=")[0]):
        load("digits", [override])


def test_a_list_is_not_a_network_name() -> None:
    with refused("model", "digits_convnet"):
        load("digits", ["model.name=[1]"])


@pytest.mark.parametrize("override", ["train.steps", "steps=5", "=5", "train.=5", ".steps=5", ""])
def test_an_override_that_is_not_an_assignment_is_refused_with_how_to_write_it(override: str) -> None:
    with refused("--set", "section.field=value"):
        load("digits", [override])


def test_an_override_below_a_plain_field_is_refused() -> None:
    with refused("--set", "name"):
        load("digits", ["name.first=5"])


@pytest.mark.parametrize("section", ["data", "model", "train", "optimizer"])
def test_a_missing_section_is_named(own: Path, section: str) -> None:
    fields = tomllib.loads(OWN)
    del fields[section]
    own.write_text(tomli_w.dumps(fields))
    with refused(str(own), f"{section} is missing"):
        load(str(own))


def test_a_section_that_is_a_number_is_refused(own: Path) -> None:
    own.write_text("preprocess = 5\n" + OWN)
    with refused(str(own), "preprocess"):
        load(str(own))


def test_another_optimizer_keeps_the_learning_rate_and_drops_the_other_options(own: Path) -> None:
    changed = load(str(own), ["optimizer.name=adam"]).to_dict()["optimizer"]
    assert changed == {
        "name": "adam", "learning_rate": 0.5, "head_multiplier": 1.0,
        "bias_multiplier": 1.0, "layer_decay": 1.0, "weight_decay": 0.0,
        "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8,
    }  # fmt: skip


def test_the_same_optimizer_keeps_its_options(own: Path) -> None:
    assert load(str(own), ["optimizer.name=sgd"]) == load(str(own))


def test_another_network_drops_the_options_of_the_old_one() -> None:
    assert load("simple-convnet", ["model.name=softmax_regression"]).model.options == {}


def test_a_users_recipe_is_named_by_its_file(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    loaded = load("own.toml")
    assert (loaded.name, loaded.data.dataset) == ("own", "pets")
    assert loaded == load(str(own))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with refused(str(tmp_path / "none.toml")):
        load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("content", [b"[train\nsteps = 5", b"[train]\nsteps = \xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_not_toml_is_named(own: Path, content: bytes) -> None:
    own.write_bytes(content)
    with refused(str(own), "TOML"):
        load(str(own))


def test_an_unknown_recipe_is_refused_with_a_similar_name() -> None:
    with refused("'digit'", "did you mean digits?", *recipe.names()):
        load("digit")


def test_a_recipe_does_not_change() -> None:
    loaded = load("digits")
    with pytest.raises(ValidationError, match="frozen"):
        loaded.train.steps = 1
    with pytest.raises(ValidationError, match="frozen"):
        loaded.model.name = "mlp"


@pytest.mark.parametrize(
    "override",
    [
        "train.log_every=7",
        "train.checkpoint_every=7",
        "train.evaluate_every=7",
        'train.evaluate_splits=["train"]',
        "train.evaluate_limit=7",
        "published.seconds=7",
    ],
)
def test_fields_that_do_not_influence_the_weights_are_not_a_difference(override: str) -> None:
    changed = load("digits", [override])
    assert changed != load("digits")
    assert differences(load("digits"), changed) == []


@pytest.mark.parametrize(
    "override",
    ["train.steps=7", "data.validation=7", "model.filters=7", "optimizer.beta1=0.7", "preprocess.crop=7"],
)
def test_fields_that_influence_the_weights_are_a_difference(override: str) -> None:
    one, other = load("digits"), load("digits", [override])
    assert differences(one, other) == differences(other, one) == [override.split("=")[0]]


def test_every_difference_is_named() -> None:
    changed = load("digits", ["train.seed=3", "schedule.name=constant", "train.log_every=3"])
    assert differences(load("digits"), changed) == ["schedule.floor", "schedule.name", "train.seed"]


def test_a_figure_published_for_another_dataset_is_dropped() -> None:
    assert load("cifar10", ["train.steps=5"]).published.precision_at_1 == 0.86
    assert load("cifar10", ['data.dataset="pets"']).published.precision_at_1 is None


def test_every_system_of_the_sources_is_listed_with_its_size_and_published_figure(cli: Cli) -> None:
    header, *rows = (line.split() for line in cli("pipeline", "recipes").stdout.splitlines())
    assert header == ["recipe", "dataset", "network", "parameters", "multiply-adds", "published"]
    # by hand, from the sources' layer sizes
    assert {row[0]: row[1:] for row in rows} == {
        "cifar10": ["cifar10", "cifar10", "1,068,298", "18,470,784", "86.00%"],
        "cifar10-fast": [
            "cifar10",
            "cifar10_fast",
            "1,972,504",
            "236,294,720",
            "-",
        ],  # of the image and its mirror image
        "cifar10-local": ["cifar10", "cifar10_local", "2,112,970", "19,512,576", "87.00%"],
        "deep-mnist": ["mnist", "deep_mnist", "3,274,634", "13,883,904", "99.20%"],
        "digits": ["digits", "digits_convnet", "53,002", "347,392", "-"],
        "mlp": ["mnist", "mlp", "496,885", "496,250", "96.60%"],
        "photos": ["(yours)", "timm/tf_efficientnet_lite0", "3,383,818", "383,920,352", "-"],
        "photos-scratch": ["(yours)", "timm/resnet10t", "4,927,618", "89,535,488", "-"],
        "simple-convnet": ["mnist", "simple_convnet", "433,890", "865,000", "98.60%"],
        "slides-convnet": ["mnist", "slides_convnet", "53,002", "6,138,720", "-"],
        "softmax-regression": ["mnist", "softmax_regression", "7,850", "7,840", "92.20%"],
        "softmax-regression-1000": ["mnist", "softmax_regression", "7,850", "7,840", "-"],
        "svhn": ["svhn", "cifar10", "3,431,754", "60,565,376", "-"],
    }


def test_a_recipe_is_shown_as_it_is_written(cli: Cli) -> None:
    assert cli("pipeline", "recipes", "digits").stdout == recipe.find("digits").read_text()


@pytest.mark.parametrize("warmup", [100, 2000])
def test_a_warm_up_as_long_as_the_training_is_refused(warmup: int) -> None:
    settings = ["train.steps=100", "schedule.name=linear"]
    assert load("digits", [*settings, "schedule.warmup=99"]).train.steps == 100
    with refused(f"schedule.warmup {warmup}", "train.steps 100"):
        load("digits", [*settings, f"schedule.warmup={warmup}"])


def test_mistakes_in_a_recipe_are_found_without_importing_torch() -> None:
    """Instead of a timed test: importing torch takes seconds, torchvision more."""
    settings = ["train.stepz=1", "optimizer.name=nope", "schedule.x=1", "train.steps=0", "model.filterz=3"]
    settings += ["model.name=lenet", "model.name=torchvision/resnet19", "schedule.warmup=1000"]
    wrong = [["train", "nosuch"], *(["train", "digits", "--set", setting] for setting in settings)]
    script = f"""
import sys
from pipeline.cli import app
from convline.errors import ConvlineError
for arguments in {wrong!r}:
    try:
        app(arguments)
    except ConvlineError as error:
        print(error)
print(sorted({{"torch", "torchvision", "mlflow"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(wrong) + 1, done.stdout
    assert done.stdout.endswith("\n[]\n")


def test_a_refused_recipe_exits_1_with_one_sentence_and_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    result = cli("pipeline", "train", "digits", "--tracking", "none", "--set", "train.stepz=5", status=1)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "train.stepz" in result.stderr and "batch_size" in result.stderr
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"epochs": 1.0}, 10),
        ({"epochs": 2.5}, 24),  # 23.75
        ({"epochs": 0.01}, 1),
        ({"epochs": 2.0, "steps": 5}, 19),
        ({"epochs": 2.0, "steps": 50}, 50),
        ({"epochs": 2.0, "freeze": "backbone", "freeze_steps": 7}, 26),
        ({"epochs": 2.0, "freeze": "backbone", "freeze_steps": 7, "steps": 30}, 30),
        ({"epochs": 2.0, "freeze": "backbone"}, 19),
    ],
)
def test_epochs_are_passes_over_the_training_images(fields: dict[str, Any], steps: int) -> None:
    """Of 95 images in batches of 10."""
    settled = TrainSection(batch_size=10, **fields).with_steps(95)
    assert (settled.steps, settled.epochs) == (steps, 0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (350, 4.0)),
        (["train.steps=9"], (9, 0.0)),
        (["train.epochs=2"], (0, 2.0)),
        (["train.steps=9", "train.epochs=2"], (0, 2.0)),
        (["train.epochs="], (350, 0.0)),
    ],
)
def test_steps_or_epochs_that_are_set_replace_those_of_the_recipe(
    overrides: list[str], expected: tuple[int, float]
) -> None:
    settings = load("photos", overrides).train
    assert (settings.steps, settings.epochs) == expected


def test_a_training_without_steps_and_epochs_is_refused() -> None:
    with refused("recipe digits: train: steps or epochs must be given, and greater than 0"):
        load("digits", ["train.steps=0"])


def test_a_warm_up_longer_than_a_phase_is_refused() -> None:
    frozen = ["train.freeze=backbone", "train.freeze_steps=30", "train.steps=100", "model.weights=not-read.pth"]
    assert load("digits", [*frozen, "schedule.warmup=29"]).train.steps == 100
    with refused("schedule.warmup 30 is not shorter than the 30 steps with a frozen backbone"):
        load("digits", [*frozen, "schedule.warmup=30"])
    with refused("schedule.warmup 40 is not shorter than the 40 steps after that"):
        load("digits", [*frozen, "train.freeze_steps=60", "schedule.warmup=40"])


def test_a_warm_up_as_long_as_the_epochs_is_refused_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    """1,438 images in batches of 64: 23 steps."""
    options = ("--set", "train.epochs=1", "--set", "train.evaluate_every=0", "--tracking", "none")
    error = cli("pipeline", "train", "digits", *options, "--set", "schedule.warmup=23", status=1).stderr
    assert "schedule.warmup 23 is not shorter than train.steps 23" in error
    assert not (tmp_path / "runs").exists()
    cli("pipeline", "train", "digits", *options, "--set", "schedule.warmup=22")
    assert Run.open(tmp_path / "runs/digits").recipe.train.steps == 23
    assert (
        "is finished" in cli("pipeline", "train", "digits", *options, "--set", "schedule.warmup=22", "--resume").stderr
    )


def test_when_weights_are_evaluated_matters_where_validation_decides() -> None:
    decides = ["train.keep=best", "data.validation=0.1"]
    one = load("digits", decides)
    assert differences(one, load("digits", [*decides, "train.evaluate_every=7"])) == ["train.evaluate_every"]
    assert differences(one, load("digits", [*decides, "train.log_every=7", "train.evaluate_limit=7"])) == []

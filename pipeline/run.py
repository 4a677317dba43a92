"""A run: the folder `runs/<run>/` with its recipe, dataset description, metrics, checkpoints and model."""

from __future__ import annotations

import json
import math
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convline import locks
from convline.errors import ConvlineError
from convline.files import new_folder, open_in_place, restore_folder, restore_folders
from convline.images import ImageSpec
from pipeline.dataset import Dataset, Split
from pipeline.json_schemas import RunFields, read_json_object, read_validated
from pipeline.recipe import Recipe, flat, parse

FORMAT = 1
# what run.json keeps of the dataset's meta.json
DATASET_FIELDS = ("name", "fingerprint", "fingerprints", "classes", "image", "mean", "std")
REMEDY = "train it again with --overwrite"
LOCK_SECONDS = 0.1  # to wait for the lock: `is_training` of another process holds it for a moment


@dataclass(frozen=True)
class Run:
    """A run's folder. `info` is the content of `run.json`: the id, the dataset as it was when training began, and what
    is known of the pretrained weights that it started from, if any."""

    folder: Path
    info: dict[str, Any]
    recipe: Recipe

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, dataset: Dataset, weights: dict[str, Any] | None = None) -> Run:
        """Create a run in `folder`, atomically; an existing folder is replaced. `weights` describes the pretrained
        weights that it starts from."""
        info = {"format": FORMAT, "id": uuid.uuid4().hex, "dataset": {key: dataset.meta[key] for key in DATASET_FIELDS}}
        info |= {"weights": weights} if weights else {}
        with new_folder(folder) as temporary:
            (temporary / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
            (temporary / "run.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
        return cls(folder, info, recipe)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in `folder`. Raises ConvlineError where there is none, or none that this version reads."""
        restore_folder(folder)
        try:
            info = read_validated(folder / "run.json", RunFields, FORMAT, REMEDY)
            fields = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConvlineError(f"{folder} is not a run ({Path(error.filename).name} is missing)") from error
        except (ValueError, RecursionError) as error:
            raise ConvlineError(f"{folder}/recipe.toml is damaged ({error}); {REMEDY}") from error
        return cls(folder, info, parse(fields, str(folder / "recipe.toml")))

    @classmethod
    def find(cls, runs_dir: Path, name: str | None) -> Run:
        """A run by its name or path; without one, the run trained last."""
        if name is not None:
            folder = Path(name) if "/" in name and not (runs_dir / name).exists() else runs_dir / name
            restore_folder(folder)
            if not folder.is_dir():
                names = ", ".join(sorted(path.parent.name for path in runs_dir.glob("[!.]*/run.json"))) or "none"
                raise ConvlineError(f"no run at {folder}; the runs in {runs_dir} are: {names}")
            return cls.open(folder)
        restore_folders(runs_dir)
        trained = sorted(runs_dir.glob("[!.]*/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        if not trained:
            raise ConvlineError(f"there is no run in {runs_dir}; `pipeline train digits` makes one")
        return cls.open(trained[-1].parent)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def classes(self) -> list[str]:
        return list(self.info["dataset"]["classes"])

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec.from_dict(self.info["dataset"]["image"])

    def provenance(self) -> dict[str, Any]:
        """The parts of recipe and dataset that give the weights their meaning. Checkpoints keep a copy, because
        recipe.toml and run.json may be changed or damaged later."""
        fields = self.recipe.to_dict()
        recipe = {key: fields[key] for key in ("data", "preprocess", "model")} | {"seed": self.recipe.train.seed}
        weights = {"weights": self.info["weights"]} if "weights" in self.info else {}
        return {"recipe": recipe, "dataset": self.info["dataset"], **weights}

    def check_provenance(self, state: dict[str, Any]) -> None:
        """Raises ConvlineError where the `state` of a checkpoint was trained with another recipe or dataset. The
        checkpoints of older versions do not say."""
        current = flat(self.provenance())
        trained_with = flat(state.get("provenance", {}))  # without fields that newer versions have added to recipes
        if different := sorted(key for key, value in trained_with.items() if current.get(key) != value):
            raise ConvlineError(
                f"{self.folder} has changed since it was trained: its recipe.toml or run.json differs from what the "
                f"checkpoint of step {state['step']} was trained with, in {', '.join(different[:3])}; restore the "
                f"files, or {REMEDY}"
            )

    @contextmanager
    def loading(self, state: dict[str, Any]) -> Iterator[None]:
        """A block that loads the `state` of a checkpoint: raises ConvlineError where it does not fit the network."""
        try:
            yield
        # what torch raises where names, shapes or types differ; an older checkpoint may hold anything
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            details = str(error).strip().splitlines()[-1].strip()
            raise ConvlineError(
                f"the checkpoint of step {state['step']} in {self.folder} does not fit its recipe's network "
                f"({details}); restore its recipe.toml, or {REMEDY}"
            ) from error

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def summaries(self) -> Path:
        """The distributions of each layer's values, as points like those in `metrics`."""
        return self.folder / "summaries.jsonl"

    @property
    def watched(self) -> Path:
        """The results of `pipeline evaluate --watch`, one point per checkpoint, like those in `metrics`."""
        return self.folder / "watched.jsonl"

    @property
    def mistakes(self) -> Path:
        """The wrongly classified test images (see pipeline/reporting/mistakes_table.py)."""
        return self.folder / "mistakes.csv"

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def report_page(self) -> Path:
        """The page that `pipeline report` writes."""
        return self.folder / "report.html"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def dataset(self, data_dir: Path) -> Dataset:
        """The dataset that the run was trained on. Raises ConvlineError where it is not the same any more."""
        dataset = Dataset.open(data_dir, self.info["dataset"]["name"])
        self.check_dataset(dataset)
        return dataset

    def check_dataset(self, dataset: Dataset) -> None:
        """Raises ConvlineError where `dataset` is not the one that the run was trained on."""
        trained_on = self.info["dataset"]
        # classes are compared with their order
        if different := [key for key in DATASET_FIELDS if key != "name" and dataset.meta[key] != trained_on[key]]:
            raise ConvlineError(
                f"{dataset.folder} is not the dataset that {self.folder} was trained on (its {different[0]} "
                f"{'differ' if different[0].endswith('s') else 'differs'}); prepare that one again, or train with "
                "--overwrite"
            )

    def split(self, dataset: Dataset, name: str) -> Split:
        """A split of the run's dataset, with the validation split that its recipe sets."""
        return dataset.split(name, self.recipe.data.validation, self.recipe.train.seed)

    @contextmanager
    def sending(self, wait: bool = True) -> Iterator[None]:
        """Lock the run for sending to MLflow, which one process at a time may do.

        Another process waits, or raises BlockingIOError without `wait`.
        """
        with open_in_place(self.folder / "sync.lock", "w") as file:
            if not locks.acquire(file.fileno(), math.inf if wait else 0):
                raise BlockingIOError(f"{file.name} is locked by another process")
            yield

    def is_tracked(self) -> bool:
        """Whether metrics of the run were sent to MLflow, or should have been."""
        return (self.folder / "sync.json").exists()

    def is_current(self) -> bool:
        """Whether the folder still holds this run, not one that has replaced it."""
        try:
            return bool(read_json_object(self.folder / "run.json", REMEDY).get("id") == self.info["id"])
        except FileNotFoundError:
            return False

    def is_training(self) -> bool:
        """Whether a process is training it, and so holds the lock."""
        try:
            with open(self.folder / "lock") as file:
                return locks.is_held(file.fileno())
        except FileNotFoundError:
            return False


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the run in `folder`, readable or not, while it is trained; a killed process releases it, too.

    Raises ConvlineError if another process is training it.
    """
    with open_in_place(folder / "lock", "w") as file:
        if not locks.acquire(file.fileno(), LOCK_SECONDS):
            raise ConvlineError(f"{folder} is being trained by another process; wait for it")
        yield

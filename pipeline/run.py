"""A run: the folder `runs/<run>/` and what is in it."""

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
KEPT = ("name", "fingerprint", "fingerprints", "classes", "image", "mean", "std")  # of a dataset's meta.json
REMEDY = "train it again with --overwrite"
LOCK_SECONDS = 0.1  # to wait for the lock: `is_training` of another process holds it for a moment


@dataclass(frozen=True)
class Run:
    """A run's folder. `info` is its `run.json`: id, and the dataset as it was when training began."""

    folder: Path
    info: dict[str, Any]
    recipe: Recipe

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, dataset: Dataset) -> Run:
        """A new run in `folder`, which appears whole; whatever is there is replaced."""
        info = {"format": FORMAT, "id": uuid.uuid4().hex, "dataset": {key: dataset.meta[key] for key in KEPT}}
        with new_folder(folder) as beside:
            (beside / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
            (beside / "run.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
        return cls(folder, info, recipe)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Raises ConvlineError where there is no run of this version."""
        restore_folder(folder)
        try:
            info = read_validated(folder / "run.json", RunFields, FORMAT, REMEDY)
            fields = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConvlineError(f"{folder} is no run ({Path(error.filename).name} is missing)") from error
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
                there = ", ".join(sorted(path.parent.name for path in runs_dir.glob("[!.]*/run.json"))) or "none"
                raise ConvlineError(f"no run at {folder}; the runs in {runs_dir} are: {there}")
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
        """What its weights were made by and mean something with: a checkpoint keeps it, for recipe.toml and run.json
        may be changed or damaged afterwards."""
        told = self.recipe.to_dict()
        recipe = {key: told[key] for key in ("data", "preprocess", "model")} | {"seed": self.recipe.train.seed}
        return {"recipe": recipe, "dataset": self.info["dataset"]}

    def check_provenance(self, state: dict[str, Any]) -> None:
        """Raises ConvlineError where a checkpoint's `state` was made by another recipe or dataset. Older ones do not
        say."""
        mine = flat(self.provenance())
        told = flat(state.get("provenance", {}))  # what a newer convline adds to a recipe, it lacks
        if differs := sorted(key for key, value in told.items() if mine.get(key) != value):
            raise ConvlineError(
                f"{self.folder} was changed since it was trained: its recipe.toml or run.json differ from what its "
                f"checkpoint of step {state['step']} was trained by in {', '.join(differs[:3])}; put them back, or "
                f"{REMEDY}"
            )

    @contextmanager
    def fitting(self, state: dict[str, Any]) -> Iterator[None]:
        """While what a checkpoint's `state` holds is loaded: raises ConvlineError where it does not fit."""
        try:
            yield
        # torch's ways to say that names or shapes differ; an older checkpoint may hold anything
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            told = str(error).strip().splitlines()[-1].strip()
            raise ConvlineError(
                f"the checkpoint of step {state['step']} in {self.folder} does not fit its recipe's network ({told}); "
                f"put its recipe.toml back, or {REMEDY}"
            ) from error

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def summaries(self) -> Path:
        """How the values of each layer are distributed, a point every so many steps, as in `metrics`."""
        return self.folder / "summaries.jsonl"

    @property
    def watched(self) -> Path:
        """What `pipeline evaluate --watch` found, a point a checkpoint, as in `metrics`."""
        return self.folder / "watched.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def page(self) -> Path:
        """What `pipeline report` wrote."""
        return self.folder / "report.html"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def dataset(self, data_dir: Path) -> Dataset:
        """The dataset it was trained on. Raises ConvlineError where it is not the same any more."""
        mine = self.info["dataset"]
        dataset = Dataset.open(data_dir, mine["name"])
        # as lists: classes in another order are others
        if differs := [key for key in KEPT if key != "name" and dataset.meta[key] != mine[key]]:
            raise ConvlineError(
                f"{dataset.folder} is not the dataset that {self.folder} was trained on (its {differs[0]} "
                f"{'differ' if differs[0].endswith('s') else 'differs'}); prepare that one again, or train with "
                "--overwrite"
            )
        return dataset

    def split(self, dataset: Dataset, name: str) -> Split:
        """A split of its dataset, as its recipe cuts it."""
        return dataset.split(name, self.recipe.data.validation, self.recipe.train.seed)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run while it is trained; a killed process releases it, too.

        Raises ConvlineError if another process is training it.
        """
        with open_in_place(self.folder / "lock", "w") as file:
            if not locks.acquire(file.fileno(), LOCK_SECONDS):
                raise ConvlineError(f"{self.folder} is being trained by another process; wait for it")
            yield

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
        """Whether it was sent to MLflow, or should have been."""
        return (self.folder / "sync.json").exists()

    def is_current(self) -> bool:
        """Whether the folder still holds this run, and not one that has replaced it."""
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

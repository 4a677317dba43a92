"""The Python API: `train`, `evaluate`, `export` and `preprocess` as functions (`from convline import train`).

Each calls the stage that the command of the same name calls; arguments have the names and defaults of its options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from convline.console import log
from convline.errors import ConvlineError, ModelError
from convline.files import restore_folder

if TYPE_CHECKING:
    from pipeline.dataset import Dataset
    from pipeline.export import Exported
    from pipeline.run import Run
    from serving import Classifier

SplitName = Literal["train", "validation", "test"]
Weights = Literal["averaged", "raw"]
Precision = Literal["fp32", "fp16", "int8"]
Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
Tracking = Literal["mlflow", "none"]
ImageSize = int | tuple[int, int]  # the side of a square, or (height, width), in pixels


class TrainedRun:
    """A run: the folder `runs/<name>` with its recipe, metrics, checkpoints and, after an export, its ONNX file.

    `train` returns one; `TrainedRun.open` finds one that was trained earlier.
    """

    def __init__(self, run: Run, data_dir: Path) -> None:
        self._run = run
        self._data_dir = data_dir

    @classmethod
    def open(
        cls, run: str | Path | None = None, *, data_dir: str | Path = "data", runs_dir: str | Path = "runs"
    ) -> TrainedRun:
        """A run by its name or path; without one, the run trained last. Raises ConvlineError where there is none."""
        from pipeline.run import Run

        return cls(Run.find(Path(runs_dir), None if run is None else str(run)), Path(data_dir))

    @property
    def folder(self) -> Path:
        return self._run.folder

    @property
    def name(self) -> str:
        return self._run.name

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the model's scores."""
        return self._run.classes

    def evaluate(
        self,
        split: SplitName = "test",
        *,
        images: str | Path | None = None,
        weights: Weights = "averaged",
        onnx: bool = False,
        top_k: int = 1,
        limit: int | None = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """Precision @ k on a split, as `pipeline evaluate --json` prints it.

        Keys: `precision_at_1` to `precision_at_<top_k>`; `classes`, for each class its `count`, `precision` and
        `recall` (None where the class was never predicted, or has no images); `confusion`, a list of rows (true class)
        of columns (predicted class); `count`; `intervals`, with the 95% interval of each precision and recall; and what
        was evaluated (`run`, `split`, `weights`, `step`, `engine`).

        `images`, a folder or archive <class>/<image>, takes the place of the split; `onnx` evaluates the exported file;
        `limit` takes the first images only.
        Raises ConvlineError where the run has no such weights, file or split, and for images of other classes.
        """
        from pipeline.evaluate import EvaluationOptions, evaluate_run

        _check("split", split, SplitName)
        _check("weights", weights, Weights)
        size = {} if batch_size is None else {"batch_size": batch_size}
        folder = None if images is None else Path(images).expanduser()
        options = EvaluationOptions(split, weights, onnx, limit, device, top_k=top_k, images=folder, **size)
        return evaluate_run(self._run, self._data_dir, options)

    def export(
        self,
        output: str | Path | None = None,
        *,
        precision: Precision = "fp32",
        any_size: bool = False,
        calibrate: bool = False,
        wanted_precision: float | None = None,
        unfamiliar: bool = False,
        register: str | None = None,
        tracking: Tracking = "mlflow",
    ) -> Exported:
        """Export the averaged weights to ONNX; the file is published only if it passes the parity proof.

        Returns an object with `path` (by default `model.onnx` in the run's folder), `report` (what `parity.json`
        holds) and `table()`. With `any_size` the file takes images of any height and width, and resizes them as serving
        does. `calibrate` fits a temperature on validation, so that probabilities can be trusted; `wanted_precision`
        finds the threshold there above which answers are right that often; with `unfamiliar` the file also tells how
        far an image is from the training images. `register` also adds the file to MLflow's registry under this name.
        A run that is tracked is sent to MLflow, unless `tracking` is "none". Raises ConvlineError, with the earlier
        file untouched, where the proof fails.
        """
        from pipeline.dataset import check_name
        from pipeline.export import ExportOptions
        from pipeline.export import export as export_run

        _check("precision", precision, Precision)
        _check("tracking", tracking, Tracking)
        if register is not None:
            check_name(register, "model")
        dataset = self._run.dataset(self._data_dir)
        options = ExportOptions(precision, any_size, calibrate, wanted_precision, unfamiliar)
        exported = export_run(self._run, dataset, None if output is None else Path(output), options)
        if register is not None:
            from pipeline.register import register as add_version

            log(add_version(exported.path, self._run, register))
        elif tracking == "mlflow":
            from pipeline.sync import sync_if_tracked

            sync_if_tracked(self._run)
        return exported

    def metrics(self) -> list[dict[str, Any]]:
        """Every logged point, in order: `step`, `time` (seconds since the epoch) and its values, as
        `pandas.DataFrame` takes them. Points differ in their keys: `loss` stands every `train.log_every` steps,
        `precision_at_1` (on test) every `train.evaluate_every`."""
        from pipeline.tracking.points import read_points

        return [{"step": point.step, "time": point.seconds, **point.values} for point in read_points(self._run.metrics)]

    def classifier(self, provider: Provider = "auto", threads: int | None = None) -> Classifier:
        """The exported file, opened for classifying.

        Raises ModelError where there is none, or it fails its self-test.
        """
        from serving import Classifier

        if not self._run.model.exists():
            raise ModelError(f"{self.folder} has no model.onnx yet; export the run first")
        return Classifier(self._run.model, provider, threads)

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.folder)!r})"


def train(
    recipe: str | Path,
    data: str | Path | None = None,
    *,
    run: str | None = None,
    image_size: ImageSize | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    set: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tracking: Tracking = "mlflow",
    data_dir: str | Path = "data",
    runs_dir: str | Path = "runs",
) -> TrainedRun:
    """Train a recipe, by its name or the path of a .toml.

    `data` is the name of a dataset, or a folder or archive of images of your own. Images of your own are prepared
    first, as the dataset of the run's name: resized to `image_size`, or without it to the size that the recipe is made
    for (that of its dataset where it is a known one, else its data.image_size, else a seventh more than its crop; a
    recipe that says none of these needs images of one size). `set` overrides fields of the recipe:
    {"train.batch_size": 64, "optimizer.learning_rate": 0.01}; None leaves a field to its default.

    Raises ConvlineError for a recipe that does not fit, and for a run that exists, unless `resume` goes on with it or
    `overwrite` replaces it; KeyboardInterrupt, after saving a checkpoint, when interrupted.
    """
    from pipeline.dataset import check_name
    from pipeline.preprocess import image_size_for
    from pipeline.recipe import load
    from pipeline.train import train as train_recipe

    _check("tracking", tracking, Tracking)
    if resume and overwrite:
        raise ConvlineError("resume and overwrite contradict each other; give one of them")
    data_dir, runs_dir = Path(data_dir), Path(runs_dir)
    path = str(Path(recipe).expanduser())
    overrides = _overrides({**(set or {}), **_given({"train.steps": steps, "train.seed": seed})})
    loaded = load(path, overrides)
    folder = runs_dir / check_name(loaded.name if run is None else run, "run")
    if data is not None:
        name = str(data)
        if _is_source(data, data_dir):
            name = folder.name
            for replaced in (folder, data_dir / name):
                restore_folder(replaced)
            if (folder / "run.json").exists() and not (resume or overwrite):
                raise ConvlineError(f"{folder} exists: resume=True goes on with it, overwrite=True replaces it")
            if not (resume and (data_dir / name / "meta.json").exists()):
                _prepare(Path(data).expanduser(), name, image_size or image_size_for(loaded), data_dir, overwrite)
        elif image_size is not None:
            raise ConvlineError(f"image_size is for images that are still to be prepared, and {data} is a dataset")
        loaded = load(path, [*overrides, *_overrides({"data.dataset": name})])
    try:
        trained = train_recipe(
            loaded, folder, data_dir, device, resume=resume, overwrite=overwrite, tracking=tracking == "mlflow"
        )
    except SystemExit as stopped:
        if stopped.code == 130:  # what Ctrl-C is to the command line
            raise KeyboardInterrupt from stopped
        raise
    return TrainedRun(trained, data_dir)


def evaluate(
    run: str | Path | None = None,
    split: SplitName = "test",
    *,
    images: str | Path | None = None,
    weights: Weights = "averaged",
    onnx: bool = False,
    top_k: int = 1,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    data_dir: str | Path = "data",
    runs_dir: str | Path = "runs",
) -> dict[str, Any]:
    """`TrainedRun.evaluate` of a run by its name or path; without one, of the run trained last."""
    return TrainedRun.open(run, data_dir=data_dir, runs_dir=runs_dir).evaluate(
        split,
        images=images,
        weights=weights,
        onnx=onnx,
        top_k=top_k,
        limit=limit,
        device=device,
        batch_size=batch_size,
    )


def export(
    run: str | Path | None = None,
    output: str | Path | None = None,
    *,
    precision: Precision = "fp32",
    any_size: bool = False,
    calibrate: bool = False,
    wanted_precision: float | None = None,
    unfamiliar: bool = False,
    register: str | None = None,
    tracking: Tracking = "mlflow",
    data_dir: str | Path = "data",
    runs_dir: str | Path = "runs",
) -> Exported:
    """`TrainedRun.export` of a run by its name or path; without one, of the run trained last."""
    return TrainedRun.open(run, data_dir=data_dir, runs_dir=runs_dir).export(
        output,
        precision=precision,
        any_size=any_size,
        calibrate=calibrate,
        wanted_precision=wanted_precision,
        unfamiliar=unfamiliar,
        register=register,
        tracking=tracking,
    )


def preprocess(
    dataset: str,
    source: str | Path | None = None,
    *,
    image_size: ImageSize | None = None,
    recipe: str | Path | None = None,
    channels: Literal["auto", "1", "3"] = "auto",
    fit: Literal["crop", "stretch", "pad"] = "crop",
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear",
    jpeg: Literal["full", "reduced"] = "full",
    labels: str | Path | None = None,
    group_by: str | None = None,
    allow_rejects: bool = False,
    allow_leaks: bool = False,
    overwrite: bool = False,
    data_dir: str | Path = "data",
) -> Dataset:
    """Prepare a known dataset by its name, or images of your own (`source`: a folder, an archive or Parquet files)
    under a new name.

    `image_size`: side, or (height, width), in pixels; without it that which `recipe` is made for. `labels`: a table
    (.csv, .jsonl or .parquet) with the columns path and label, and if wanted split and group. `group_by`: a regular
    expression on paths, or a column of the table or of the Parquet files; images of one group are never on both
    sides of a split.

    After an interruption, the same call goes on with the images that are decoded.

    Raises ConvlineError, with nothing left behind, for a source that cannot be used, and for a dataset that exists,
    unless `overwrite` prepares it again.
    """
    from pipeline.preparing.dataset_summary import class_counts_table, findings
    from pipeline.preparing.image_folder import ImageFolderOptions
    from pipeline.preprocess import image_size_for
    from pipeline.preprocess import preprocess as prepare
    from pipeline.recipe import load

    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is None and recipe is not None and source is not None:
        size = image_size_for(load(str(Path(recipe).expanduser())))
    table = None if labels is None else Path(labels).expanduser()
    options = ImageFolderOptions(size, channels, fit, allow_rejects, jpeg, resample, allow_leaks, table, group_by)
    images = None if source is None else Path(source).expanduser()
    prepared = prepare(dataset, Path(data_dir), images, options, overwrite=overwrite)
    for line in (*class_counts_table(prepared.meta["counts"]), *findings(prepared.meta)):
        log(line)
    return prepared


def _check(argument: str, value: str, accepted: Any) -> None:
    """Raises ConvlineError for a value that is none of a Literal's."""
    if value not in get_args(accepted):
        raise ConvlineError(f"{argument}={value!r}: it is one of {', '.join(get_args(accepted))}")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _overrides(fields: Mapping[str, Any]) -> list[str]:
    """Fields of a recipe as `--set` takes them."""
    from pipeline.recipe import flat

    return [f"{key}={'' if value is None else json.dumps(value)}" for key, value in flat(dict(fields)).items()]


def _is_source(data: str | Path, data_dir: Path) -> bool:
    """Whether `data` is a folder or archive of images, and not the name of a dataset."""
    from pipeline.preparing.official_datasets import known_datasets

    if isinstance(data, Path) or Path(data).name != data:
        return True
    restore_folder(data_dir / data)
    is_dataset = (data_dir / data / "meta.json").exists() or data in known_datasets()
    return not is_dataset and Path(data).exists()


def _prepare(source: Path, name: str, image_size: ImageSize | None, data_dir: Path, overwrite: bool) -> None:
    from pipeline.preparing.official_datasets import known_datasets

    if name in known_datasets():
        raise ConvlineError(
            f"images of your own cannot be called {name}, as a known dataset is; give the run a name: run='my-{name}'"
        )
    if (data_dir / name).exists() and not overwrite:
        raise ConvlineError(f"{data_dir / name} exists: data={name!r} trains on it, overwrite=True prepares it again")
    preprocess(name, source, image_size=image_size, overwrite=overwrite, data_dir=data_dir)

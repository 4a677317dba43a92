"""The commands and options of `pipeline`; heavy modules are imported inside the commands, so that --help is fast."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from convline import console
from convline.errors import ConvlineError
from pipeline.training.rank_environment import is_rank

app = typer.Typer(
    help="Train image classifiers, export the averaged weights to ONNX, and prove that the file equals the network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help="digits, mnist, …, or your own name.")]
RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name or path; default: the run trained last.")
]
DataDir = Annotated[Path, typer.Option(help="The folder of datasets.")]
RunsDir = Annotated[Path, typer.Option(help="The folder of runs.")]
Mirrors = Annotated[list[str] | None, typer.Option("--mirror", help="http(s) or file URL to try first; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
SplitOption = Annotated[Literal["train", "validation", "test"], typer.Option(help="Which images to use.")]
Tracking = Literal["mlflow", "none"]

DATA = Path("data")
RUNS = Path("runs")


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """`console.main` handles `--debug` and removes it from the arguments; here it is only documented."""


@app.command()
def download(dataset: DatasetArgument, data_dir: DataDir = DATA, mirror: Mirrors = None) -> None:
    """Fetch a dataset's official archives."""
    from pipeline.download import download as fetch
    from pipeline.preparing.official_datasets import known_datasets

    datasets = known_datasets()
    if dataset not in datasets:
        raise ConvlineError(f"no official archives of {dataset} are known; choose one of {', '.join(datasets)}")
    if not datasets[dataset].files:
        console.log(f"{dataset} is embedded: there is nothing to download")
    for path in fetch(datasets[dataset], data_dir, mirror or []):
        print(path)


@app.command()
def preprocess(
    dataset: DatasetArgument,
    source: Annotated[
        Path | None, typer.Option(help="A folder, .tar, .tar.gz/.bz2/.xz or .zip of images, or Parquet files.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(metavar="H[xW]", help="Resize to this size.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Resize to the size that this recipe is made for, unless --image-size is given.")
    ] = None,
    channels: Annotated[Literal["auto", "1", "3"], typer.Option(help="auto: 1 if every image is grey.")] = "auto",
    fit: Annotated[
        Literal["crop", "stretch", "pad"], typer.Option(help="crop: cut off the longer side; pad: add black borders.")
    ] = "crop",
    resample: Annotated[
        Literal["bilinear", "bicubic", "lanczos", "box"], typer.Option(help="The filter for resizing.")
    ] = "bilinear",
    jpeg: Annotated[
        Literal["full", "reduced"],
        typer.Option(help="reduced: decode large JPEGs at a smaller size, faster; compared with full decoding first."),
    ] = "full",
    allow_rejects: Annotated[bool, typer.Option("--allow-rejects", help="Allow more than 1% unusable files.")] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A table (.csv, .jsonl, .parquet): path, label, and if wanted split and group."
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(metavar="REGEX|COLUMN", help="Images of one group are never on both sides of a split."),
    ] = None,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Allow the same pixels, or one group, in two splits.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Prepare an existing dataset again.")] = False,
    data_dir: DataDir = DATA,
    mirror: Mirrors = None,
) -> None:
    """Turn an archive, an image folder or Parquet files into a prepared dataset."""
    from pipeline.preparing.dataset_summary import class_counts_table, findings
    from pipeline.preparing.image_folder import ImageFolderOptions
    from pipeline.preprocess import image_size_for
    from pipeline.preprocess import preprocess as prepare

    size = _image_size(image_size)
    if size is None and recipe is not None and source is not None:
        from pipeline.recipe import load

        size = image_size_for(load(recipe))
    folder_options = ImageFolderOptions(
        size, channels, fit, allow_rejects, jpeg, resample, allow_leaks, labels, group_by
    )
    prepared = prepare(dataset, data_dir, source, folder_options, mirror or [], overwrite)
    print(*class_counts_table(prepared.meta["counts"]), *findings(prepared.meta), sep="\n")
    image = prepared.meta["image"]
    sizes = ", ".join(f"{sum(counts.values())} {split}" for split, counts in prepared.meta["counts"].items())
    print(
        f"{prepared.folder}: {sizes} images of {image['height']}x{image['width']}x{image['channels']}, "
        f"{len(prepared.classes)} classes, {len(prepared.meta['rejected'])} rejected"
    )


@app.command()
def check(
    dataset: DatasetArgument,
    run: Annotated[str | None, typer.Option(help="Judge labels by this run's network.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not judge labels, which takes longest.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page, and FILE.csv, which --labels takes back.")
    ] = None,
    as_json: Json = False,
    data_dir: DataDir = DATA,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Look for copies, near duplicates and leaks, doubtful labels, blank images and tiny classes."""
    from pipeline.check import check as check_dataset
    from pipeline.dataset import Dataset
    from pipeline.run import Run

    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"--report {report}: name a file that ends in .html")
    opened = Dataset.open(data_dir, dataset)
    found = check_dataset(opened, None if run is None else Run.find(runs_dir, run), judge_labels=not quick)
    if report is not None:
        from pipeline.checking.check_page import write_page
        from pipeline.checking.labels_table import write_labels

        labels_file = report.with_suffix(".csv")
        write_labels(labels_file, opened, found)
        write_page(report, opened, found, labels_file)
    print(console.as_json(found.to_dict(), indent=2) if as_json else found.table())
    if report is not None and not as_json:
        print(f"{report}, {labels_file}")


@app.command()
def samples(
    dataset: DatasetArgument,
    split: SplitOption = "test",
    count: Annotated[int, typer.Option(min=1, help="Number of images, over all classes.")] = 100,
    output: Annotated[Path | None, typer.Option(help="Folder; default samples/DATASET.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Also write DIR.seen.png, the images as the network of this recipe sees them, and "
            "DIR.augmented.png, a few of them as it sees them in training."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Open the contact sheet.")] = False,
    data_dir: DataDir = DATA,
) -> None:
    """Write images of a dataset as DIR/<class>/<i>.png, and a contact sheet as DIR.png."""
    from pipeline.dataset import Dataset
    from pipeline.samples import AUGMENTED_STEPS, write_samples

    opened = Dataset.open(data_dir, dataset)
    folder = output or Path("samples") / dataset
    views = None
    if recipe is not None:
        from pipeline.reporting.network_input import network_views

        views = network_views(recipe, opened, RUNS, AUGMENTED_STEPS)
    sheets = write_samples(opened, opened.split(split), count, folder, views)
    print(folder, *sheets, sep="\n")
    if show:
        typer.launch(str(sheets[-1]))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe.")] = None) -> None:
    """List the shipped recipes, or show one."""
    if name is not None:
        from pipeline.recipe import read

        print(read(name), end="")
        return
    from pipeline.reporting.recipe_list import HEADER, recipe_rows

    for recipe, dataset, network, parameters, products, published in [HEADER, *recipe_rows()]:
        print(f"{recipe:25}{dataset:10}{network:30}{parameters:>10}{products:>15}{published:>11}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a path to a .toml.")],
    dataset: Annotated[str | None, typer.Option(help="Train on another dataset.")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; default: the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The same as --set train.steps=N.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same as --set train.seed=N.")] = None,
    device: Device = "auto",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change any field.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")] = False,
    tracking: Annotated[Tracking, typer.Option(help="Where metrics are sent.")] = "mlflow",
    devices: Annotated[int, typer.Option(min=1, help="Split each batch among N devices of this machine.")] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="With --devices: if a rank dies.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Of each rank, on the CPU; default: OMP_NUM_THREADS, or an even share."),
    ] = None,
    memory_limit: Annotated[
        int | None, typer.Option(min=0, metavar="BYTES", help="Stream training images from disk if they are larger.")
    ] = None,
    data_dir: DataDir = DATA,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Train a recipe; a missing dataset is prepared first."""
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite contradict each other; give one of them")
    from pipeline.dataset import check_name
    from pipeline.recipe import load

    options = {"data.dataset": dataset, "train.steps": steps, "train.seed": seed}
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    loaded = load(recipe, [*(overrides or []), *given])
    folder = runs_dir / check_name(loaded.name if run is None else run, "run")
    if devices > 1 and not is_rank():
        from pipeline.training.launch import launch

        raise typer.Exit(launch(devices, max_restarts, device, sys.argv[1:]))
    from pipeline.train import train as run_training

    run_training(
        loaded,
        folder,
        data_dir,
        device,
        resume=resume,
        overwrite=overwrite,
        tracking=tracking == "mlflow",
        memory_limit=memory_limit,
        threads=threads,
    )
    print(folder)


@app.command()
def evaluate(
    run: RunArgument = None,
    precision_at_1: Annotated[bool, typer.Option("--precision-at-1", help="Print only precision @ 1.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Also print precision @ 2 to K.")] = 1,
    split: SplitOption = "test",
    images: Annotated[
        Path | None, typer.Option(help="Instead of a split: a folder or archive <class>/<image>.")
    ] = None,
    weights: Annotated[Literal["averaged", "raw"], typer.Option(help="Which weights to evaluate.")] = "averaged",
    onnx: Annotated[bool, typer.Option("--onnx", help="Evaluate the exported file instead.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images.")] = None,
    device: Device = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: at most 256, by the images' size.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Evaluate each checkpoint as it is written.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two checks.")] = 30.0,
    tracking: Annotated[Tracking, typer.Option(help="With --watch: where precision @ 1 is sent.")] = "mlflow",
    as_json: Json = False,
    data_dir: DataDir = DATA,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Measure precision @ k of a run, by default on test images."""
    from pipeline.evaluate import EvaluationOptions, evaluate_run, table
    from pipeline.run import Run
    from pipeline.watch import watch as watch_run

    if watch and onnx:
        raise typer.BadParameter("--watch evaluates checkpoints, --onnx the exported file; give one of them")
    if watch and images is not None:
        raise typer.BadParameter("--watch evaluates on a split; leave out --images")
    options = EvaluationOptions(split, weights, onnx, limit, device, batch_size, top_k, images)
    opened = Run.find(runs_dir, run)
    if watch:
        for report in watch_run(opened, data_dir, options, interval, tracking == "mlflow"):
            line = f"step {report['step']}: precision @ 1 = {report['precision_at_1']:.3f}"
            print(console.as_json(report) if as_json else line, flush=True)
        return
    report = evaluate_run(opened, data_dir, options)
    if as_json:
        print(console.as_json(report, indent=2))
    elif precision_at_1:
        print(f"precision @ 1 = {report['precision_at_1']:.3f}")
    else:
        print(table(report))


@app.command()
def export(
    run: RunArgument = None,
    output: Annotated[Path | None, typer.Option(help="Default: model.onnx in the run.")] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"], typer.Option(help="Of weights and activations; accuracy is checked.")
    ] = "fp32",
    any_size: Annotated[
        bool, typer.Option("--any-size", help="The file takes images of any size, and resizes them as serving does.")
    ] = False,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also add it to MLflow's registry; the best is `champion`.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit a temperature on validation, so that probabilities can be trusted.")
    ] = False,
    wanted_precision: Annotated[
        float | None,
        typer.Option(metavar="P", help="Find the threshold on validation above which answers are right that often."),
    ] = None,
    unfamiliar: Annotated[
        bool, typer.Option("--unfamiliar", help="The file also tells how far an image is from the training images.")
    ] = False,
    tracking: Annotated[Tracking, typer.Option(help="Where the file is sent if its run is tracked.")] = "mlflow",
    data_dir: DataDir = DATA,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Export the averaged weights to ONNX; the file is published only if its outputs equal PyTorch's."""
    from pipeline.dataset import check_name
    from pipeline.export import ExportOptions
    from pipeline.export import export as export_run
    from pipeline.run import Run
    from pipeline.sync import sync_if_tracked

    if register is not None:
        check_name(register, "model")
    if wanted_precision is not None and not 0 < wanted_precision < 1:
        raise typer.BadParameter(f"--wanted-precision {wanted_precision:g} is not between 0 and 1, as in 0.99")
    opened = Run.find(runs_dir, run)
    options = ExportOptions(precision, any_size, calibrate, wanted_precision, unfamiliar)
    exported = export_run(opened, opened.dataset(data_dir), output, options)
    print(exported.table())
    if register is not None:
        from pipeline.register import register as register_file

        print(register_file(exported.path, opened, register))
    elif tracking == "mlflow":
        sync_if_tracked(opened)
    print(exported.path)


@app.command()
def parity(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN|MODEL.onnx]", help="Default: the run trained last.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Compare on these images instead of the test split.")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL.onnx", help="Compare with this file instead of the checkpoint.")
    ] = None,
    as_json: Json = False,
    data_dir: DataDir = DATA,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Compare an exported file again with its checkpoint, or with another file."""
    from pipeline.parity import prove_again, require_passed

    path, result = prove_again(run, runs_dir, data_dir, images, against)
    if as_json:
        print(console.as_json(result.to_dict(), indent=2), flush=True)
    require_passed(result, path)
    if not as_json:
        print(f"{result.sentence()}\n{result.table()}")


@app.command()
def report(
    run: RunArgument = None,
    tracking: Annotated[
        Tracking, typer.Option(help="Where the page and its plots are sent if the run is tracked.")
    ] = "mlflow",
    data_dir: DataDir = DATA,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write a page about a run, report.html, and its plots and images as PNG."""
    from pipeline.report import report as write_report
    from pipeline.run import Run
    from pipeline.sync import sync_if_tracked

    opened = Run.find(runs_dir, run)
    page = write_report(opened, opened.dataset(data_dir))
    if tracking == "mlflow":
        sync_if_tracked(opened)
    print(page)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Names or paths.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page; default: compare.html in the folder of runs.")
    ] = None,
    as_json: Json = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Compare runs: print a table, and write a page with their curves on the same axes."""
    from pipeline.compare import compare as compare_runs
    from pipeline.compare import text_table
    from pipeline.run import Run

    page = output or runs_dir / "compare.html"
    figures, remarks = compare_runs([Run.find(runs_dir, run) for run in runs], page)
    print(console.as_json(figures, indent=2) if as_json else "\n".join([text_table(figures), *remarks, str(page)]))


@app.command()
def sync(
    runs: Annotated[list[str] | None, typer.Argument(help="Names or paths; default: the run trained last.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Continue until the training ends.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Send to MLflow the metrics and files of runs that it does not have yet."""
    from pipeline.run import Run
    from pipeline.sync import sync as sync_run

    if follow and runs and len(runs) > 1:
        raise typer.BadParameter("--follow works on one run only")
    names: list[str | None] = [*runs] if runs else [None]
    for run in [Run.find(runs_dir, name) for name in names]:
        print(sync_run(run, follow), flush=True)


def _image_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "32" or "32x48"."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if not height.isdigit() or not (width if cross else height).isdigit() or 0 in (int(height), int(width or height)):
        raise typer.BadParameter(f"--image-size {text}: write it as 32 or 32x48 (height x width, in pixels)")
    return int(height), int(width or height)


def run() -> None:
    """Run the command line. Raises SystemExit with its status."""
    console.main(app)


def main() -> None:
    """The console script `pipeline`."""
    with console.exiting_at_once():
        run()

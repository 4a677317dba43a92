"""The command line `serving`: classify, page, inspect, bench, doctor. Heavy imports are in the commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convline import console
from serving.batch_size import SERVING_BATCH

if TYPE_CHECKING:
    from serving.external_model import ExternalModel
    from serving.job import Job
    from serving.summary import Summary

app = typer.Typer(
    help="Classify folders of images with an exported model. Runs without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="An ONNX file made by `pipeline export`, or models:/NAME@champion.")]
ProviderOption = Annotated[
    Literal["auto", "cpu", "cuda", "tensorrt"],
    typer.Option(help="What runs the model; auto takes cuda where it loads, else cpu."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Documents `--debug`, which `console.main` takes out of the arguments."""


@app.command()
def classify(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images, folders, globs, archives, @LIST, - or URLs.")
    ],
    model: Annotated[str, typer.Option(help="The ONNX file, models:/NAME@champion or models:/NAME/3.")],
    output: Annotated[str, typer.Option(help="A .csv, .jsonl or .parquet file; - is stdout.")] = "-",
    top_k: Annotated[int, typer.Option(min=1, help="Classes per row, most probable first.")] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="P", min=0, max=1, help="Below this probability unsure; default: the file's own, if any."),
    ] = None,
    unfamiliar: Annotated[
        bool, typer.Option("--unfamiliar", help="Add a column: how far each image is from the training images.")
    ] = False,
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Images per batch; auto measures the best size.")
    ] = str(SERVING_BATCH),
    provider: ProviderOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPUs to use; default: all usable ones.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a job that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    rescan: Annotated[
        bool,
        typer.Option(
            "--rescan", help="Bring a finished table up to date, or continue a stopped job though the input changed."
        ),
    ] = False,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Link each image into a folder named after its label.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write an HTML page: images by class and confidence.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only shard I, from 1, of N of the listing.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="ray: run shards on a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="The Ray cluster; default: one started here.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="For a model of another tool: its class names, one per line or a JSON list.")
    ] = None,
    preprocess: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For a model of another tool: its input and output (size, range, mean, std, output, scores, …)",
        ),
    ] = None,
    csv_safe: Annotated[
        bool, typer.Option("--csv-safe", help="Put a ' before cells that spreadsheets would run as a formula.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 if a file was rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Summary (or rows, on stdout) as JSON.")] = False,
) -> None:
    """Classify every image of the inputs into a table of path, label and probability."""
    from convline.inputs.listing import is_url
    from serving.job import Job

    if (resume or rescan) and overwrite:
        raise typer.BadParameter("--resume or --rescan and --overwrite contradict each other; give one of them")
    to_stdout = output == "-"
    job = Job(
        inputs=inputs,
        model=model,
        output=None if to_stdout or is_url(output) else Path(output),
        stdout_format="jsonl" if as_json else "csv",
        top_k=top_k,
        threshold=threshold,
        unfamiliar=unfamiliar,
        batch_size="auto" if batch_size == "auto" else _positive(batch_size, "--batch-size"),
        provider=provider,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        rescan=rescan,
        sort_into=sort_into,
        report=report,
        shard=_shard(shard),
        external=_external_model(classes, preprocess),
        csv_safe=csv_safe,
    )
    run_job = _engine(engine, address, output)
    if is_url(output):
        from serving.upload import classify_and_upload

        summary = classify_and_upload(output, job, run_job)
    else:
        summary = run_job(job)
    if not summary.tally.found and job.shard is None:
        names = ", ".join("standard input" if name == "-" else name for name in inputs[:3])
        console.log(f"warning: nothing was found in {names}{' …' if inputs[3:] else ''}: no files, or only hidden ones")
    if as_json and not to_stdout:
        print(console.as_json(summary.to_dict()))
    else:
        console.log(summary.sentence())
    if strict and summary.tally.rejected:
        raise typer.Exit(3)


@app.command()
def page(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder that is written; it must be new or empty.")],
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The npm package onnxruntime-web; default: node_modules/onnxruntime-web."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
) -> None:
    """Write a web page that classifies photographs in the visitor's browser."""
    from serving.page import DEFAULT_RUNTIME_FOLDER, write_page

    print(write_page(model, output, onnxruntime_web or DEFAULT_RUNTIME_FOLDER, overwrite))
    console.log(f"to see it: python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(output))} 8000")


@app.command()
def inspect(model: ModelArgument, as_json: Json = False) -> None:
    """Show a model's classes, graph, provenance and proof."""
    from serving.inspect import inspect as inspect_model

    _print(inspect_model(model), as_json)


@app.command()
def bench(
    model: ModelArgument,
    images: Annotated[Path | None, typer.Option(help="A folder of your images; default: generated ones.")] = None,
    provider: ProviderOption = "auto",
    as_json: Json = False,
) -> None:
    """Measure images/s of decoding, of the model and of a whole job, and name the bottleneck."""
    from serving.bench import bench as measure

    _print(measure(model, images, provider), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show providers, libraries and threads; exit 1 if something is wrong with them."""
    from serving.doctor import examine

    report = examine()
    report["providers"] = {name: problem or "ok" for name, problem in report["providers"].items()}
    _print(report, as_json)
    if report["problems"]:
        raise typer.Exit(1)


def _positive(text: str, option: str) -> int:
    """Parse a positive integer. Raises BadParameter for anything else."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{option} {text} is not a positive integer")
    return int(text)


def _shard(text: str | None) -> tuple[int, int] | None:
    """Parse I/N. Raises BadParameter for anything else."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    shard = _positive(index, "--shard"), _positive(count, "--shard")
    if not slash or shard[0] > shard[1]:
        raise typer.BadParameter(f"--shard {text} is not I/N, as in 3/16")
    return shard


def _engine(engine: Literal["local", "ray"], address: str | None, output: str) -> Callable[[Job], Summary]:
    """The function that runs a job, on this machine or on Ray."""
    if engine == "ray":
        from serving.ray_cluster import classify_on_ray

        return partial(classify_on_ray, address=address, store_name=f"{output}.shards")
    if address is not None:
        raise typer.BadParameter("--address names a Ray cluster; it needs --engine ray")
    from serving.classify import classify as classify_here

    return classify_here


def _external_model(classes: Path | None, preprocess: list[str] | None) -> ExternalModel | None:
    """The description of a model of another tool; None without --classes and --preprocess."""
    if bool(classes) != bool(preprocess):
        raise typer.BadParameter("a model of another tool needs both --classes and --preprocess (such as range=1)")
    if classes is None or preprocess is None:
        return None
    from serving.class_names import read_classes
    from serving.external_model import ExternalModel, ExternalPreprocessing

    return ExternalModel(read_classes(classes), ExternalPreprocessing.parse(preprocess), classes)


def _print(report: dict[str, Any], as_json: bool) -> None:
    """Print a nested report as JSON, or as one indented line per value."""
    if as_json:
        print(console.as_json(report, indent=2))
        return
    print("\n".join(_lines(report)))


def _lines(content: dict[str, Any], depth: int = 0) -> Iterator[str]:
    for name, value in content.items():
        indented = f"{'  ' * depth}{_text(name)}"
        if isinstance(value, dict) and value:
            yield indented
            yield from _lines(value, depth + 1)
        else:
            yield f"{indented:26}{_text(value)}".rstrip()


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{_text(name)} {_text(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def run() -> None:
    """Run the command line. Raises SystemExit with its status."""
    console.main(app)


def main() -> None:
    """The console script `serving`."""
    with console.exiting_at_once():
        run()

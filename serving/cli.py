"""The command line of serving: a few lines a command, heavy imports inside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convline import console

if TYPE_CHECKING:
    from serving.external_model import ExternalModel

app = typer.Typer(
    help="Classify folders of images with an exported model. Runs without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="An ONNX file made by `pipeline export`, or models:/NAME@champion.")]
ProviderOption = Annotated[
    Literal["auto", "cpu", "cuda", "tensorrt"], typer.Option(help="One that was asked for must load.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """`--debug` is taken out of the arguments by `console.main`; here it is only documented."""


@app.command()
def classify(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images, folders, globs, archives, @LIST, - or URLs.")
    ],
    model: Annotated[str, typer.Option(help="The ONNX file, models:/NAME@champion or models:/NAME/3.")],
    output: Annotated[str, typer.Option(help="A .csv, .jsonl or .parquet file; - is stdout.")] = "-",
    top_k: Annotated[int, typer.Option(min=1, help="Classes a row, most probable first.")] = 1,
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Images a batch; auto measures which is enough.")
    ] = "64",
    provider: ProviderOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPUs to use; default: all usable ones.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a job that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    rescan: Annotated[
        bool, typer.Option("--rescan", help="Continue though the input changed, keeping what is still valid.")
    ] = False,
    sort_into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Link each image into a folder of its label.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="A page to look at: images by class and confidence.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only part I, from 1, of N of the listing.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="ray: shards of the job on a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default: one started here.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names of a model made elsewhere: a line each, or a JSON list.")
    ] = None,
    preprocess: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="How it takes pixels, and what it gives: size, resize, range, mean, std, output, scores, …",
        ),
    ] = None,
    csv_safe: Annotated[
        bool, typer.Option("--csv-safe", help="Put a ' before what spreadsheets would run as a formula.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 if a file was rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Summary (or rows, on stdout) as JSON.")] = False,
) -> None:
    """Classify every image of the inputs into a table of path, label and probability."""
    from convline.inputs.listing import is_url
    from serving.classify import classify as run_job
    from serving.job import Job

    if (resume or rescan) and overwrite:
        raise typer.BadParameter("--resume and --overwrite contradict each other; give one of them")
    to_stdout = output == "-"
    job = Job(
        inputs=inputs,
        model=model,
        output=None if to_stdout or is_url(output) else Path(output),
        stdout_format="jsonl" if as_json else "csv",
        top_k=top_k,
        batch_size="auto" if batch_size == "auto" else _whole(batch_size, "--batch-size"),
        provider=provider,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        rescan=rescan,
        sort_into=sort_into,
        report=report,
        shard=_shard(shard),
        external=_external(classes, preprocess),
        csv_safe=csv_safe,
    )
    if address is not None and engine != "ray":
        raise typer.BadParameter("--address is of a Ray cluster; it needs --engine ray")
    if engine == "ray":
        from serving.ray_cluster import classify_on_ray

        run_job = partial(classify_on_ray, address=address, shelf_name=f"{output}.shards")
    if is_url(output):
        from serving.upload import deliver

        summary = deliver(output, job, run_job)
    else:
        summary = run_job(job)
    if not summary.tally.found and job.shard is None:
        named = ", ".join("standard input" if name == "-" else name for name in inputs[:3])
        console.log(f"warning: nothing was found in {named}{' …' if inputs[3:] else ''}: no files, or only hidden ones")
    if as_json and not to_stdout:
        print(console.as_json(summary.to_dict()))
    else:
        console.log(summary.sentence())
    if strict and summary.tally.rejected:
        raise typer.Exit(3)


@app.command()
def inspect(model: ModelArgument, as_json: Json = False) -> None:
    """Show a model's classes, graph, provenance and proof."""
    from serving.inspect import inspect as examine_model

    _print(examine_model(model), as_json)


@app.command()
def bench(
    model: ModelArgument,
    images: Annotated[Path | None, typer.Option(help="A folder of images such as yours; default: made ones.")] = None,
    provider: ProviderOption = "auto",
    as_json: Json = False,
) -> None:
    """Measure images/s of decoding, of the model and of a whole job, and say what bounds it."""
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


def _whole(text: str, option: str) -> int:
    """A count given as an option. Raises BadParameter for anything else."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{option} {text} is not a whole number from 1")
    return int(text)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, parts = text.partition("/")
    part = _whole(index, "--shard"), _whole(parts, "--shard")
    if not slash or part[0] > part[1]:
        raise typer.BadParameter(f"--shard {text} is not I/N, as in 3/16")
    return part


def _external(classes: Path | None, preprocess: list[str] | None) -> ExternalModel | None:
    """What the user says of a model made elsewhere."""
    if bool(classes) != bool(preprocess):
        raise typer.BadParameter("a model made elsewhere needs both, --classes and --preprocess (as in range=1)")
    if classes is None or preprocess is None:
        return None
    from serving.class_names import read_classes
    from serving.external_model import ExternalModel, Preprocessing

    return ExternalModel(read_classes(classes), Preprocessing.parse(preprocess), classes)


def _print(report: dict[str, Any], as_json: bool) -> None:
    """A nested report: JSON, or one indented line a value."""
    if as_json:
        print(console.as_json(report, indent=2))
        return
    print("\n".join(_lines(report)))


def _lines(content: dict[str, Any], depth: int = 0) -> Iterator[str]:
    for name, value in content.items():
        told = f"{'  ' * depth}{_text(name)}"
        if isinstance(value, dict) and value:
            yield told
            yield from _lines(value, depth + 1)
        else:
            yield f"{told:26}{_text(value)}".rstrip()


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
    """The console script `serving`."""
    console.main(app)

"""The command line of serving: a few lines a command, heavy imports inside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serving import console

if TYPE_CHECKING:
    from serving.foreign import Foreign

app = typer.Typer(
    help="Classify folders of images with an exported model. Runs without torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="An ONNX file made by `pipeline export`, or models:/NAME@champion.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """`--debug` is taken out of the arguments by `console.main`; here it is only documented."""


@app.command()
def classify(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Images, folders or archives of images.")],
    model: Annotated[str, typer.Option(help="The ONNX file, models:/NAME@champion or models:/NAME/3.")],
    output: Annotated[str, typer.Option(help="A .csv or .jsonl file; - is stdout.")] = "-",
    top_k: Annotated[int, typer.Option(min=1, help="Classes a row, most probable first.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 64,
    provider: Annotated[
        Literal["auto", "cpu", "cuda", "tensorrt"], typer.Option(help="One that was asked for must load.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the model; default: all usable CPUs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a job that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    classes: Annotated[
        Path | None, typer.Option(help="Class names of a model made elsewhere: a line each, or a JSON list.")
    ] = None,
    preprocess: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="How it takes pixels: size, layout, range, mean, std, color, fit, …"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 if a file was rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Summary (or rows, on stdout) as JSON.")] = False,
) -> None:
    """Classify every image of the inputs into a table of path, label and probability."""
    from serving.classify import Job
    from serving.classify import classify as run_job

    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite contradict each other; give one of them")
    to_stdout = output == "-"
    job = Job(
        inputs=inputs,
        model=model,
        output=None if to_stdout else Path(output),
        stdout_format="jsonl" if as_json else "csv",
        top_k=top_k,
        batch_size=batch_size,
        provider=provider,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        foreign=_foreign(classes, preprocess),
    )
    summary = run_job(job)
    if as_json and not to_stdout:
        print(json.dumps(summary.to_dict()))
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
def doctor(as_json: Json = False) -> None:
    """Show providers, libraries and threads; exit 1 if something is wrong with them."""
    from serving.doctor import examine

    report = examine()
    report["providers"] = {name: problem or "ok" for name, problem in report["providers"].items()}
    _print(report, as_json)
    if report["problems"]:
        raise typer.Exit(1)


def _foreign(classes: Path | None, preprocess: list[str] | None) -> Foreign | None:
    """What the user says of a model made elsewhere."""
    if bool(classes) != bool(preprocess):
        raise typer.BadParameter("a model made elsewhere needs both, --classes and --preprocess (as in range=1)")
    if classes is None or preprocess is None:
        return None
    from serving.foreign import Foreign, Preprocessing, read_classes

    return Foreign(read_classes(classes), Preprocessing.parse(preprocess))


def _print(report: dict[str, Any], as_json: bool) -> None:
    """A nested report: JSON, or one indented line a value."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for section, content in report.items():
        if not isinstance(content, dict):
            print(f"{section:12}{_text(content)}")
            continue
        print(section)
        for name, value in content.items():
            print(f"  {_text(name):24}{_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{_text(name)} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def run() -> None:
    """The console script `serving`."""
    console.main(app)

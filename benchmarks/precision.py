"""What float16 and int8 cost and gain: every run of a folder exported in each precision, proven, and measured.

    python benchmarks/precision.py --runs-dir reproduction/runs --data-dir reproduction/data

The figures are those of the reports that `pipeline export` writes; both files and PyTorch run in turns. Results go to
benchmarks/results/precision.json, and from there the table of docs/export.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import hardware, versions
from reproduce import PLAN, ROOT

from convline.cpus import usable_cpus
from convline.errors import ConvlineError
from convline.files import atomic_write
from pipeline.export import ExportOptions, export
from pipeline.exporting.tolerances import PRECISIONS
from pipeline.run import Run

RESULT = ROOT / "benchmarks/results/precision.json"
PAGE = ROOT / "docs/export.md"
BEGIN, END = "<!-- written by benchmarks/precision.py -->", "<!-- end -->"


def main(
    runs_dir: Annotated[Path, typer.Option(help="Where runs are.")] = Path("reproduction/runs"),
    data_dir: Annotated[Path, typer.Option(help="Where datasets are.")] = Path("reproduction/data"),
) -> None:
    reports: dict[str, Any] = {}
    first = {planned.recipe: planned.run for planned in reversed(PLAN)}
    for recipe, name in reversed(first.items()):
        if (runs_dir / name).exists():
            reports[recipe] = {precision: measure(runs_dir / name, data_dir, precision) for precision in PRECISIONS}
            print(*rows(recipe, reports[recipe]), sep="\n", flush=True)
    told = f"{hardware(usable_cpus())}; {versions('onnxruntime-gpu', 'onnxruntime', 'torch', 'convline')}"
    with atomic_write(RESULT, "w") as file:
        json.dump({"machine": told, "recipes": reports}, file, indent=2)
    write_page(told, reports)


def measure(folder: Path, data_dir: Path, precision: Any) -> dict[str, Any]:
    """The report of an export, or why there is none."""
    run = Run.open(folder)
    with tempfile.TemporaryDirectory() as there:
        try:
            report = export(run, run.dataset(data_dir), Path(there, "model.onnx"), ExportOptions(precision)).report
        except ConvlineError as error:
            return {"refused": str(error)}
    del report["differing"]
    return report


def rows(recipe: str, reports: dict[str, Any]) -> list[str]:
    """A line of the table for each precision."""
    lines = []
    for precision, report in reports.items():
        if "refused" in report:
            lines.append(f"| `{recipe}` | {precision} | refused | | | | | |")
            continue
        size, rates = report["size"], report["speed"]["images_per_second"]
        cells = [
            f"`{recipe}`",
            precision,
            f"{size['bytes'] / 1000:,.0f} kB",
            f"{size['bytes'] / reports['fp32']['size']['bytes']:.0%}",
            f"{report['precision_at_1']['onnx']:.2%}",
            f"{report['top1_differences']}",
            f"{report['probability_difference']['largest']:.1e}",
            f"{rates[precision]:,.0f}",
            f"{rates[precision] / rates['fp32']:.2f}x",
            f"{rates[precision] / rates['PyTorch']:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_page(machine: str, reports: dict[str, Any]) -> None:
    """The table of docs/export.md, between its marks."""
    header = [
        "| recipe | precision | size | of fp32 | precision @ 1 | top-1 that differ | largest Δprobability | images/s "
        "| against fp32 | against PyTorch |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    table = [*header, *(row for recipe, report in reports.items() for row in rows(recipe, report)), "", f"{machine}."]
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    with atomic_write(PAGE, "w", encoding="utf-8") as file:
        file.write("\n".join([before + BEGIN, "", *table, "", END + rest.partition(END)[2]]))


if __name__ == "__main__":
    typer.run(main)

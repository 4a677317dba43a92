"""How the project behaves with a million files: time, memory, sizes, and what an interruption costs.

    python benchmarks/scale.py classify --images DIR --model MODEL.onnx [--files 1000000] [--format csv]
        [--parts job,resume,ray,rescan] [--folder scale]
    python benchmarks/scale.py prepare --images DIR [--files 200000] [--parts prepare,check,quick] [--folder scale]

Both work in `--folder`, and keep there what each part gave: so the parts can be measured in several goes. Remove the
folder at the end.

classify: the files are hard links to the first 10,000 JPEGs below DIR, 1,000 in a folder. So their contents are in the
memory of the system: what is measured is this project, not the disk.
    job      a whole `serving classify`
    resume   the same, killed (SIGKILL, all its processes) when half of the journal is written, then --resume
    ray      the same with --engine ray, on the Ray that it starts here: one worker a CPU (`taskset -c 0,1` gives two)
    rescan   --rescan of the finished job, with nothing changed, then with 1,000 files replaced
prepare: DIR (or an archive) has train/<class>/… and test/<class>/…. Its images, and all of them mirrored, turned by 90
degrees and so on, are so many different JPEGs.
    prepare  `pipeline preprocess`
    check    `pipeline check`, which judges labels with a pretrained network
    quick    `pipeline check --quick`: copies and near duplicates alone
Memory: the sum, over all processes of the command, of what each holds for itself and its part of what is shared (PSS),
once a second. "at 10%" is when that part of the journal was written; "most" is the largest sum until the command ended.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from image_folders import pipeline
from machine import hardware, versions
from many_files import LinkedFiles, different_images
from prepare import prepare as measure_preparation
from watched_process import Course, watch

from convline.cpus import usable_cpus
from convline.files import atomic_write, sha256
from serving.output_files import finished_journal_path, partial_path, rejects_path, shards_path
from serving.tables import FORMATS

REPLACED = 1000
PERCENTS = (10, 50, 95)  # of the journal; at its very end it may be renamed before the next look at the memory
Fields = dict[str, Any]

app = typer.Typer(add_completion=False)


class Results:
    """What the parts gave, in a JSON file that outlives this process."""

    def __init__(self, path: Path, settings: Fields) -> None:
        self._path = path
        self._all: Fields = json.loads(path.read_text()) if path.exists() else {"settings": settings, "parts": {}}
        if self._all["settings"] != settings:
            raise SystemExit(f"{path} is of {self._all['settings']}, not of {settings}: give another --folder")
        self.parts: dict[str, Fields] = self._all["parts"]

    def add(self, name: str, part: Fields) -> None:
        measured_on = f"{hardware(usable_cpus())}; {versions('onnxruntime-gpu', 'onnxruntime', 'ray', 'convline')}"
        self.parts[name] = part | {"measured_on": measured_on}
        with atomic_write(self._path, "w") as file:
            json.dump(self._all, file, indent=1)

    def need(self, name: str) -> Fields:
        if name not in self.parts:
            raise SystemExit(f"the part {name} has not been measured in {self._path.parent}: begin with it")
        return self.parts[name]

    def print_machines(self) -> None:
        print("\n".join(sorted({part["measured_on"] for part in self.parts.values()})))


class Classification:
    """The parts of `classify`; each returns what it measured. Tables are in `folder`, named after their parts."""

    def __init__(self, folder: Path, model: Path, files: LinkedFiles, format: str, results: Results) -> None:
        self._folder, self._model, self._files, self._results = folder, model, files, results
        self._ending = format

    def _table(self, part: str) -> Path:
        return self._folder / f"{part}.{self._ending}"

    def _watch(
        self, output: Path, *options: str, done: Callable[[], int] | None = None, kill_at: int | None = None
    ) -> Course:
        words = ("classify", self._files.folder.name, "--model", self._model, "--output", output.name, "--json")
        done = done or (lambda: size_of(partial_path(output)))
        return watch(self._folder, done, "-m", "serving", *words, *options, kill_at=kill_at)

    def job(self) -> Fields:
        output = self._table("job")
        course = self._watch(output, "--overwrite")
        journal = finished_journal_path(output)
        with journal.open("rb") as file:
            *_, footer = file
        rows = size_of(journal) - len(footer)
        return {
            **self._described(course, output, rows),
            "journal_without_footer": rows,
            "journal": size_of(journal),
            "table": size_of(output),
            "rejects": size_of(rejects_path(output)),
            "after_the_last_file": course.seconds - course.reached(rows),
        }

    def resume(self) -> Fields:
        whole, output = self._results.need("job"), self._table("resume")
        rows = whole["journal_without_footer"]
        killed = self._watch(output, "--overwrite", kill_at=rows // 2)
        with partial_path(output).open("rb") as file:
            left = sum(1 for _ in file) - 1
        course = self._watch(output, "--resume")
        return {
            **self._described(course, output, rows, begun=killed.most_done),
            "files": self._files.count - json.loads(course.printed)["resumed"],
            "seconds_until_killed": killed.seconds,
            "left": left,
            "resumed": json.loads(course.printed)["resumed"],
            "first_new_row": course.first_growth(),
            "is_same_table": sha256(output) == whole["sha256"],
        }

    def ray(self) -> Fields:
        whole, output = self._results.need("job"), self._table("ray")
        course = self._watch(output, "--engine", "ray", "--overwrite", done=lambda: size_below(shards_path(output)))
        return {
            **self._described(course, output, course.most_done),
            "after_the_last_file": course.seconds - course.reached(course.most_done),
            "is_same_table": sha256(output) == whole["sha256"],
        }

    def rescan(self) -> Fields:
        whole, output = self._results.need("job"), self._table("rescan")
        for name in (lambda table: table, rejects_path, finished_journal_path):
            shutil.copyfile(name(self._table("job")), name(output))
        unchanged = self._watch(output, "--rescan")
        with self._files.replaced(REPLACED):
            replaced = self._watch(output, "--rescan")
        counts = [json.loads(course.printed)["rescan"] for course in (unchanged, replaced)]
        described = [self._described(course, output, course.most_done) for course in (unchanged, replaced)]
        assert counts[0]["kept"] == self._files.count, counts
        assert counts[1]["classified_again"] == REPLACED, counts
        return {"unchanged": described[0], "replaced": described[1], "journal": whole["journal"]}

    def _described(self, course: Course, output: Path, rows: int, begun: int = 0) -> Fields:
        return {
            "files": self._files.count,
            "seconds": course.seconds,
            "memory": [
                course.memory_at(rows * percent // 100) for percent in PERCENTS if rows * percent // 100 > begun
            ],
            "most": max(sample.total for sample in course.memory),
            "largest": max(sample.largest for sample in course.memory),
            "sha256": sha256(output),
        }


@app.command()
def classify(
    images: Annotated[Path, typer.Option(help="A folder of JPEGs.")],
    model: Annotated[Path, typer.Option(help="An exported model.")],
    files: Annotated[int, typer.Option(min=REPLACED)] = 1_000_000,
    parts: str = "job,resume,ray,rescan",
    format: str = "csv",
    folder: Path = Path("scale"),
) -> None:
    if f".{format}" not in FORMATS:
        raise typer.BadParameter(f"a table is {', '.join(FORMATS)}", param_hint="--format")
    folder, model = folder.resolve() / f"classify-{format}", model.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json", {"files": files, "model": sha256(model)})
    linked = LinkedFiles(folder, images, files)
    measure = Classification(folder, model, linked, format, results)
    run_parts(parts, {name: getattr(measure, name) for name in ("job", "resume", "ray", "rescan")}, results)
    results.print_machines()
    average = sum(map(size_of, linked.originals)) / len(linked.originals)
    print(f"{files:,} files, links to {len(linked.originals):,} JPEGs of {average:,.0f} bytes; table: {format}\n")
    print_courses(results.parts)
    print_details(results.parts)


@app.command()
def prepare(
    images: Annotated[Path, typer.Option(help="A folder or an archive of JPEGs.")],
    files: Annotated[int, typer.Option(min=1)] = 200_000,
    parts: str = "prepare,check,quick",
    size: Annotated[int, typer.Option(help="Images are stored at this size.")] = 32,
    folder: Path = Path("scale"),
) -> None:
    folder = folder.resolve() / "prepare"
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json", {"files": files, "size": size})
    source = different_images(folder, images, files)
    name = f"prepared-{files}"  # as measure_preparation calls the dataset

    def preparation() -> Fields:
        return vars(measure_preparation(folder, source, files, size))

    def check(*options: str) -> Fields:
        results.need("prepare")
        checked = pipeline(folder, "check", name, "--json", *options)
        found = json.loads(checked.output)
        return {"seconds": checked.seconds, "memory": checked.memory, "images": found["images"]} | {
            kind: len(found[kind] or ()) for kind in ("pairs", "doubtful_labels")
        }

    run_parts(parts, {"prepare": preparation, "check": check, "quick": lambda: check("--quick")}, results)
    results.print_machines()
    print_preparation(results.parts, files, size)


def run_parts(names: str, known: dict[str, Callable[[], Fields]], results: Results) -> None:
    chosen = [name for name in names.split(",") if name]
    if unknown := set(chosen) - known.keys():
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}", param_hint="--parts")
    for name in chosen:
        results.add(name, known[name]())


def print_courses(parts: dict[str, Fields]) -> None:
    courses = {
        "one job": parts.get("job"),
        "--resume after the kill": parts.get("resume"),
        "--engine ray": parts.get("ray"),
        "--rescan, nothing changed": parts.get("rescan", {}).get("unchanged"),
        f"--rescan, {REPLACED:,} replaced": parts.get("rescan", {}).get("replaced"),
    }
    print(f"{'':47}{'memory, MB':>12}{'':24}{'largest':>9}")
    print(f"{'':29}{'seconds':>9}{'files/s':>9}{'at 10%':>12}{'50%':>8}{'95%':>8}{'most':>8}{'process':>9}")
    for name, course in courses.items():
        if course is not None:
            speed = course["files"] / course["seconds"]
            held = "".join(f"{size / 1e6:8,.0f}" for size in (*course["memory"], course["most"]))
            largest = course["largest"] / 1e6
            print(f"{name:29}{course['seconds']:9,.1f}{speed:9,.0f}{held:>36}{largest:9,.0f}")


def print_details(parts: dict[str, Fields]) -> None:
    if job := parts.get("job"):
        sizes = ", ".join(
            f"{name} {job[key] / 1e6:,.1f} MB ({job[key] / job['files']:.0f} bytes a file)"
            for name, key in (("journal", "journal"), ("table", "table"), ("rejects", "rejects"))
        )
        print(f"\none job: {sizes}; the table was complete {job['after_the_last_file']:.1f} s after the last file")
    if resume := parts.get("resume"):
        print(
            f"killed after {resume['seconds_until_killed']:.1f} s with {resume['left']:,} files in the journal; "
            f"--resume kept {resume['resumed']:,}, and wrote the first new one after {resume['first_new_row']:.1f} s; "
            f"{same_table(resume)}"
        )
    if ray := parts.get("ray"):
        print(f"ray: complete {ray['after_the_last_file']:.1f} s after the last file; {same_table(ray)}")


def same_table(part: Fields) -> str:
    return "the table has the bytes of that of the whole job" if part["is_same_table"] else "ANOTHER TABLE"


def print_preparation(parts: dict[str, Fields], files: int, size: int) -> None:
    if part := parts.get("prepare"):
        pixels = 3 * size**2 * files
        print(
            f"{files:,} images at {size}x{size}: {part['seconds']:.1f} s, {files / part['seconds']:,.0f} images/s, "
            f"memory {part['memory'] / 1e6:,.0f} MB, dataset {part['finished'] / 1e6:,.0f} MB, disk at most "
            f"{part['disk'] / 1e6:,.0f} MB: {part['disk'] / pixels:.2f} times the pixels"
        )
    for name, command in (("check", "pipeline check"), ("quick", "pipeline check --quick")):
        if part := parts.get(name):
            print(
                f"{command}: {part['seconds']:.1f} s, memory {part['memory'] / 1e6:,.0f} MB, "
                f"{part['images']:,} images, {part['pairs']:,} pairs, {part['doubtful_labels']:,} doubtful labels"
            )


def size_of(path: Path) -> int:
    """In bytes; 0 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def size_below(folder: Path) -> int:
    """Of the journals in a folder, in bytes."""
    try:
        return sum(size_of(path) for path in folder.iterdir() if path.suffix in (".jsonl", ".partial"))
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    app()

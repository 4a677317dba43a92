"""`--rescan` of a finished job: its table becomes, byte for byte, that of a fresh job over the files of now."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from _pytest.mark import ParameterSet

from convline.errors import ConvlineError
from convline.inputs.input_file import InputFile
from serving.classify import classify
from serving.job import Job
from serving.summary import RescanCounts, Summary
from serving.upload import classify_and_upload
from tests.conftest import Cli
from tests.pages import check
from tests.serving.helpers import csv_rows, encode, interrupted, json_lines, noise, resealed, write

COUNT = 30
BATCH = 4


def rest(*values: str) -> list[ParameterSet]:
    """Parameters for `make test-all`."""
    return [pytest.param(value, marks=pytest.mark.all) for value in values]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with thirty files in three folders, three of them unusable; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    for number in range(COUNT):
        write(tmp_path / f"in/{number % 3}/{number:02}.png", png() if number % 10 else b"garbage")
    return tmp_path / "in"


@pytest.fixture
def job(images: Path, model: Path) -> Job:
    return Job([images.name], model, Path("out.csv"), batch_size=BATCH, provider="cpu", threads=1)


def png() -> bytes:
    return encode(noise(8, 8), "PNG")


def rescan(job: Job) -> Summary:
    return classify(replace(job, rescan=True))


def outputs(job: Job) -> tuple[bytes, bytes]:
    assert job.output is not None
    return job.output.read_bytes(), Path(f"{job.output}.rejects.jsonl").read_bytes()


def fresh(job: Job, **changes: object) -> tuple[bytes, bytes]:
    """The outputs of a job that begins now."""
    assert job.output is not None
    new = replace(job, output=job.output.with_stem("fresh"), overwrite=True, **changes)  # type: ignore[arg-type]
    classify(new)
    return outputs(new)


def written() -> dict[str, tuple[int, int, bytes]]:
    """What is beside the table of a job, with its inode, time and content."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in Path().glob("out.csv*")
    }


def change(images: Path) -> RescanCounts:
    """Add, change, break, mend, touch, rename and delete files; returns what a rescan must count."""
    write(images / "0/00a.png", png())
    write(images / "new/new.png", png())
    write(images / "1/01.png", png())
    write(images / "1/04.png", b"garbage")
    write(images / "1/10.png", png())  # which was garbage
    touched(images / "1/13.png")
    (images / "1/16.png").rename(images / "2/16.png")
    (images / "2/02.png").unlink()
    return RescanCounts(kept=COUNT - 6, classified_again=4, new=3, vanished=2)


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


# --- the same bytes as a fresh job


@pytest.mark.parametrize("ending", ["csv", *rest("jsonl", "parquet")])
def test_a_table_is_brought_up_to_date(job: Job, images: Path, ending: str) -> None:
    job = replace(job, output=Path(f"out.{ending}"), top_k=2, threshold=0.5)
    classify(job)
    counts = change(images)
    summary = rescan(job)
    assert (summary.rescan, summary.resumed) == (counts, counts.kept)
    assert outputs(job) == fresh(job)
    assert sorted(path.name for path in Path().glob("out.*")) == [
        f"out.{ending}",
        f"out.{ending}.journal",
        f"out.{ending}.rejects.jsonl",
    ]


def test_any_changes_in_any_order_give_the_table_of_a_fresh_job(
    job: Job, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = random.Random(7)
    job = replace(job, batch_size=1)  # a rescan has as many batches as files to classify
    classify(job)
    for _ in range(4):
        for _ in range(choices.randrange(1, 8)):
            change_at_random(images, choices)
        if choices.random() < 0.5:
            for number in range(2):
                write(images / f"{number}/new.png", png())
            interrupted(replace(job, rescan=True), monkeypatch, after=choices.randrange(2))
            change_at_random(images, choices)
        summary = classify(
            replace(job, rescan=choices.random() < 0.5 or not Path("out.csv.partial").exists(), resume=True)
        )
        assert summary.rescan is not None
        assert summary.rescan.kept + summary.rescan.classified_again + summary.rescan.new == summary.tally.found
        assert outputs(job) == fresh(job)


def change_at_random(images: Path, choices: random.Random) -> None:
    files = sorted(path for path in images.rglob("*") if path.is_file())
    path, new = choices.choice(files), images / f"{choices.randrange(4)}/{choices.randrange(99):02}.png"
    action = choices.choice(["write", "write", "break", "delete", "rename", "touch", "swap"])
    if action == "write":
        write(choices.choice([path, new]), png())
    elif action == "break":
        write(path, b"garbage")
    elif action == "delete":
        path.unlink()
    elif action == "rename" and path != new:
        new.parent.mkdir(exist_ok=True)
        path.replace(new)
    elif action == "touch":
        touched(path)
    else:  # two files change places: their names stay
        path.rename("aside")
        files[0].replace(path) if files[0] != path else None
        Path("aside").rename(files[0])


def test_an_archive_and_a_list_are_brought_up_to_date(job: Job, images: Path) -> None:
    Path("list").write_text("in.zip\nin.tar.gz\nin/0/03.png\nin/0/03.png\n")
    for kind in ("zip", "gztar"):
        shutil.make_archive("in", kind, images)
    zipped, listed = replace(job, inputs=["in.zip"]), replace(job, inputs=["@list"], output=Path("listed.csv"))
    for each in (zipped, listed):
        classify(each)
    counts = change(images)
    for kind in ("zip", "gztar"):
        shutil.make_archive("in", kind, images)
    assert rescan(zipped).rescan == RescanCounts(counts.kept + 1, 3, 3, 2)  # to a zip, the touched file is the same
    Path("list").write_text("in.zip\nin/1/01.png\nin.tar.gz\nin/0/03.png\nin/0/03.png\nin/nothing\n")
    assert rescan(listed).rescan == RescanCounts(2 * (counts.kept + 1) + 2, 2 * 3, 2 * 3 + 2, 2 * 2)
    for each in (zipped, listed):
        assert outputs(each) == fresh(each)
    assert rescan(listed).rescan == RescanCounts(2 * (COUNT + 1) + 3, 1, 0, 0)  # the missing file is tried again


@pytest.mark.all
def test_a_shard_takes_up_files_that_moved_into_it(job: Job, images: Path) -> None:
    shards = [replace(job, output=Path(f"out.{index}.csv"), shard=(index, 3)) for index in (1, 2, 3)]
    for shard in shards:
        classify(shard)
    change(images)
    whole = fresh(job)
    header = whole[0].splitlines(keepends=True)[0]
    for shard in shards:
        rescan(shard)
    tables, rejects = zip(*map(outputs, shards), strict=True)
    assert header + b"".join(table.removeprefix(header) for table in tables) == whole[0]
    assert b"".join(rejects) == whole[1]
    for shard in shards:
        assert classify(replace(shard, rescan=True)).rescan == RescanCounts(
            classify(replace(shard, resume=True)).resumed, 0, 0, 0
        )


@pytest.mark.all
def test_the_batch_size_that_auto_chose_is_kept(job: Job, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = replace(job, batch_size="auto")
    monkeypatch.setattr("serving.classify.fastest_batch_size", lambda _: 4)
    classify(auto)
    change(images)
    monkeypatch.setattr("serving.classify.fastest_batch_size", lambda _: 16)
    rescan(auto)
    assert json_lines(Path("out.csv.journal"))[0]["batch_size"] == 4
    assert outputs(auto) == fresh(job)


def test_a_file_that_was_written_while_the_job_ran_is_classified_again(
    job: Job, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, later = InputFile.record_version, images / "1/13.png"

    def record_version(file: InputFile) -> None:
        real(file)
        if file.path == "1/13.png":
            write(later, png())
            touched(later)  # as the clock of a file system may have stood still

    with monkeypatch.context() as patch:
        patch.setattr(InputFile, "record_version", record_version)
        classify(job)
    assert rescan(job).rescan == RescanCounts(COUNT - 1, 1, 0, 0)
    assert outputs(job) == fresh(job)


@pytest.mark.all
def test_a_folder_that_becomes_empty_and_full_again(job: Job, images: Path) -> None:
    classify(job)
    whole = outputs(job)
    images.rename("aside")
    images.mkdir()
    assert rescan(job).rescan == RescanCounts(0, 0, 0, COUNT)
    assert outputs(job) == (b"path,label,probability\n", b"")
    images.rmdir()
    Path("aside").rename(images)
    assert rescan(job).rescan == RescanCounts(0, 0, COUNT, 0)
    assert outputs(job) == whole


@pytest.mark.all
def test_an_output_inside_of_its_input_is_no_file_of_it(job: Job, images: Path) -> None:
    inside = replace(job, output=images / "out.csv")
    classify(inside)
    write(images / "0/00a.png", png())
    assert rescan(inside).tally.found == COUNT + 1
    assert rescan(inside).rescan == RescanCounts(COUNT + 1, 0, 0, 0)


# --- nothing is done twice, or without need


def test_where_nothing_changed_nothing_is_written(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    classify(job)
    before = written()
    for _ in range(2):
        summary = rescan(job)
        assert summary.rescan == RescanCounts(COUNT, 0, 0, 0)
        assert "out.csv is up to date; it was not written again" in capfd.readouterr().err
    after = written()
    assert {name: after[name] for name in ("out.csv", "out.csv.rejects.jsonl")} == {
        name: before[name] for name in ("out.csv", "out.csv.rejects.jsonl")
    }
    assert after["out.csv.journal"][2] == before["out.csv.journal"][2] and list(after) == list(before)


def test_the_command_says_what_was_kept(job: Job, images: Path, cli: Cli) -> None:
    arguments = ("serving", "classify", "in", "--model", job.model, "--output", "out.csv", "--rescan")
    assert "kept" not in cli(*arguments).stderr  # there is no table yet
    change(images)
    assert "; kept 24, classified 4 again, 3 new, 2 vanished; " in cli(*arguments).stderr
    assert json.loads(cli(*arguments, "--json").stdout)["rescan"] == {
        "kept": COUNT + 1,
        "classified_again": 0,
        "new": 0,
        "vanished": 0,
    }
    assert "--rescan" in cli(*arguments, "--overwrite", status=2).stderr


# --- what is refused, and leaves everything as it was


@pytest.mark.parametrize("setting", ["model", *rest("top_k", "threshold", "batch_size", "inputs", "csv_safe")])
def test_other_settings_are_refused(job: Job, images: Path, setting: str) -> None:
    def another_run(proto: object) -> None:
        run = next(entry for entry in proto.metadata_props if entry.key == "convline.run")  # type: ignore[attr-defined]
        run.value = run.value.replace('"seed": 0', '"seed": 1')

    classify(job)
    change(images)
    before = written()
    other: dict[str, object] = {
        "model": resealed(Path(job.model), Path("other.onnx"), another_run),
        "top_k": 2,
        "threshold": 0.5,
        "batch_size": 8,
        "inputs": ["in/0"],
        "csv_safe": True,
    }
    with pytest.raises(ConvlineError, match=rf"out\.csv was started with different settings: {setting};.*--overwrite"):
        rescan(replace(job, **{setting: other[setting]}))  # type: ignore[arg-type]
    assert written() == before
    rescan(job)
    assert outputs(job) == fresh(job)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda: Path("out.csv.journal").unlink(),
            r"out\.csv has no journal out\.csv\.journal,.*once with --overwrite",
        ),
        (lambda: Path("out.csv").write_text("path,label\n"), r"are not those that out\.csv\.journal was written with"),
        pytest.param(
            lambda: Path("out.csv.rejects.jsonl").unlink(), "or its rejects are not those", marks=pytest.mark.all
        ),
        pytest.param(lambda: cut(Path("out.csv.journal"), 7), r"out\.csv\.journal is damaged", marks=pytest.mark.all),
    ],
    ids=["table of an earlier version", "table of another program", "rejects gone", "journal cut"],
)
def test_a_journal_is_not_taken_for_that_of_another_table(
    job: Job, images: Path, spoil: Callable[[], object], says: str
) -> None:
    classify(job)
    spoil()
    before = written()
    with pytest.raises(ConvlineError, match=says):
        rescan(job)
    assert written() == before
    classify(replace(job, overwrite=True))
    change(images)
    rescan(job)
    assert outputs(job) == fresh(job)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.all
def test_a_table_of_an_earlier_version_is_resumed_as_before(job: Job, images: Path) -> None:
    tally = classify(job).tally
    Path("out.csv.journal").unlink()
    assert classify(replace(job, resume=True)).tally == tally
    write(images / "0/00a.png", png())
    with pytest.raises(ConvlineError, match="belongs to other files; choose another name, or replace it"):
        classify(replace(job, resume=True))


def test_resume_of_a_finished_job_names_rescan(job: Job, images: Path) -> None:
    classify(job)
    write(images / "0/00a.png", png())
    before = written()
    with pytest.raises(ConvlineError, match="belongs to other files; bring it up to date with --rescan, or replace it"):
        classify(replace(job, resume=True))
    assert written() == before


@pytest.mark.parametrize("option", ["rescan", *rest("resume", "threads")])
def test_a_table_that_was_deleted_is_made_anew(job: Job, option: str) -> None:
    classify(job)
    whole = outputs(job)
    Path("out.csv").unlink()
    options: dict[str, Any] = {option: True}
    other = replace(job, top_k=2, **options)  # with settings that the old journal does not have
    assert classify(other).rescan is None
    assert outputs(other) == fresh(other) != whole


@pytest.mark.all
def test_a_table_moves_with_the_files_beside_it(job: Job, images: Path) -> None:
    classify(job)
    change(images)
    for path in Path().glob("out.csv*"):
        shutil.copyfile(path, path.name.replace("out", "moved"))
    moved = replace(job, output=Path("moved.csv"))
    assert rescan(moved).rescan
    assert outputs(moved) == fresh(job)


@pytest.mark.all
def test_overwrite_of_a_rescan_forgets_it(job: Job, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classify(job)
    change(images)
    interrupted(replace(job, rescan=True), monkeypatch, after=1)
    other = replace(job, top_k=2)
    interrupted(replace(other, overwrite=True), monkeypatch, after=2)
    assert classify(replace(other, resume=True)).rescan is None
    assert outputs(other) == fresh(other)


def test_a_table_at_a_url_is_not_rescanned(job: Job) -> None:
    url, system = "memory://results/rescanned.csv", fsspec.filesystem("memory")
    classify_and_upload(url, replace(job, rescan=True), classify)
    table = system.cat("/results/rescanned.csv")
    with pytest.raises(ConvlineError, match="exists, and --rescan can bring only local tables up to date"):
        classify_and_upload(url, replace(job, rescan=True), classify)
    assert system.cat("/results/rescanned.csv") == table and not list(Path().glob("*.upload.csv*"))
    system.rm("/results", recursive=True)


# --- kills

# ends the process before its n-th change of a name, of a journal, a table or a link, or before its n-th batch
KILLED = """
import os, pathlib, signal, sys
from serving.cli import run
from serving.journal import Journal
number, changes = int(sys.argv[1]), 0

def counted(real):
    def change(*arguments, **options):
        global changes
        changes += any(name in str(arguments[0]) for name in ("out.csv", "sorted", "Journal"))
        if changes == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return change

os.replace = counted(os.replace)
pathlib.Path.replace = counted(pathlib.Path.replace)
pathlib.Path.unlink = counted(pathlib.Path.unlink)
Journal.append = counted(Journal.append)
Journal._write_only_header = counted(Journal._write_only_header)
sys.argv[:2] = ["serving"]
run()
"""


@pytest.mark.all
@pytest.mark.parametrize("option", ["resume", "rescan"])
def test_a_rescan_that_is_killed_at_any_moment_is_continued(job: Job, images: Path, option: str) -> None:
    job = replace(job, sort_into=Path("sorted"))
    classify(job)
    Path("before").mkdir()
    for path in [*Path().glob("out.csv*"), Path("sorted")]:
        path.rename(Path("before", path.name))
    change(images)
    expected = fresh(replace(job, sort_into=Path("anew")))
    arguments = ["classify", "in", "--model", job.model, "--output", "out.csv", "--batch-size", BATCH, "--threads", 1]
    arguments += ["--provider", "cpu", "--sort-into", "sorted", "--rescan"]
    kills, options = 0, {option: True}
    while True:
        for path in Path().glob("*out.csv*"):
            path.unlink()
        shutil.rmtree("sorted", ignore_errors=True)
        shutil.copytree("before", ".", symlinks=True, dirs_exist_ok=True)
        killed = subprocess.run([sys.executable, "-c", KILLED, str(kills + 1), *map(str, arguments)])
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
        kills += 1
        assert Path("out.csv").read_bytes() in (Path("before/out.csv").read_bytes(), expected[0])
        if Path("out.csv.partial").exists() and Path("out.csv.partial").stat().st_size:
            classify(replace(job, **options))  # type: ignore[arg-type]
        rescan(job)  # of a job that was killed at its very end, or before it had begun
        assert rescan(job).rescan == RescanCounts(COUNT + 1, 0, 0, 0)
        assert (outputs(job), tree("sorted")) == (expected, tree("anew")), f"after kill {kills}"
        assert sorted(path.name for path in Path().glob("*out.csv*")) == [
            "out.csv",
            "out.csv.journal",
            "out.csv.rejects.jsonl",
        ]
    assert kills >= 12
    assert (outputs(job), tree("sorted")) == (expected, tree("anew"))


# --- --sort-into and --report


def tree(folder: str) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()) if path.is_symlink() else "a folder or a file"
        for path in Path(folder).rglob("*")
    }


def test_links_that_are_no_longer_valid_are_removed(
    job: Job, images: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = sorted(samples.rglob("*.png"))
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        shutil.copy(digits[3 * number], path)
    sorting = replace(job, sort_into=Path("sorted"))
    classify(sorting)
    first = tree("sorted")
    change(images)
    for number, path in enumerate(sorted(images.glob("0/*.png"))):
        shutil.copy(digits[-1 - number], path)  # of other classes
    interrupted(replace(sorting, rescan=True), monkeypatch, after=1)
    shutil.copy(digits[50], images / "new/new.png")
    mine = write(Path("sorted/mine/1.png"), b"mine")
    Path("sorted/5/2").mkdir(parents=True, exist_ok=True)
    Path("sorted/5/2/02.png").unlink(missing_ok=True)
    Path("sorted/5/2/02.png").symlink_to(mine.resolve())  # at a place where a link may have been, to another file
    rescan(sorting)
    fresh(job, sort_into=Path("anew"))
    found = tree("sorted")
    assert found.pop("mine") and found.pop("mine/1.png") and found.pop("5/2/02.png") == str(mine.resolve())
    found.setdefault("5", "a folder or a file")
    expected = {"5": "a folder or a file", "5/2": "a folder or a file", **tree("anew")}
    assert {"5/2": "a folder or a file", **found} == expected and found != first
    assert outputs(job) == fresh(job)
    write(Path("elsewhere/x"), b"")
    with pytest.raises(ConvlineError, match="--sort-into elsewhere holds files already"):
        rescan(replace(job, sort_into=Path("elsewhere")))


@pytest.mark.all
@pytest.mark.parametrize("listed", ["in", "@list", "in/1/01.png"])
def test_links_of_files_that_are_gone_are_removed_from_any_folder(
    job: Job, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    Path("list").write_text("\n".join(str(path) for path in sorted(images.rglob("*.png"))))
    name = f"@{tmp_path}/list" if listed == "@list" else str(tmp_path / listed)
    job = replace(job, inputs=[name], output=tmp_path / "out.csv", sort_into=tmp_path / "sorted")
    classify(job)
    before = tree("sorted")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    write(images / "1/01.png", b"garbage")
    rescan(job)
    after = tree("../sorted")
    (gone,) = [path for path in before if path not in after and path.endswith(".png")]
    assert gone.endswith("01.png") and after.items() <= before.items()
    assert not [path for path in Path("../sorted").rglob("*") if path.is_dir() and not any(path.iterdir())]


@pytest.mark.all
def test_a_folder_with_copies_is_not_brought_up_to_date(job: Job, images: Path) -> None:
    shutil.make_archive("in", "zip", images)
    sorting = replace(job, inputs=["in.zip"], sort_into=Path("sorted"))
    classify(sorting)
    change(images)
    shutil.make_archive("in", "zip", images)
    before = written()
    with pytest.raises(ConvlineError, match=r"only links can be brought up to date.*empty the folder, or choose"):
        rescan(sorting)
    assert written() == before
    shutil.rmtree("sorted")
    rescan(sorting)
    assert len([path for path in Path("sorted").rglob("*") if path.is_file()]) == len(csv_rows(Path("out.csv")))


@pytest.mark.all
def test_a_rescan_without_the_folder_gives_it_up(job: Job, images: Path) -> None:
    sorting = replace(job, sort_into=Path("sorted"))
    classify(sorting)
    rescan(job)  # changes nothing, so the folder is still right
    rescan(sorting)
    change(images)
    rescan(job)
    with pytest.raises(ConvlineError, match="--sort-into sorted holds files already"):
        rescan(sorting)


@pytest.mark.all
def test_the_page_shows_all_files(job: Job, images: Path) -> None:
    report = images / "page.html"
    classify(replace(job, report=report))
    change(images)
    counts = rescan(replace(job, report=report))
    page = check(report)
    assert f"{counts.tally.classified}" in page.texts("dd") and f"{counts.tally.found}" in page.texts("dd")
    assert rescan(replace(job, report=report)).tally == counts.tally and report.exists()

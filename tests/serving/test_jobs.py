"""Jobs of `serving classify` beyond the table: shards, lists, --sort-into, --rescan, URLs, batch size, kills."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import psutil
import pytest

from convline.errors import ConvlineError
from convline.inputs.input_file import InMemory, InputFile
from convline.inputs.listing import find
from serving.auto_batch_size import choose_batch_size
from serving.classify import classify
from serving.job import Job
from serving.records import Prediction
from serving.shards import fingerprint_listing
from serving.sort_into import Sorter
from serving.summary import Summary
from serving.upload import classify_and_upload
from tests.conftest import Cli, command
from tests.serving.helpers import csv_rows, encode, interrupted, json_lines, noise, write

COUNT = 100
BATCH = 8


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a hundred files in three folders, ten of them unusable; its parent is the current folder."""
    monkeypatch.chdir(tmp_path)
    for number in range(COUNT):
        data = encode(noise(8, 8), "PNG") if number % 10 else b"garbage"
        write(tmp_path / f"in/{number % 3}/{number:03}.png", data)
    return tmp_path / "in"


@pytest.fixture
def job(images: Path, model: Path) -> Job:
    return Job([images.name], model, Path("out.csv"), batch_size=BATCH, provider="cpu")


def outputs(job: Job) -> tuple[bytes, bytes]:
    assert job.output is not None
    return job.output.read_bytes(), Path(f"{job.output}.rejects.jsonl").read_bytes()


def named(job: Job, name: str, **changes: object) -> Job:
    return replace(job, output=Path(name), **changes)  # type: ignore[arg-type]


# --- shards


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 40])
def test_the_parts_of_a_listing_joined_are_the_whole(job: Job, parts: int) -> None:
    classify(job)
    table, rejects = outputs(job)
    pieces = [named(job, f"{index}.csv", shard=(index, parts)) for index in range(1, parts + 1)]
    for piece in pieces:
        classify(piece)
    header, *_ = table.splitlines(keepends=True)
    assert header + b"".join(outputs(piece)[0].removeprefix(header) for piece in pieces) == table
    assert b"".join(outputs(piece)[1] for piece in pieces) == rejects


def test_a_part_is_resumed_only_while_the_listing_is_the_same(
    job: Job, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = replace(job, shard=(2, 3))
    interrupted(part, monkeypatch, after=2)
    write(images / "zzz.png", b"")
    with pytest.raises(ConvlineError, match="different settings: listing of the inputs;"):
        classify(replace(part, resume=True))
    with pytest.raises(ConvlineError, match="different settings: shard"):
        classify(replace(part, resume=True, shard=(1, 3)))


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "x/3", "1/0", "1/3/5", "-1/3"])
def test_an_invalid_shard_is_wrong_usage(cli: Cli, shard: str) -> None:
    cli("serving", "classify", "x", "--model", "m.onnx", "--shard", shard, status=2)


def test_a_part_inside_the_input_is_refused(job: Job) -> None:
    with pytest.raises(ConvlineError, match="the output must lie outside the input in"):
        classify(named(job, "in/1.csv", shard=(1, 3)))


def test_a_listing_that_changes_while_a_part_is_done_is_refused(images: Path) -> None:
    whole = fingerprint_listing(find(["in"]))
    files = whole.checked_shard(find(["in"]), 1, 3, BATCH)
    next(files)
    write(images / "2/zzz.png", b"")
    with pytest.raises(ConvlineError, match="the input changed while"):
        list(files)


# --- standard input


def test_paths_from_standard_input(job: Job, images: Path) -> None:
    classify(job)
    listed = "".join(
        f"in/{path}\n" for path in sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    )
    arguments = command(
        "serving", "classify", "-", "--model", job.model, "--output", "piped.csv", "--batch-size", BATCH
    )
    subprocess.run(arguments, input=listed.encode(), check=True, capture_output=True)
    mine, whole = csv_rows(Path("piped.csv")), csv_rows(Path("out.csv"))
    assert [{**row, "path": row["path"].removeprefix("in/")} for row in mine] == whole


@pytest.mark.parametrize("change", [{"resume": True}, {"rescan": True}, {"shard": (1, 2)}])
def test_standard_input_can_neither_be_resumed_nor_divided(job: Job, change: dict[str, object]) -> None:
    with pytest.raises(ConvlineError, match="standard input can be read only once"):
        classify(replace(job, inputs=["-"], **change))  # type: ignore[arg-type]


# --- an input that changed


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new file before": lambda images: write(images / "0/000a.png", encode(noise(8, 8), "PNG")),
    "a file gone": lambda images: (images / "0/003.png").unlink(),
    "another image": lambda images: write(images / "0/003.png", encode(noise(8, 8), "PNG")),
    "the same image written again": lambda images: touched(images / "0/003.png"),
    "an unusable file mended": lambda images: write(images / "0/030.png", encode(noise(8, 8), "PNG")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_input_is_refused_unless_rescanned(
    job: Job, images: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    interrupted(job, monkeypatch, after=6)
    partial = Path("out.csv.partial")
    before = partial.read_bytes()
    change(images)
    with pytest.raises(ConvlineError, match=r"the input changed.*--rescan.*--overwrite"):
        classify(replace(job, resume=True))
    assert partial.read_bytes() == before
    summary = classify(replace(job, rescan=True))
    assert 6 * BATCH - 1 <= summary.resumed <= 6 * BATCH
    fresh = named(job, "fresh.csv")
    assert classify(fresh).tally == summary.tally
    assert outputs(job) == outputs(fresh)
    assert not list(Path().glob("out.csv.partial*"))


def test_a_rescan_that_is_stopped_keeps_what_was_known_before_it(
    job: Job, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(job, monkeypatch, after=8)
    for _ in range(2):
        write(images / f"0/000{_}.png", encode(noise(8, 8), "PNG"))
        interrupted(replace(job, rescan=True), monkeypatch, after=1)
    summary = classify(replace(job, resume=True))  # which is a rescan again
    assert summary.resumed >= 8 * BATCH
    fresh = named(job, "fresh.csv")
    classify(fresh)
    assert outputs(job) == outputs(fresh)


def test_a_rescan_that_is_torn_while_it_begins_loses_nothing(
    job: Job, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(job, monkeypatch, after=8)
    write(images / "0/000a.png", encode(noise(8, 8), "PNG"))
    arguments = command("serving", "classify", "in", "--model", job.model, "--output", "out.csv", "--batch-size", BATCH)
    options = ["--provider", "cpu", "--rescan"]
    torn = subprocess.run([arguments[0], "-c", FULL, *arguments[3:], *options], capture_output=True, text=True)
    assert torn.returncode == 1 and "File too large" in torn.stderr
    assert classify(replace(job, rescan=True)).resumed >= 8 * BATCH - 10


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_name_that_is_twice_in_an_archive_keeps_both_results(
    job: Job, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    contents = [encode(noise(8, 8), "PNG") for _ in range(20)]
    if kind == "zip":
        with zipfile.ZipFile("x.zip", "w") as zipped, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data in contents:
                zipped.writestr("same.png", data)
    else:
        with tarfile.open(f"x.{kind}", "w:gz" if kind == "tar.gz" else "w") as tar:
            for data in contents:
                member = tarfile.TarInfo("same.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    job = replace(job, inputs=[f"x.{kind}"])
    fresh = named(job, "fresh.csv")
    classify(fresh)
    interrupted(job, monkeypatch, after=2)
    classify(replace(job, rescan=True))
    assert outputs(job) == outputs(fresh)


def test_what_cannot_be_told_to_be_the_same_is_classified_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [f"memory://listed/{number:02}.png" for number in range(20)]
    for url in urls:
        fsspec.filesystem("memory").pipe(url.removeprefix("memory:/"), encode(noise(8, 8), "PNG"))
    write(Path("list"), "\n".join(urls).encode())
    listed = replace(job, inputs=["@list"])
    interrupted(listed, monkeypatch, after=2)
    assert classify(replace(listed, rescan=True)).resumed == 0
    fsspec.filesystem("memory").rm("/listed", recursive=True)


def test_overwrite_forgets_a_rescan(job: Job, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch, after=8)
    write(images / "0/0.png", b"")
    interrupted(replace(job, rescan=True), monkeypatch, after=0)
    assert Path("out.csv.partial.before").exists()
    assert classify(replace(job, overwrite=True)).resumed == 0
    assert not list(Path().glob("out.csv.partial*"))


def test_a_file_that_vanishes_is_rejected(job: Job, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(self: InputFile) -> None:
        if self.path == "1/031.png":
            (images / self.path).unlink()

    monkeypatch.setattr(InputFile, "record_version", looked)  # between the listing and the reading
    summary = classify(job)
    assert summary.tally.reasons == {"not-an-image": 10, "unreadable": 1}
    assert summary.tally.found == COUNT


# --- --sort-into


def test_each_image_is_linked_into_the_folder_of_its_label(job: Job, images: Path) -> None:
    classify(replace(job, sort_into=Path("sorted")))
    rows = csv_rows(Path("out.csv"))
    links = {path.relative_to("sorted").as_posix(): path for path in Path("sorted").rglob("*.png")}
    assert sorted(links) == sorted(f"{row['label']}/{row['path']}" for row in rows)
    assert all(path.is_symlink() and path.resolve().is_relative_to(images) for path in links.values())
    assert all(path.read_bytes() == (images / name.partition("/")[2]).read_bytes() for name, path in links.items())


def test_members_of_an_archive_are_copied(job: Job, images: Path) -> None:
    classify(replace(job, sort_into=Path("linked")))
    for kind in ("zip", "gztar", "tar"):
        archive = shutil.make_archive("images", kind, images)
        classify(named(job, f"{kind}.csv", inputs=[archive], sort_into=Path(kind)))
        copies = {path.relative_to(kind): path.read_bytes() for path in Path(kind).rglob("*.png")}
        assert copies == {path.relative_to("linked"): path.read_bytes() for path in Path("linked").rglob("*.png")}


def test_a_job_that_goes_on_sorts_what_was_classified_before(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch, after=6)
    classify(replace(job, resume=True, sort_into=Path("sorted")))
    assert len(list(Path("sorted").rglob("*.png"))) == COUNT * 0.9


def test_files_of_one_name_all_have_their_place(job: Job, images: Path) -> None:
    for folder in ("a", "b"):
        write(images.parent / f"{folder}/x.png", (images / "1/001.png").read_bytes())
    os.chdir(images)
    classify(replace(job, inputs=["../a/x.png", "../b/../a/x.png", "../b/x.png"], sort_into=Path("../sorted")))
    assert sorted(path.relative_to("../sorted").parts[1:] for path in Path("../sorted").rglob("*.png")) == [
        ("a", "x.png"),
        ("b", "a", "x.png"),
        ("b", "x.png"),
    ]


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("in/sorted", "inside the input in"),
        ("in/0", "inside the input in"),
        ("in", "inside the input"),
        ("full", "holds files"),
        ("file", "is a file"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(job: Job, folder: str, says: str) -> None:
    write(Path("full/mine.txt"), b"precious")
    write(Path("file"), b"precious")
    with pytest.raises(ConvlineError, match=says):
        classify(replace(job, sort_into=Path(folder)))
    assert not Path("out.csv").exists() and not Path("out.csv.partial").exists()


def test_a_folder_inside_of_what_a_glob_searches_is_refused(job: Job) -> None:
    with pytest.raises(ConvlineError, match="lies inside the input in"):
        classify(replace(job, inputs=["in/*"], sort_into=Path("in/sorted")))


def test_a_rescan_sorts_into_a_new_folder(job: Job, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(replace(job, sort_into=Path("sorted")), monkeypatch, after=6)
    write(images / "0/003.png", encode(noise(8, 8), "PNG"))
    with pytest.raises(ConvlineError, match="holds files already"):
        classify(replace(job, rescan=True, sort_into=Path("sorted")))
    classify(replace(job, rescan=True, sort_into=Path("anew")))
    assert len(list(Path("anew").rglob("*.png"))) == COUNT * 0.9


def test_invalid_file_names_get_a_place_too(job: Job) -> None:
    names = ["x", "x/y.png", "long" * 62 + ".png"]
    with zipfile.ZipFile("odd.zip", "w") as zipped:
        for name in names:
            zipped.writestr(name, encode(noise(8, 8), "PNG"))
    classify(replace(job, inputs=["odd.zip"], sort_into=Path("sorted")))
    assert len([path for path in Path("sorted").rglob("*") if path.is_file()]) == len(names)


def test_labels_and_members_that_are_no_names_have_places_of_their_own(tmp_path: Path) -> None:
    labels = ["a/b", "a_b", "..", "", "x" * 300, "Cat", "nul\0"]
    data = encode(noise(8, 8), "PNG")
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as zipped:
        for name in ("nul?l.png", "y" * 256 + ".png", "z" * 252 + ".png", "f/g.png"):
            zipped.writestr(name, data)
    archive = write(tmp_path / "odd.zip", (tmp_path / "odd.zip").read_bytes().replace(b"nul?l", b"nul\0l"))
    sorter = Sorter(tmp_path / "sorted", (str(archive),), resume=False)
    for label in labels:
        for file in (*find([str(archive)]), InputFile(".", InMemory(data))):
            sorter.add(file, Prediction(file.path, (label,), (1.0,)))
    placed = [path for path in (tmp_path / "sorted").rglob("*") if path.is_file()]
    assert len(placed) == len(labels) * 5 and all(path.read_bytes() == data for path in placed)
    tops = {path.relative_to(tmp_path / "sorted").parts[0] for path in placed}
    assert len(tops) == len(labels) and {"a_b", "Cat"} <= tops


def test_only_its_own_leftovers_are_removed_from_a_folder_that_is_sorted_into(tmp_path: Path) -> None:
    precious = write(tmp_path / "precious", b"precious")
    left = write(tmp_path / "sorted/cat/.x.png.00aa.tmp", b"half")
    (tmp_path / "sorted/cat/.given.tmp").symlink_to(precious)
    write(tmp_path / "sorted/cat/.folder.tmp/x.png", b"x")
    Sorter(tmp_path / "sorted", (), resume=True)
    assert not left.exists() and precious.exists()
    assert sorted(path.name for path in (tmp_path / "sorted/cat").iterdir()) == [".folder.tmp", ".given.tmp"]


# --- spreadsheets


def test_what_a_spreadsheet_would_run_is_made_safe_and_recognised(job: Job, images: Path) -> None:
    for name in ("=1+1.png", "@x.png", "'=x.png", "-1.png"):
        shutil.copy(images / "1/001.png", images / name)
    safe = replace(job, csv_safe=True)
    tally = classify(safe).tally
    paths = [row["path"] for row in csv_rows(Path("out.csv"))]
    assert {"'=1+1.png", "'@x.png", "''=x.png", "'-1.png", "1/001.png"} <= set(paths)
    assert classify(replace(safe, resume=True)).tally == tally
    with pytest.raises(ConvlineError, match="is complete, but belongs to other files"):
        classify(replace(job, resume=True))
    classify(replace(job, overwrite=True))
    assert "=1+1.png" in [row["path"] for row in csv_rows(Path("out.csv"))]  # as it is called
    for changes in ({"output": Path("out.jsonl")}, {"output": None, "stdout_format": "jsonl"}):
        with pytest.raises(ConvlineError, match="--csv-safe is only for CSV"):
            classify(replace(safe, **changes))


def test_a_job_that_was_not_made_safe_is_not_continued_so(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(job, monkeypatch, after=2)
    with pytest.raises(ConvlineError, match="different settings: csv_safe;"):
        classify(replace(job, csv_safe=True, resume=True))


# --- batch size


def test_auto_is_settled_once_and_kept_by_the_journal(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.classify.fastest_batch_size", lambda _: 4)
    interrupted(replace(job, batch_size="auto"), monkeypatch, after=6)
    assert json_lines(Path("out.csv.partial"))[0]["batch_size"] == 4
    monkeypatch.setattr("serving.classify.fastest_batch_size", lambda _: 16)
    assert classify(replace(job, batch_size="auto", resume=True)).resumed == 24
    fours = named(job, "fours.csv", batch_size=4)
    classify(fours)
    assert outputs(job) == outputs(fours)


@pytest.mark.parametrize(
    ("rates", "size"),
    [
        ({1: 100.0}, 1),
        ({1: 10.0, 2: 20.0, 4: 39.0, 8: 40.0, 16: 41.0}, 4),
        ({1: 10.0, 2: 9.0}, 1),
        ({1: 1, 2: 2, 4: 4}, 4),
    ],
)
def test_auto_is_the_smallest_size_near_the_highest_rate(rates: dict[int, float], size: int) -> None:
    assert choose_batch_size(rates) == size


def test_auto_on_the_command_line(cli: Cli, job: Job) -> None:
    result = cli(
        "serving", "classify", "in", "--model", job.model, "--output", "a.csv", "--batch-size", "auto", "--json"
    )
    assert json.loads(result.stdout)["found"] == COUNT
    with pytest.raises(ConvlineError, match="--shard needs a --batch-size"):
        classify(replace(job, shard=(1, 2), batch_size="auto"))


# --- full disks, closed streams, killed processes


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.argv[0] = "serving"
from serving.cli import run
run()
"""


def test_a_full_disk_leaves_a_job_that_can_be_resumed(job: Job, cli: Cli) -> None:
    arguments = command("serving", "classify", "in", "--model", job.model, "--output", "out.csv", "--batch-size", BATCH)
    full = subprocess.run([arguments[0], "-c", FULL, *arguments[3:]], capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    assert "File too large" in full.stderr and "--resume continues from there" in full.stderr
    assert "Traceback" not in full.stderr and not Path("out.csv").exists()
    result = cli(*arguments[2:], "--resume", "--json")
    assert 0 < json.loads(result.stdout)["resumed"] < COUNT
    whole = named(job, "whole.csv")
    classify(whole)
    assert outputs(job) == outputs(whole)


def test_a_reader_of_stdout_that_leaves_ends_the_job_without_a_word(job: Job) -> None:
    arguments = command("serving", "classify", "in", "--model", job.model, "--batch-size", BATCH)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "path,label,probability\n"
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 1
    assert all(line.startswith("{") for line in stderr.splitlines()), stderr  # rejects


@pytest.mark.parametrize("closed", ["1", "2", "12"])
def test_closed_streams_write_into_no_file(job: Job, closed: str) -> None:
    """The next file that is opened must not take their descriptor."""
    line = shlex.join(command("serving", "classify", "in", "--model", job.model, "--output", "out.csv"))
    whole = named(job, "whole.csv", batch_size=64)
    classify(whole)
    result = subprocess.run(line + "".join(f" {number}>&-" for number in closed), shell=True, capture_output=True)
    assert result.returncode == 0 and result.stdout == b""
    assert outputs(job) == outputs(whole)


def test_a_reader_of_stderr_that_leaves_costs_no_row(job: Job) -> None:
    arguments = command("serving", "classify", "in", "--model", job.model, "--batch-size", BATCH)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stderr.close()
        rows = process.stdout.read().splitlines()
    assert process.returncode == 0 and len(rows) == 1 + COUNT * 0.9


@pytest.mark.all
def test_the_journal_is_free_as_soon_as_its_job_is_killed(job: Job) -> None:
    """A worker that replaced a dead one inherited the open journal, and may still be working."""
    arguments = command("serving", "classify", "in", "--model", job.model, "--output", "out.csv", "--batch-size", BATCH)
    with subprocess.Popen([arguments[0], "-c", SLOW, *arguments[3:]], stderr=subprocess.PIPE) as process:
        while len(json_lines(Path("out.csv.partial")) if Path("out.csv.partial").exists() else []) < 2 * BATCH:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert classify(replace(job, resume=True)).tally.found == COUNT


SLOW = """
import os, sys, time
from serving import classifier
from serving.cli import run

def decode(data, spec, real=classifier.decode):
    if data == b"garbage" and not os.path.exists("died"):
        open("died", "w").close()
        os._exit(1)
    if len(open("out.csv.partial").readlines()) > 16:
        time.sleep(5)
    return real(data, spec)

classifier.decode = decode
sys.argv[0] = "serving"
run()
"""


def test_a_file_that_kills_its_decoder_is_rejected(job: Job, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(data: bytes, spec: object) -> object:
        if data == b"garbage":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, spec)  # type: ignore[arg-type]

    from convline.images import decode as real

    monkeypatch.setattr("serving.classifier.decode", decode)
    for path in [path for path in images.rglob("*.png") if path.read_bytes() == b"garbage"][2:]:
        path.unlink()
    summary = classify(job)
    assert (summary.tally.classified, summary.tally.reasons) == (COUNT * 0.9, {"unreadable": 2})
    assert {line["detail"] for line in json_lines(Path("out.csv.rejects.jsonl"))} == {
        "the process that decoded it ended (SIGKILL)"
    }


def test_nothing_but_the_outputs_is_written(job: Job, images: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images.rglob("*.png")}
    classify(replace(job, sort_into=Path("sorted")))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in images.rglob("*.png")} == before
    assert sorted(path.name for path in Path().iterdir()) == [
        "in",
        "out.csv",
        "out.csv.journal",
        "out.csv.rejects.jsonl",
        "sorted",
    ]


def test_files_behind_a_url_are_classified(job: Job, images: Path) -> None:
    fsspec.filesystem("memory").put(str(images), "/jobs", recursive=True)
    classify(job)
    remote = named(job, "remote.csv", inputs=["memory://jobs"])
    classify(remote)
    assert outputs(remote) == outputs(job)


def test_the_summary_of_a_job(job: Job) -> None:
    summary = classify(job)
    assert isinstance(summary, Summary)
    told = summary.to_dict()
    assert (told["found"], told["classified"], told["rejected"], told["provider"]) == (100, 90, 10, "cpu")
    assert sum(told["labels"].values()) == 90 and told["images_per_second"] > 0
    assert summary.sentence().startswith("classified 90 + rejected 10 == found 100 (10 not-an-image); ")


@pytest.mark.all
@pytest.mark.parametrize("count", [30_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_files(model: Path, tmp_path: Path, count: int) -> None:
    sources = [write(tmp_path / f"{number}.png", encode(noise(8, 8), "PNG")) for number in range(10)]
    for number in range(count):
        folder = tmp_path / f"in/{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % 10], folder / f"{number:07}.png")
    arguments = command("serving", "classify", tmp_path / "in", "--model", model, "--output", tmp_path / "out.csv")
    early = most = 0
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        job = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0
            with suppress(psutil.NoSuchProcess):
                held = sum(part.memory_info().rss for part in (job, *job.children()))
            partial = tmp_path / "out.csv.partial"
            if not partial.exists() or partial.stat().st_size < 10_000 * 75:  # bytes of an entry
                early = max(early, held)
            most = max(most, held)
            time.sleep(0.02)
    assert process.returncode == 0 and early
    assert (tmp_path / "out.csv").read_bytes().count(b"\n") == count + 1
    assert most - early < 20e6, f"{early / 1e6:.1f} MB after 10,000 files, {most / 1e6:.1f} MB at most"


# --- outputs behind URLs


def test_a_table_is_uploaded_when_it_is_whole(job: Job) -> None:
    classify(job)
    url = "memory://results/out.csv"
    system = fsspec.filesystem("memory")
    summary = classify_and_upload(url, job, classify)
    assert (system.cat("/results/out.csv"), system.cat("/results/out.csv.rejects.jsonl")) == outputs(job)
    assert not list(Path().glob("*upload*"))
    with pytest.raises(ConvlineError, match="exists: choose another name, or replace it with --overwrite"):
        classify_and_upload(url, job, classify)
    assert classify_and_upload(url, replace(job, resume=True), classify).tally == summary.tally
    classify_and_upload(url, replace(job, overwrite=True), classify)
    system.rm("/results", recursive=True)


def test_an_upload_that_fails_is_tried_again_by_resume(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://results/out.csv"
    another = replace(job, inputs=["in/0"], resume=True)

    def put_file(*_: object) -> None:
        raise OSError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr("fsspec.implementations.memory.MemoryFileSystem.put_file", put_file)
        with pytest.raises(
            ConvlineError, match=r"out\..*\.upload\.csv is complete.*the network is down; --resume tries again"
        ):
            classify_and_upload(url, job, classify)
    with pytest.raises(ConvlineError, match="is complete, but belongs to other files"):
        classify_and_upload(url, another, classify)
    classify_and_upload(url, replace(job, resume=True), classify)
    classify(job)
    assert fsspec.filesystem("memory").cat("/results/out.csv") == outputs(job)[0]
    fsspec.filesystem("memory").rm("/results", recursive=True)


# --- resuming a finished job


def test_resuming_a_finished_job_refuses_another_listing(job: Job, images: Path) -> None:
    tally = classify(job).tally
    assert classify(replace(job, resume=True)).tally == tally
    write(images / "0/new.png", b"")
    with pytest.raises(ConvlineError, match="is complete, but belongs to other files"):
        classify(replace(job, resume=True))
    with pytest.raises(ConvlineError, match="no such file or folder: nowhere"):
        classify(replace(job, resume=True, inputs=["nowhere"]))


def test_resuming_a_table_of_another_program_is_refused(job: Job) -> None:
    classify(job)
    Path("out.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConvlineError, match=r"was not written by `serving classify`"):
        classify(replace(job, resume=True))
    Path("out.csv.rejects.jsonl").unlink()
    with pytest.raises(ConvlineError, match=r"was not written by `serving classify`"):
        classify(replace(job, resume=True))

"""`serving classify` from end to end: no file is lost, no row is shifted, and a job survives any kill."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import random
import shutil
import signal
import subprocess
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet
import pytest
from PIL import Image

from serving import Classifier, Prediction
from tests.conftest import Cli, command, run_command
from tests.serving.helpers import csv_rows, encode, exif, json_lines, noise, resealed, write

COLOUR = noise(20, 30, 3)
USABLE = {  # in the contract's order
    "B.png": encode(noise(8, 8), "PNG"),
    "a b/größe 1.png": encode(noise(9, 8), "PNG"),
    "a b/nested/cmyk.jpg": encode(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"),
    "a b/nested/deep.png": encode((noise(8, 8).astype(np.uint16) * 257), "PNG"),
    "photo.jpg": encode(COLOUR, "JPEG", exif=exif(6)),
    "rgba.png": encode(noise(20, 20, 4), "PNG"),
    "broken exif.png": encode(noise(8, 8), "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0"),
    "日本.webp": encode(COLOUR, "WEBP"),
}
UNUSABLE = {
    "a b/empty.png": (b"", "empty"),
    "cut.jpg": (encode(COLOUR, "JPEG")[:400], "truncated"),
    "garbage.png": (b"this is not an image", "not-an-image"),
    "float.tiff": (encode(np.ones((4, 4), np.float32), "TIFF"), "unsupported"),
    "notes": (b"no ending at all", "not-an-image"),
    "zz.png": (b"", "empty"),
}
ORDER = sorted([*USABLE, *UNUSABLE], key=lambda path: [part.encode() for part in path.split("/")])


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "mixed"
    for path, data in USABLE.items():
        write(folder / path, data)
    for path, (data, _) in UNUSABLE.items():
        write(folder / path, data)
    write(folder / ".hidden/x.png", b"")
    return folder


def one_sentence(stderr: str) -> str:
    (line,) = stderr.strip().splitlines()
    assert line.startswith("error: ") and "unexpected error" not in line
    return line


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- rows and rejects


def test_a_corrupt_file_never_shifts_a_row(cli: Cli, model: Path, mixed: Path, tmp_path: Path) -> None:
    result = cli("serving", "classify", "mixed", "--model", model, "--output", "out.csv")
    rows, rejects = csv_rows(tmp_path / "out.csv"), json_lines(tmp_path / "out.csv.rejects.jsonl")
    assert [row["path"] for row in rows] == [path for path in ORDER if path in USABLE]
    assert [reject["path"] for reject in rejects] == [path for path in ORDER if path in UNUSABLE]
    assert {reject["path"]: reject["reason"] for reject in rejects} == {p: r for p, (_, r) in UNUSABLE.items()}
    assert all(set(reject) == {"path", "reason", "detail"} and reject["detail"] for reject in rejects)
    assert f"classified {len(USABLE)} + rejected {len(UNUSABLE)} == found {len(ORDER)}" in result.stderr
    with Classifier(model) as classifier:
        for row in rows:
            (alone,) = classifier.classify_files([mixed / row["path"]])
            assert isinstance(alone, Prediction)
            assert (row["label"], float(row["probability"])) == (alone.labels[0], alone.probabilities[0])
    assert not (tmp_path / "out.csv.partial").exists()


def test_stderr_holds_the_summary_and_nothing_else(cli: Cli, model: Path, mixed: Path) -> None:
    assert mixed.is_dir()
    result = cli("serving", "classify", "mixed", "--model", model, "--output", "out.csv")
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_turned_photo_gets_the_row_of_the_upright_one(cli: Cli, model: Path, samples: Path, tmp_path: Path) -> None:
    upright = np.asarray(Image.open(next(samples.glob("7/*.png"))))
    write(tmp_path / "in/turned.png", encode(np.rot90(upright), "PNG", exif=exif(6)))  # to be turned clockwise
    write(tmp_path / "in/upright.png", encode(upright, "PNG"))
    cli("serving", "classify", "in", "--model", model, "--output", "out.csv")
    turned, straight = csv_rows(tmp_path / "out.csv")
    assert straight["label"] == "7"
    assert {**turned, "path": ""} == {**straight, "path": ""}


def test_real_digits_are_recognised(cli: Cli, model: Path, samples: Path, tmp_path: Path) -> None:
    cli("serving", "classify", samples, "--model", model, "--output", "out.csv")
    rows = csv_rows(tmp_path / "out.csv")
    assert len(rows) == 100
    assert sum(row["label"] == row["path"].split("/")[0] for row in rows) >= 95


def test_csv_and_jsonl_hold_the_same(cli: Cli, model: Path, mixed: Path, tmp_path: Path) -> None:
    for output in ("out.csv", "out.jsonl"):
        cli("serving", "classify", mixed, "--model", model, "--output", output, "--top-k", 3)
    rows, lines = csv_rows(tmp_path / "out.csv"), json_lines(tmp_path / "out.jsonl")
    columns = ["path", "label", "probability", "label_2", "probability_2", "label_3", "probability_3"]
    assert list(rows[0]) == list(lines[0]) == columns
    assert rows == [{key: str(value) for key, value in line.items()} for line in lines]
    assert all(isinstance(line["probability_3"], float) for line in lines)
    assert all(line["probability"] >= line["probability_2"] >= line["probability_3"] for line in lines)
    assert (tmp_path / "out.csv.rejects.jsonl").read_bytes() == (tmp_path / "out.jsonl.rejects.jsonl").read_bytes()


def test_the_first_columns_do_not_depend_on_top_k(cli: Cli, model: Path, mixed: Path, tmp_path: Path) -> None:
    cli("serving", "classify", mixed, "--model", model, "--output", "one.csv")
    cli("serving", "classify", mixed, "--model", model, "--output", "ten.csv", "--top-k", 10)
    one, ten = csv_rows(tmp_path / "one.csv"), csv_rows(tmp_path / "ten.csv")
    assert [list(row.values()) for row in one] == [list(row.values())[:3] for row in ten]
    for row in ten:
        assert sum(float(value) for key, value in row.items() if key.startswith("prob")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_changes_no_label(cli: Cli, model: Path, mixed: Path, tmp_path: Path, batch_size: int) -> None:
    cli("serving", "classify", mixed, "--model", model, "--output", "out.csv")
    cli("serving", "classify", mixed, "--model", model, "--output", "other.csv", "--batch-size", batch_size)
    rows, others = csv_rows(tmp_path / "out.csv"), csv_rows(tmp_path / "other.csv")
    assert [(row["path"], row["label"]) for row in others] == [(row["path"], row["label"]) for row in rows]
    np.testing.assert_allclose([float(r["probability"]) for r in others], [float(r["probability"]) for r in rows], 1e-4)


@pytest.mark.parametrize("output", [[], ["--output", "-"]])
def test_stdout_takes_the_table_and_stderr_the_rejects(
    cli: Cli, model: Path, mixed: Path, tmp_path: Path, output: list[str]
) -> None:
    cli("serving", "classify", mixed, "--model", model, "--output", "out.csv")
    before = tree(tmp_path)
    result = cli("serving", "classify", mixed, "--model", model, *output)
    assert list(csv.DictReader(io.StringIO(result.stdout))) == csv_rows(tmp_path / "out.csv")
    rejects = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert rejects == json_lines(tmp_path / "out.csv.rejects.jsonl")
    assert tree(tmp_path) == before


def test_json_gives_rows_on_stdout_and_a_summary_beside_a_file(
    cli: Cli, model: Path, mixed: Path, tmp_path: Path
) -> None:
    summary = json.loads(cli("serving", "classify", mixed, "--model", model, "--output", "out.jsonl", "--json").stdout)
    assert (summary["classified"], summary["rejected"], summary["found"]) == (len(USABLE), len(UNUSABLE), len(ORDER))
    assert summary["rejects_by_reason"] == {"empty": 2, "not-an-image": 2, "truncated": 1, "unsupported": 1}
    assert sum(summary["labels"].values()) == len(USABLE)
    rows = cli("serving", "classify", mixed, "--model", model, "--json").stdout
    assert rows == (tmp_path / "out.jsonl").read_text()


# --- inputs


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_gives_the_rows_of_its_folder(cli: Cli, model: Path, mixed: Path, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in ORDER:
                zipped.write(mixed / path, path)
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as tar:
            for path in ORDER:
                tar.add(mixed / path, path)
    cli("serving", "classify", archive, "--model", model, "--output", "archive.csv")
    cli("serving", "classify", mixed, "--model", model, "--output", "folder.csv")
    for ending in ("csv", "csv.rejects.jsonl"):
        assert (tmp_path / f"archive.{ending}").read_bytes() == (tmp_path / f"folder.{ending}").read_bytes()


def test_several_inputs_are_prefixed_as_given(cli: Cli, model: Path, mixed: Path, tmp_path: Path) -> None:
    assert mixed.is_dir()
    inputs = ["mixed/rgba.png", "mixed/a b/nested/", "./mixed/B.png"]
    cli("serving", "classify", *inputs, "--model", model, "--output", "out.csv")
    assert [row["path"] for row in csv_rows(tmp_path / "out.csv")] == [
        "mixed/rgba.png",
        "mixed/a b/nested/cmyk.jpg",
        "mixed/a b/nested/deep.png",
        "./mixed/B.png",
    ]


def test_names_that_are_not_utf_8_survive(cli: Cli, model: Path, tmp_path: Path) -> None:
    name = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    write(tmp_path / "in" / name, USABLE["B.png"])
    write(tmp_path / "in" / f"bad{name}", b"")
    cli("serving", "classify", "in", "--model", model, "--output", "out.csv")
    cli("serving", "classify", "in", "--model", model, "--output", "out.jsonl")
    assert [row["path"] for row in csv_rows(tmp_path / "out.csv")] == [name]
    assert [row["path"] for row in json_lines(tmp_path / "out.jsonl")] == [name]
    assert [row["path"] for row in json_lines(tmp_path / "out.csv.rejects.jsonl")] == [f"bad{name}"]


@pytest.mark.parametrize("given", ["in", "link"])
def test_the_output_is_not_its_own_input(cli: Cli, model: Path, tmp_path: Path, given: str) -> None:
    write(tmp_path / "in/1.png", USABLE["B.png"])
    (tmp_path / "link").symlink_to("in")
    for option in ([], ["--overwrite"]):
        result = cli("serving", "classify", given, "--model", model, "--output", "in/out.csv", *option)
        assert "classified 1 + rejected 0 == found 1" in result.stderr


def test_an_empty_folder_gives_an_empty_table(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    result = cli("serving", "classify", "in", "--model", model, "--output", "out.csv")
    assert (tmp_path / "out.csv").read_text() == "path,label,probability\n"
    assert "classified 0 + rejected 0 == found 0" in result.stderr
    assert "warning: nothing was found in in: no files, or only hidden ones" in result.stderr.splitlines()


# --- refusals and exit statuses


def test_strict_finishes_and_exits_3(cli: Cli, model: Path, mixed: Path, tmp_path: Path) -> None:
    cli("serving", "classify", mixed, "--model", model, "--output", "out.csv", "--strict", status=3)
    assert len(csv_rows(tmp_path / "out.csv")) == len(USABLE)
    cli("serving", "classify", mixed / "B.png", "--model", model, "--output", "good.csv", "--strict", status=0)


def test_an_existing_output_is_refused_and_kept_until_overwrite(
    cli: Cli, model: Path, mixed: Path, tmp_path: Path
) -> None:
    output = write(tmp_path / "out.csv", b"precious")
    before = tree(tmp_path)
    result = cli("serving", "classify", mixed, "--model", model, "--output", "out.csv", status=1)
    assert "--overwrite" in one_sentence(result.stderr)
    assert tree(tmp_path) == before
    cli("serving", "classify", mixed, "--model", model, "--output", "out.csv", "--overwrite")
    assert len(csv_rows(output)) == len(USABLE)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["mixed", "--output", "out.txt"], "out.txt", id="unknown-ending"),
        pytest.param(["mixed", "--output", "mixed"], "mixed", id="output-is-a-folder"),
        pytest.param(["nowhere", "--output", "out.csv"], "nowhere", id="missing-input"),
        pytest.param(["mixed", "--output", "out.csv", "--top-k", "11"], "10 classes", id="more-than-all-classes"),
        pytest.param(["mixed", "--output", "out.csv", "--model", "nowhere.onnx"], "nowhere.onnx", id="missing-model"),
        pytest.param(["mixed", "--output", "out.csv", "--model", "mixed/B.png"], "B.png", id="model-is-no-model"),
        pytest.param(["mixed", "--resume"], "--output", id="resume-of-stdout"),
    ],
)
def test_a_job_that_cannot_run_fails_with_one_sentence_and_writes_nothing(
    cli: Cli, model: Path, mixed: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    assert mixed.is_dir()
    before = tree(tmp_path)
    result = cli("serving", "classify", "--model", model, *arguments, status=1)
    assert says in one_sentence(result.stderr)
    assert result.stdout == "" and tree(tmp_path) == before


def test_a_damaged_archive_fails_with_one_sentence_and_no_table(cli: Cli, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "x.zip", b"no archive")
    result = cli("serving", "classify", "x.zip", "--model", model, "--output", "out.csv", status=1)
    assert "x.zip" in result.stderr and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["mixed"],
        ["--model", "m.onnx"],
        ["mixed", "--model", "m.onnx", "--bogus"],
        ["mixed", "--model", "m.onnx", "--provider", "abacus"],
        ["mixed", "--model", "m.onnx", "--top-k", "three"],
        ["mixed", "--model", "m.onnx", "--top-k", "0"],
        ["mixed", "--model", "m.onnx", "--batch-size", "0"],
        ["mixed", "--model", "m.onnx", "--threads", "-1"],
        ["mixed", "--model", "m.onnx", "--output", "out.csv", "--resume", "--overwrite"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(cli: Cli, model: Path, mixed: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert mixed.is_dir()
    shutil.copy(model, tmp_path / "m.onnx")
    cli("serving", "classify", *arguments, status=2)


# --- resume

COUNT = 2000
JOB = ("serving", "classify", "images", "--batch-size", 8)


@dataclass(frozen=True)
class Killed:
    """A folder of images, the outputs of an uninterrupted job, and the journal of a killed job."""

    folder: Path
    model: Path
    table: bytes
    rejects: bytes
    journal: bytes

    def run(self, output: Path, *options: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        return run_command(self.folder, *JOB, "--model", self.model, "--output", output, *options, status=status)

    def check(self, output: Path) -> None:
        """The outputs are byte for byte those of an uninterrupted job, and no other file remains."""
        assert output.read_bytes() == self.table
        assert output.with_name(output.name + ".rejects.jsonl").read_bytes() == self.rejects
        assert not output.with_name(output.name + ".partial").exists()


def stop(folder: Path, model: Path, output: Path, number: signal.Signals, after: int) -> int:
    """Start the job, send it a signal once its journal has `after` bytes, and return its exit status."""
    partial = output.with_name(output.name + ".partial")
    arguments = command(*JOB, "--model", model, "--output", output)
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > after):
            assert process.poll() is None, f"ended before it could be stopped: {process.stderr.read()!r}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate(timeout=120)
    assert not output.exists() and partial.stat().st_size > after
    return process.returncode


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("job")
    contents = [encode(noise(24, 24), "PNG") for _ in range(9)] + [b"garbage"]
    for index in range(COUNT):
        write(folder / f"images/part {index % 3}/{index:05}.png", contents[index % len(contents)])
    output = folder / "whole.csv"
    run_command(folder, *JOB, "--model", model, "--output", output)
    status = stop(folder, model, folder / "killed.csv", signal.SIGKILL, 10_000)
    assert status == -signal.SIGKILL
    rejects = folder / "whole.csv.rejects.jsonl"
    return Killed(
        folder, model, output.read_bytes(), rejects.read_bytes(), (folder / "killed.csv.partial").read_bytes()
    )


def test_the_uninterrupted_job_holds_every_file(killed: Killed) -> None:
    assert killed.table.count(b"\n") == COUNT * 0.9 + 1 and killed.rejects.count(b"\n") == COUNT * 0.1


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.all), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=str,
)
def test_a_stopped_job_resumes_to_the_same_bytes(
    killed: Killed, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    output = tmp_path / "out.csv"
    assert stop(killed.folder, killed.model, output, number, 10_000) == status
    summary = json.loads(killed.run(output, "--resume", "--json").stdout)
    assert 0 < summary["resumed"] < summary["found"] == COUNT
    assert (summary["classified"], summary["rejected"]) == (COUNT * 0.9, COUNT * 0.1)
    killed.check(output)


@pytest.mark.parametrize(
    "torn",
    [
        pytest.param(lambda journal: journal + b'{"path": "part 0/00', id="half-a-line"),
        pytest.param(lambda journal: journal[:-7], id="last-line-cut"),
        pytest.param(lambda journal: journal[: journal.index(b"\n") + 1], id="header-only"),
        pytest.param(lambda journal: journal[:20], id="half-a-header"),
        pytest.param(lambda _: b"", id="nothing"),
    ],
)
def test_a_torn_journal_resumes_to_the_same_bytes(killed: Killed, tmp_path: Path, torn: object) -> None:
    journal = torn(killed.journal)  # type: ignore[operator]
    write(tmp_path / "out.csv.partial", journal)
    summary = json.loads(killed.run(tmp_path / "out.csv", "--resume", "--json").stdout)
    assert summary["resumed"] == max(0, journal.count(b"\n") - 1) // 8 * 8  # whole batches
    killed.check(tmp_path / "out.csv")


def test_a_job_killed_just_before_its_table_appeared_resumes(killed: Killed, tmp_path: Path) -> None:
    header = killed.journal[: killed.journal.index(b"\n") + 1]
    whole_batch = killed.journal.splitlines(keepends=True)[1:9]  # and it is all there is
    entries = [json.loads(line) for line in whole_batch]
    for entry in entries:
        copy = tmp_path / "images" / entry["path"]
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(killed.folder / "images" / entry["path"], copy)
    write(tmp_path / "out.csv.partial", header + b"".join(whole_batch))
    options = ["--model", killed.model, "--output", "out.csv", "--resume", "--json"]
    summary = json.loads(run_command(tmp_path, *JOB, *options).stdout)
    assert summary["resumed"] == summary["found"] == 8
    rows, rejects = csv_rows(tmp_path / "out.csv"), json_lines(tmp_path / "out.csv.rejects.jsonl")
    assert sorted(entry["path"] for entry in rows + rejects) == sorted(entry["path"] for entry in entries)


def test_resume_of_a_job_that_never_began_runs_it(killed: Killed, tmp_path: Path) -> None:
    killed.run(tmp_path / "out.csv", "--resume")
    killed.check(tmp_path / "out.csv")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.all
@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_job_killed_again_and_again_ends_with_the_same_table(
    killed: Killed, tmp_path: Path, ending: str, kills: int
) -> None:
    whole, output = tmp_path / f"whole.{ending}", tmp_path / f"out.{ending}"
    killed.run(whole)
    for number in range(kills):
        arguments = command(*JOB, "--model", killed.model, "--output", output, "--resume")
        with subprocess.Popen(arguments, cwd=killed.folder, stderr=subprocess.PIPE) as process:
            kill_at_random(process, output, (number + random.random()) / kills)
            assert process.returncode == -signal.SIGKILL
    killed.run(output, "--resume")
    if ending == "parquet":
        assert pyarrow.parquet.read_table(output).equals(pyarrow.parquet.read_table(whole))
    else:
        assert output.read_bytes() == whole.read_bytes()
    assert Path(f"{output}.rejects.jsonl").read_bytes() == killed.rejects
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{path.name}{suffix}" for path in (whole, output) for suffix in ("", ".journal", ".rejects.jsonl")
    )


def kill_at_random(process: subprocess.Popen[bytes], output: Path, part: float) -> None:
    """Kill a job somewhere in the next part of its journal, the last time while it writes its table."""
    partial = output.with_name(output.name + ".partial")
    is_last = part > 0.9
    while process.poll() is None:
        lines = partial.read_bytes().count(b"\n") if partial.exists() else 0
        if list(output.parent.glob(f".{output.name}.*.tmp")) if is_last else lines > part * COUNT:
            time.sleep(random.random() / 200)
            process.kill()
            process.wait()
            return
    raise AssertionError(f"ended before it could be killed: {process.stderr and process.stderr.read()!r}")


def test_a_leftover_journal_is_refused_until_resume_or_overwrite(killed: Killed, tmp_path: Path) -> None:
    partial = write(tmp_path / "out.csv.partial", killed.journal)
    sentence = one_sentence(killed.run(tmp_path / "out.csv", status=1).stderr)
    assert "--resume" in sentence and "--overwrite" in sentence
    assert tree(tmp_path) == {str(partial): killed.journal}
    killed.run(tmp_path / "out.csv", "--overwrite")
    killed.check(tmp_path / "out.csv")


def another_run(proto: onnx.ModelProto) -> None:
    """The same network from another run: a valid model, but another file."""
    run = next(entry for entry in proto.metadata_props if entry.key == "convline.run")
    run.value = run.value.replace('"seed": 0', '"seed": 1')


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-k", 2], "top_k"),
        (["--batch-size", 16], "batch_size"),
        (["--model", "MODEL"], "model"),
        (["images/part 0"], "inputs"),
    ],
)
def test_resume_refuses_another_job(killed: Killed, tmp_path: Path, options: list[object], says: str) -> None:
    partial = write(tmp_path / "out.csv.partial", killed.journal)
    other = resealed(killed.model, tmp_path / "other.onnx", another_run)
    options = [other if option == "MODEL" else option for option in options]
    sentence = one_sentence(killed.run(tmp_path / "out.csv", "--resume", *options, status=1).stderr)
    assert says in sentence and "--overwrite" in sentence
    assert partial.read_bytes() == killed.journal and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_resume_refuses_another_listing(killed: Killed, tmp_path: Path, change: str) -> None:
    images = tmp_path / "images"
    shutil.copytree(killed.folder / "images/part 0", images / "part 0")
    if change == "added":
        write(images / "a new one.png", b"")
    elif change == "removed":
        (images / "part 0/00003.png").unlink()
    else:
        (images / "part 0/00003.png").rename(images / "part 0/00003 new.png")
    write(tmp_path / "out.csv.partial", killed.journal)
    options = ["--model", killed.model, "--output", "out.csv", "--resume"]
    result = run_command(tmp_path, *JOB, *options, status=1)
    assert "the input changed" in result.stderr and "--overwrite" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_resume_of_a_finished_job_changes_nothing(killed: Killed) -> None:
    output = killed.folder / "whole.csv"
    before = output.stat()
    killed.run(output, "--resume")
    assert output.read_bytes() == killed.table
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("option", ["--resume", "--overwrite", None])
def test_a_second_job_into_one_output_is_refused(killed: Killed, tmp_path: Path, option: str | None) -> None:
    partial = write(tmp_path / "out.csv.partial", killed.journal)
    with partial.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = killed.run(tmp_path / "out.csv", *([option] if option else []), status=1)
    assert "out.csv.partial" in one_sentence(result.stderr)
    assert tree(tmp_path) == {str(partial): killed.journal}


def test_a_carriage_return_in_a_name_does_not_break_a_row(cli: Cli, model: Path, tmp_path: Path) -> None:
    for name in ("a\rb.png", 'c"d,e\n.png'):
        write(tmp_path / "in" / name, USABLE["B.png"])
    cli("serving", "classify", "in", "--model", model, "--output", "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["a\rb.png", 'c"d,e\n.png']


def test_resuming_a_finished_job_prints_its_summary_again(cli: Cli, model: Path, mixed: Path) -> None:
    assert mixed.is_dir()
    job = ("serving", "classify", "mixed", "--model", model, "--output", "out.csv", "--json")
    first = json.loads(cli(*job).stdout)
    again = json.loads(cli(*job, "--resume", "--strict", status=3).stdout)
    same = ("found", "classified", "rejected", "rejects_by_reason", "labels")
    assert {key: first[key] for key in same} == {key: again[key] for key in same}

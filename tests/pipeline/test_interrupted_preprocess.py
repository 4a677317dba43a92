"""`pipeline preprocess` after a kill, at any moment: the same command goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from convline.files import exclusive
from pipeline.preparing import decoding_journal
from pipeline.preparing.decoding_journal import DECODED, JOURNAL
from pipeline.preparing.image_folder import ImageFolderOptions
from pipeline.preprocess import preprocess
from tests.conftest import ROOT
from tests.pipeline.helpers import archive, contents, refused

OPTIONS = ImageFolderOptions((24, 32))
ALL = pytest.mark.all

# prepares the images argv[2] in the folder argv[1]; the journal is written after each batch, of eight images
PREPARE = """
import os, signal, sys, time
from pathlib import Path
from convline import console, files
from pipeline import preprocess as stage
from pipeline.preparing import decoding_journal, image_folder, parallel_decoding

decoding_journal.SECONDS_BETWEEN_SAVES, decoding_journal.SHARE_OF_TIME = 0, 1e9
parallel_decoding.map_in_processes.__defaults__ = (8, 60.0)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

{}
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda received, _: sys.exit(128 + received))
stage.preprocess(
    "pets", Path(sys.argv[1]), Path(sys.argv[2]), image_folder.ImageFolderOptions((24, 32)), overwrite="-o" in sys.argv
)
"""

DIES: dict[str, str] = {
    "before the first batch": "decoding_journal.DecodingJournal.add = die",
    "after a few batches": """
add = decoding_journal.DecodingJournal.add
def add_and_die(journal, result):
    add(journal, result)
    if len(journal.done.digests) > 100:
        die()
decoding_journal.DecodingJournal.add = add_and_die
""",
    "while a line is written": """
line = decoding_journal._line
def half_a_line(fields):
    if "digests" in fields and "150" in map(str, fields["digests"]):
        path = next(Path(sys.argv[1]).glob(".pets.*.tmp/decoding.jsonl"))
        path.open("ab").write(line(fields)[:50])
        die()
    return line(fields)
decoding_journal._line = half_a_line
""",
    "when all are decoded": "stage.first_equal = die",
    "when the images are about to be moved": "stage.write_splits = die",
    "while the images are moved": """
from pipeline.preparing import split_arrays
split_arrays._move_end = die
""",
    "before the dataset takes its place": "files.sync_files = die",
    "when the dataset has taken its place": "stage.Dataset.open = die",
}


def photographs(folder: Path, count: int, size: tuple[int, int] = (60, 80)) -> Path:
    """JPEGs of noise in two classes, and one file in a hundred that is none."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / "cd"[number % 2] / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path, quality=80)
        if number % 100 == 50:
            path.write_bytes(b"GIF8, but not really")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("source") / "photographs", 300)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    data = tmp_path_factory.mktemp("expected")
    preprocess("pets", data, source, OPTIONS)
    return contents(data)


def start(data: Path, source: Path, patch: str = "", *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE.format(patch), data, source, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def killed(data: Path, source: Path, patch: str, *arguments: str) -> None:
    process = start(data, source, patch, *arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors


def decoded_rows(data: Path) -> int:
    """How many images the journal of an interrupted job names."""
    journals = list(data.glob(f".pets.*.tmp/{JOURNAL}"))
    lines = journals[0].read_bytes().splitlines()[1:] if journals else []
    return sum(len(json.loads(line)["digests"]) for line in lines if line.endswith(b"}"))


FAST = ("after a few batches", "while the images are moved")


@pytest.mark.parametrize("moment", [pytest.param(name, marks=() if name in FAST else ALL) for name in DIES])
def test_after_a_kill_the_same_command_ends_as_if_nothing_had_happened(
    tmp_path: Path, source: Path, expected: dict[str, bytes | None], moment: str, capfd: pytest.CaptureFixture[str]
) -> None:
    killed(tmp_path, source, DIES[moment])
    capfd.readouterr()
    if moment == "when the dataset has taken its place":
        with refused("exists"):
            preprocess("pets", tmp_path, source, OPTIONS)
    else:
        preprocess("pets", tmp_path, source, OPTIONS)
    assert contents(tmp_path) == expected
    goes_on = {"after a few batches", "while a line is written", "when all are decoded"}
    assert ("going on: " in capfd.readouterr().err) == (moment in goes_on | {"before the first batch"})


def test_nothing_is_decoded_twice(
    tmp_path: Path, source: Path, expected: dict[str, bytes | None], capfd: pytest.CaptureFixture[str]
) -> None:
    killed(tmp_path, source, DIES["after a few batches"])
    count = decoded_rows(tmp_path)
    assert 100 < count < 300
    decoded = next(tmp_path.glob(f".pets.*.tmp/{DECODED}"))
    before = decoded.stat().st_ino
    process = start(tmp_path, source, DIES["when all are decoded"])
    _, errors = process.communicate(timeout=60)
    assert f"going on: {count} images were decoded before" in errors
    assert decoded.stat().st_ino == before and decoded_rows(tmp_path) == 300
    preprocess("pets", tmp_path, source, OPTIONS)
    assert "going on: 300 images" in capfd.readouterr().err
    assert contents(tmp_path) == expected


def test_processes_of_a_killed_job_do_not_write_into_what_goes_on(
    tmp_path: Path, source: Path, expected: dict[str, bytes | None]
) -> None:
    """Its workers finish their batches, of wrong pixels, while the next job would be moving images."""
    slow = """
decode = parallel_decoding.decode_with_size
def wrong(data, spec):
    pixels, size = decode(data, spec)
    os.kill(parent, signal.SIGKILL)
    time.sleep(0.2)
    return pixels * 0, size
parent = os.getpid()
image_folder.size_of_first_image = lambda *_: (24, 32)
parallel_decoding.decode_with_size = wrong
"""
    killed(tmp_path, source, slow)
    preprocess("pets", tmp_path, source, OPTIONS)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=ALL)])
def test_an_interrupted_job_says_that_its_work_is_kept(
    tmp_path: Path, source: Path, expected: dict[str, bytes | None], number: signal.Signals
) -> None:
    patch = DIES["after a few batches"].replace("die()", f"os.kill(os.getpid(), {int(number)})")
    process = start(tmp_path, source, patch)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "the same command goes on" in errors
    assert decoded_rows(tmp_path) > 100 and not (tmp_path / ".pets.lock").exists()
    preprocess("pets", tmp_path, source, OPTIONS)
    assert contents(tmp_path) == expected


def test_an_interruption_without_decoded_images_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.preprocess.write_splits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        preprocess("pets", tmp_path, source, OPTIONS)
    assert contents(tmp_path) == {}


def change_a_file(source: Path) -> None:
    status = (source / "c/0000.jpg").stat()
    shutil.copy(source / "c/0002.jpg", source / "c/0000.jpg")
    os.utime(source / "c/0000.jpg", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def add_a_file(source: Path) -> None:
    Image.new("RGB", (80, 60), "red").save(source / "c/new.jpg")


def remove_a_file(source: Path) -> None:
    (source / "c/0050.jpg").unlink()


@pytest.mark.parametrize(
    "change", [change_a_file, *(pytest.param(one, marks=ALL) for one in (add_a_file, remove_a_file))]
)
def test_what_was_decoded_of_a_source_that_has_changed_is_thrown_away(
    tmp_path: Path, source: Path, change: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(source, tmp_path / "photographs")
    killed(tmp_path / "data", copy, DIES["after a few batches"])
    change(copy)
    preprocess("pets", tmp_path / "data", copy, OPTIONS)
    assert "the source changed since decoding was interrupted" in capfd.readouterr().err
    preprocess("pets", tmp_path / "expected", copy, OPTIONS)
    assert contents(tmp_path / "data") == contents(tmp_path / "expected")


@pytest.mark.all
@pytest.mark.parametrize("options", [ImageFolderOptions((24, 24)), ImageFolderOptions((24, 32), fit="pad")])
def test_what_was_decoded_with_other_options_is_thrown_away(
    tmp_path: Path, source: Path, options: ImageFolderOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    killed(tmp_path / "data", source, DIES["after a few batches"])
    preprocess("pets", tmp_path / "data", source, options)
    assert "the options changed since decoding was interrupted" in capfd.readouterr().err
    preprocess("pets", tmp_path / "expected", source, options)
    assert contents(tmp_path / "data") == contents(tmp_path / "expected")


@pytest.mark.all
def test_parquet_files_go_on_unless_one_has_changed(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted(source.rglob("*.jpg"))
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pyarrow.table({"image": images, "label": [file.parent.name for file in files]})
    packed = tmp_path / "packed/data.parquet"
    packed.parent.mkdir()
    pyarrow.parquet.write_table(table, packed)
    preprocess("pets", tmp_path / "expected", packed.parent, OPTIONS)
    for message in ("going on: ", "the source changed"):
        killed(tmp_path / "data", packed.parent, DIES["after a few batches"])
        if message == "the source changed":
            os.utime(packed, (1, 1))
        preprocess("pets", tmp_path / "data", packed.parent, OPTIONS)
        assert message in capfd.readouterr().err
        assert contents(tmp_path / "data") == contents(tmp_path / "expected")
        shutil.rmtree(tmp_path / "data")


@pytest.mark.all
def test_an_archive_goes_on_unless_it_has_changed(
    tmp_path: Path, source: Path, expected: dict[str, bytes | None], capfd: pytest.CaptureFixture[str]
) -> None:
    packed = archive(shutil.copytree(source, tmp_path / "photographs"), ".tar.gz")
    for message in ("going on: ", "the source changed"):
        killed(tmp_path / "data", packed, DIES["after a few batches"])
        if message == "the source changed":
            os.utime(packed, (1, 1))
        prepared = preprocess("pets", tmp_path / "data", packed, OPTIONS)
        assert message in capfd.readouterr().err
        stored = contents(tmp_path / "data")
        assert all(stored[name] == expected[name] for name in ("pets/train.images.npy", "pets/test.labels.npy"))
        shutil.rmtree(prepared.folder)


@pytest.mark.all
def test_a_killed_overwrite_keeps_the_earlier_dataset_and_goes_on(
    tmp_path: Path, source: Path, expected: dict[str, bytes | None], capfd: pytest.CaptureFixture[str]
) -> None:
    preprocess("pets", tmp_path, source, ImageFolderOptions((8, 8)))
    before = contents(tmp_path / "pets")
    killed(tmp_path, source, DIES["after a few batches"], "-o")
    assert contents(tmp_path / "pets") == before
    with refused("exists", unchanged=tmp_path / "pets"):
        preprocess("pets", tmp_path, source, OPTIONS)
    preprocess("pets", tmp_path, source, OPTIONS, overwrite=True)
    assert "going on: " in capfd.readouterr().err
    assert contents(tmp_path) == expected


def test_a_dataset_is_prepared_by_one_process_at_a_time(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convline.files.LOCK_SECONDS", 0.0)
    with exclusive(tmp_path / ".pets.lock", "pets"), refused("another job is writing", "pets", unchanged=tmp_path):
        preprocess("pets", tmp_path, source, OPTIONS)
    assert contents(tmp_path) == {}


def test_the_pixels_are_durable_before_the_journal_names_them(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_journal, "SECONDS_BETWEEN_SAVES", 0.0)
    events = []
    flush, line = np.memmap.flush, decoding_journal._line

    def recorded_flush(images: np.memmap) -> None:
        flush(images)
        events.append("flush")

    def recorded_line(fields: dict[str, object]) -> bytes:
        events.append("line")
        return line(fields)

    monkeypatch.setattr(np.memmap, "flush", recorded_flush)
    monkeypatch.setattr(decoding_journal, "_line", recorded_line)
    preprocess("pets", tmp_path, source, OPTIONS)
    lines = [number for number, event in enumerate(events) if event == "line"]
    assert len(lines) > 1 and all(events[number - 1] == "flush" for number in lines[1:])


@pytest.mark.slow
def test_killed_at_twenty_moments_of_its_duration(tmp_path: Path) -> None:
    """Moments from its start to its end; after each kill the job is started once more, to its end."""
    source = photographs(tmp_path / "photographs", 600, (480, 640))
    durations = []
    for name in ("undisturbed", "again"):
        started = time.monotonic()
        process = start(tmp_path / name, source)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        durations.append(time.monotonic() - started)
    expected = contents(tmp_path / "undisturbed")
    resumed = kills = 0
    for moment in range(20):
        data = tmp_path / str(moment)
        process = start(data, source)
        try:
            process.wait(min(durations) * (moment + 1) / 21)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        resumed += decoded_rows(data) > 0
        if not (data / "pets").exists():
            process = start(data, source)
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        else:
            with refused("exists"):
                preprocess("pets", data, source, OPTIONS)
        assert contents(data) == expected
    assert kills >= 10 and resumed >= 5

"""Files and folders appear whole or not at all, and links under their names are not followed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from convline import files
from convline.errors import ConvlineError
from convline.files import (
    atomic_write,
    move_to_new_name,
    name_on_disk,
    new_folder,
    open_in_place,
    remove_leftovers,
    temporary_path,
)
from pipeline.dataset import Dataset
from pipeline.preprocess import preprocess
from pipeline.recipe import load
from pipeline.run import Run
from pipeline.train import train
from serving.journal import Journal
from tests.conftest import ROOT
from tests.serving.helpers import write


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file that must not be written to."""
    return write(tmp_path / "elsewhere/precious", b"precious")


def test_a_link_under_a_temporary_name_is_neither_followed_nor_replaced(
    tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = iter(["foreseen", "unforeseen"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    trap = tmp_path / ".out.csv.foreseen.tmp"
    trap.symlink_to(precious)
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "out.csv"):
        raise AssertionError("it was opened")
    assert trap.is_symlink() and precious.read_bytes() == b"precious"
    with atomic_write(tmp_path / "out.csv", "w", encoding="utf-8") as file:
        file.write("é")
    assert (tmp_path / "out.csv").read_text("utf-8") == "é"


def test_temporary_names_are_unique(tmp_path: Path) -> None:
    assert len({temporary_path(tmp_path / "x") for _ in range(1000)}) == 1000
    assert temporary_path(tmp_path / "x").match(".x.*.tmp")


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, os.fsdecode(b"\xff" * 255)])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name) as file:
        file.write(b"1")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path, precious: Path) -> None:
    leftover = write(tmp_path / ".out.csv.00aa.tmp", b"half")
    others = [write(tmp_path / name, b"x") for name in (".out.csv.2.00aa.old", "out.csv.00aa.tmp", ".out.tsv.00aa.tmp")]
    trap, pipe = tmp_path / ".out.csv.00bb.tmp", tmp_path / ".out.csv.00cc.tmp"
    trap.symlink_to(precious)
    os.mkfifo(pipe)  # which would block whoever opens it
    with atomic_write(tmp_path / "out.csv") as file:
        remove_leftovers(tmp_path / "out.csv")
        file.write(b"new")
    assert not leftover.exists() and all(path.exists() for path in others)
    assert trap.is_symlink() and precious.exists() and (tmp_path / "out.csv").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["symbolic", "dangling", "hard", "fifo"])
@pytest.mark.timeout(30)
def test_a_journal_is_refused_if_it_is_a_link(tmp_path: Path, precious: Path, kind: str) -> None:
    path = tmp_path / "out.csv.partial"
    if kind == "hard":
        os.link(precious, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(precious if kind == "symbolic" else tmp_path / "new")
    for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(ConvlineError, match=r"out\.csv\.partial is a link, or not a regular file; remove it"):
            Journal(path, {"batch_size": 1}, **options)
    assert precious.read_bytes() == b"precious" and not (tmp_path / "new").exists()


def test_a_file_that_is_opened_as_a_lock_keeps_its_content(tmp_path: Path, precious: Path) -> None:
    os.link(precious, tmp_path / "lock")  # as in a copy that was made of links
    open_in_place(tmp_path / "lock", "w").close()
    (tmp_path / "other").symlink_to(precious)
    with pytest.raises(ConvlineError, match="remove it"):
        open_in_place(tmp_path / "other", "w")
    assert precious.read_bytes() == b"precious"


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    write(tmp_path / "data/pets/old", b"1")
    with suppress(KeyError), new_folder(tmp_path / "data/pets") as folder:
        write(folder / "half", b"2")
        raise KeyError
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["pets", "old"]
    with new_folder(tmp_path / "data/pets") as folder:
        assert (tmp_path / "data/pets/old").exists()
        write(folder / "new", b"2")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["pets", "new"]


def test_a_link_in_place_of_a_temporary_folder_is_not_entered(
    tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / ".pets.00aa.tmp"
    trap.symlink_to(precious.parent)
    with new_folder(tmp_path / "pets"):
        pass
    monkeypatch.setattr("secrets.token_hex", lambda _: "00aa")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "pets"):
        raise AssertionError("it was entered")
    assert trap.is_symlink() and precious.read_bytes() == b"precious"


def test_folders_of_running_processes_are_not_touched(tmp_path: Path) -> None:
    with new_folder(tmp_path / "pets") as first:
        write(first / "x", b"1")
        with new_folder(tmp_path / "pets") as second:
            assert (first / "x").exists() and second != first
    assert [path.name for path in tmp_path.rglob("*")] == ["pets", "x"]


KILLED_WHILE_REPLACING = """
import os, signal, sys
from pathlib import Path
from convline.files import new_folder

rename = Path.rename

def rename_and_die(path, target):
    rename(path, target)
    os.kill(os.getpid(), signal.SIGKILL)

Path.rename = rename_and_die
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "new").write_bytes(b"new")
"""


def kill_while_replacing(folder: Path) -> None:
    """Kill a process between the two renames by which it replaces a folder."""
    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_REPLACING, folder], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL and not folder.exists()


OPENERS: dict[str, Callable[[Path], object]] = {
    "a dataset": lambda project: Dataset.open(project / "data", "digits"),
    "a run by its folder": lambda project: Run.open(project / "runs/digits"),
    "a run by its name": lambda project: Run.find(project / "runs", "digits"),
    "the newest run": lambda project: Run.find(project / "runs", None),
}


@pytest.mark.parametrize("opener", OPENERS)
def test_whoever_opens_a_folder_restores_it_after_its_replacement_was_killed(own_project: Path, opener: str) -> None:
    expected = OPENERS[opener](own_project)
    folder = own_project / ("data/digits" if opener == "a dataset" else "runs/digits")
    kill_while_replacing(folder)
    assert OPENERS[opener](own_project) == expected
    assert [path for path in folder.parent.iterdir() if path.name.endswith(".old")] == []


def test_a_folder_whose_replacement_was_killed_is_not_replaced_without_overwrite(own_project: Path) -> None:
    run, dataset = own_project / "runs/digits", own_project / "data/digits"
    kill_while_replacing(run)
    kill_while_replacing(dataset)
    with pytest.raises(ConvlineError, match="digits exists"):
        preprocess("digits", own_project / "data")
    with pytest.raises(ConvlineError, match="digits exists: --resume"):
        train(load("digits"), run, own_project / "data", tracking=False)
    assert (run / "model.onnx").exists() and (dataset / "meta.json").exists()


def test_a_folder_that_a_running_process_replaces_is_not_restored(tmp_path: Path) -> None:
    write(tmp_path / "pets/old", b"1")
    (tmp_path / "pets").rename(tmp_path / ".pets.00aa.old")
    with files._marked_as_in_use(tmp_path / ".pets.00aa.old"):
        files.restore_folder(tmp_path / "pets")
        assert not (tmp_path / "pets").exists()
    files.restore_folder(tmp_path / "pets")
    assert (tmp_path / "pets/old").exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_finished_file_takes_no_name_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.delattr(os, "link")
    move_to_new_name(write(tmp_path / "first", b"1"), tmp_path / "new")
    with pytest.raises(FileExistsError):
        move_to_new_name(write(tmp_path / "second", b"2"), tmp_path / "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"new": b"1", "second": b"2"}


@pytest.mark.parametrize("name", ["cat", "a.png", "日本", ".hidden", "x" * 255, os.fsdecode(b"\xff.png")])
def test_a_valid_name_is_kept(name: str) -> None:
    assert name_on_disk(name) == name


def test_an_invalid_name_becomes_a_unique_one(tmp_path: Path) -> None:
    odd = ["a/b", "a_b/", "a\0b", "", ".", "..", "/", "x" * 256, "x" * 257, "é" * 200, "é" * 201, "\ud800", "\ud801"]
    odd += ["a/b.png", "a\0b.png", "y" * 300 + ".png", "z." + "y" * 300]
    names = [name_on_disk(name) for name in (*odd, "a_b", "_", "x" * 150, "a_b.png")]
    for name in names:
        (tmp_path / name).mkdir()  # fails where there is one
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [name_on_disk(name)[-4:] for name in odd[13:16]] == [".png"] * 3
    assert all(len(os.fsencode(name)) <= files.MAX_NAME for name in names)

"""Everything can be imported, and images are classified and prepared, on systems that lack fcntl, fork and the like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.preparing.decoded_source import create_array
from pipeline.tracking.deadline import time_limit
from tests.conftest import ROOT, Cli, run_process
from tests.serving.helpers import encode, noise, write

# what macOS or Windows, or both, lack
MISSING = {
    "os": [
        *("posix_fallocate", "uname", "fork", "forkpty", "register_at_fork", "nice", "sched_getaffinity", "link"),
        *("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "closerange", "sysconf"),
    ],
    "signal": ["SIGALRM", "setitimer", "ITIMER_REAL", "pthread_sigmask", "SIG_BLOCK", "SIG_UNBLOCK"],
    "mmap": ["MADV_DONTNEED"],
}
WITHOUT = f"""
import importlib, mmap, os, shutil, signal, sys
for name in os.environ["IMPORTED_FIRST"].split():
    importlib.import_module(name)

for module, names in {MISSING!r}.items():
    for name in names:
        delattr(importlib.import_module(module), name)
sys.modules["fcntl"] = sys.modules["resource"] = None
open_file = os.open

def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)  # as on Windows
    return open_file(path, *arguments, **options)

os.open = open_no_folder
shutil._use_fd_functions = False
import convline.files
convline.files.IS_WINDOWS = True
"""
IMPORT_ALL = """
import importlib, os, pkgutil
assert not hasattr(os, "fork")
try:
    import fcntl
except ImportError:
    pass
else:
    raise AssertionError("fcntl is there")
count = 0
for name in ("convline", "models", "serving", "pipeline"):
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
print(count)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds nothing of `MISSING`."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT)
    # whose versions for Linux need some of it
    return {"PYTHONPATH": f"{folder}:{ROOT}", "IMPORTED_FIRST": "numpy psutil"}


def test_every_module_can_be_imported(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    write(tmp_path / "import_all.py", IMPORT_ALL.encode())
    environment = {**elsewhere, "IMPORTED_FIRST": "numpy psutil torch"}
    assert int(run_process(tmp_path, "import_all", status=0, **environment).stdout) > 100


@pytest.fixture(scope="module")
def many(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 digits and a few files that are no images, one of them cut in half."""
    folder = tmp_path_factory.mktemp("many")
    for copy in ("first", "second"):
        shutil.copytree(samples, folder / copy)
    for number in range(7):
        write(folder / f"first/{number}/broken.png", b"garbage")
    write(folder / "first/1/half.png", encode(noise(8, 8), "PNG")[:60])
    return folder


@pytest.mark.parametrize("batch_size", [16, 512])  # many batches, and a single one, which the workers share
def test_a_folder_is_classified_as_on_linux(
    cli_process: Cli, tmp_path: Path, model: Path, many: Path, elsewhere: dict[str, str], batch_size: int
) -> None:
    command = ("serving", "classify", many, "--model", model, "--batch-size", batch_size, "--threads", 3)
    summary = json.loads(cli_process(*command, "--output", "expected.csv", "--json").stdout)
    assert (summary["found"], summary["rejected"]) == (208, 8)
    cli_process(*command, "--output", "table.csv", "--json", **elsewhere)
    for ending in ("", ".rejects.jsonl"):
        expected = (tmp_path / f"expected.csv{ending}").read_bytes()
        assert expected and (tmp_path / f"table.csv{ending}").read_bytes() == expected
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".partial"))]


def test_a_dataset_is_prepared_as_on_linux(
    cli_process: Cli, tmp_path: Path, samples: Path, elsewhere: dict[str, str]
) -> None:
    command = ("pipeline", "preprocess", "pets", "--source", samples, "--data-dir")
    cli_process(*command, "expected")
    for options in ((), ("--overwrite",)):
        cli_process(*command, "data", *options, **elsewhere)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected/pets").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "data/pets").iterdir()} == expected
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["pets"]


def test_arrays_have_their_blocks_reserved_without_posix_fallocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("pipeline.preparing.decoded_source.ZEROS", 1000)
    array = create_array(tmp_path / "array.npy", (100, 101))
    status = (tmp_path / "array.npy").stat()
    assert status.st_blocks * 512 >= status.st_size > array.nbytes
    assert array.shape == np.load(tmp_path / "array.npy").shape and not array.any()


def test_without_timers_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # pytest itself needs it afterwards
        patch.delattr("signal.setitimer")
        with time_limit(0.001):
            pass

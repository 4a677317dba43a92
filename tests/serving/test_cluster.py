"""A job on a real Ray cluster gives the same bytes as a local one, also after workers or the driver die."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from convline.errors import ConvlineError
from serving.classify import classify
from serving.job import Job
from serving.ray_cluster import classify_on_ray
from serving.summary import RescanCounts
from tests.conftest import command
from tests.serving.helpers import encode, noise, write

pytestmark = [pytest.mark.all, pytest.mark.filterwarnings("ignore")]  # Ray's own

COUNT = 10_000
PARTS = 16  # of two workers


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Ten thousand files, and the outputs of a local job."""
    folder = tmp_path_factory.mktemp("cluster")
    contents = [encode(noise(8, 8), "PNG") for _ in range(99)] + [b"garbage"]
    for number in range(COUNT):
        write(folder / f"in/{number % 10}/{number:05}.png", contents[number % len(contents)])
    local = Job([str(folder / "in")], model, folder / "local.csv", provider="cpu", top_k=2, threshold=0.9)
    classify(local)
    return local


def check(job: Job, output: Path) -> None:
    """The outputs are byte for byte those of the local job, and no other file remains."""
    assert job.output is not None
    for ending in ("", ".rejects.jsonl"):
        assert Path(f"{output}{ending}").read_bytes() == Path(f"{job.output}{ending}").read_bytes()
    assert not Path(f"{output}.shards").exists()


def arguments(job: Job, output: Path | str, address: str, *options: object) -> list[str]:
    where = ("--output", output, "--engine", "ray", "--address", address, "--json")
    settings = ("--top-k", 2, "--threshold", 0.9, "--provider", "cpu")
    return command("serving", "classify", *job.inputs, "--model", job.model, *where, *settings, *options)


def started(job: Job, output: Path, address: str, shards: int) -> subprocess.Popen[str]:
    """A driver that has finished some shards and is working on the next ones."""
    process = subprocess.Popen(
        arguments(job, output, address), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folder = Path(f"{output}.shards")
    while len(list(folder.glob("*.jsonl"))) < shards or not list(folder.glob("*.partial")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def test_a_cluster_writes_the_bytes_of_one_machine(job: Job, tmp_path: Path, address: str) -> None:
    summary = classify_on_ray(replace(job, output=tmp_path / "out.csv"), address)
    check(job, tmp_path / "out.csv")
    assert (summary.tally.found, summary.tally.rejected, summary.resumed) == (COUNT, COUNT // 100, 0)
    one_machine = replace(job, output=tmp_path / "out.csv", rescan=True)
    assert classify(one_machine).rescan == RescanCounts(COUNT, 0, 0, 0)  # with the journal that Ray has left


def test_a_killed_worker_costs_no_file(job: Job, tmp_path: Path, address: str) -> None:
    output = tmp_path / "out.csv"
    with started(job, output, address, shards=PARTS // 4) as driver:
        workers = [
            p
            for p in psutil.process_iter(["cmdline"])
            if (p.info["cmdline"] or [""])[0].startswith("ray::classify_shard")
        ]
        assert workers
        workers[0].kill()
        stdout, stderr = driver.communicate(timeout=120)
    assert driver.returncode == 0, stderr
    assert json.loads(stdout)["found"] == COUNT, stdout
    check(job, output)


def test_a_driver_that_was_killed_continues_where_it_was(job: Job, tmp_path: Path, address: str) -> None:
    output = tmp_path / "out.csv"
    with started(job, output, address, shards=PARTS // 2) as driver:
        driver.send_signal(signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in Path(f"{output}.shards").glob("*.jsonl")}
    assert len(finished) >= PARTS // 2
    on_ray = replace(job, output=output)
    with pytest.raises(ConvlineError, match=r"--resume continues it, --overwrite"):
        classify_on_ray(on_ray, address)
    with pytest.raises(ConvlineError, match="different settings: top_k;"):
        classify_on_ray(replace(on_ray, top_k=1, resume=True), address)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    summary = classify_on_ray(replace(on_ray, resume=True), address)
    assert summary.resumed >= COUNT // 2 * 0.9
    check(job, output)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_driver_says_what_it_keeps(
    job: Job, tmp_path: Path, address: str, number: signal.Signals, status: int
) -> None:
    with started(job, tmp_path / "out.csv", address, shards=1) as driver:
        driver.send_signal(number)
        _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == status, stderr
    assert "out.csv.shards keeps what is finished: --resume continues from there" in stderr


def test_a_second_driver_is_refused_even_to_overwrite(job: Job, tmp_path: Path, address: str) -> None:
    output = tmp_path / "out.csv"
    with started(job, output, address, shards=1) as driver:
        with pytest.raises(ConvlineError, match="another job is writing"):
            classify_on_ray(replace(job, output=output, overwrite=True), address)
        driver.communicate(timeout=120)
    assert driver.returncode == 0
    check(job, output)


def test_what_the_cluster_does_not_have_is_refused_at_once(job: Job, tmp_path: Path, address: str) -> None:
    for change, says in (({"threads": 8}, "8 CPU"), ({"provider": "cuda"}, "1 GPU")):
        with pytest.raises(ConvlineError, match=f"a shard takes {says}; no machine of the cluster has more than"):
            classify_on_ray(replace(job, output=tmp_path / "out.csv", **change), address)


def test_a_job_inside_of_its_input(job: Job, tmp_path: Path, address: str) -> None:
    for number in range(200):
        write(tmp_path / f"{number:03}.png", encode(noise(8, 8), "PNG"))
    small = replace(job, inputs=[str(tmp_path)], output=tmp_path / "out.csv")
    assert classify_on_ray(small, address).tally.found == 200
    assert classify_on_ray(replace(small, resume=True), address).resumed == 200  # it is complete


def test_an_input_that_changed_is_refused(job: Job, tmp_path: Path, address: str) -> None:
    write(tmp_path / "in/1.png", encode(noise(8, 8), "PNG"))
    small = replace(job, inputs=[str(tmp_path / "in")], output=tmp_path / "out.csv")
    classify_on_ray(small, address)
    shards = tmp_path / "out.csv.shards"
    write(shards / "job.json", json.dumps({"listing": "another"}).encode())
    (tmp_path / "out.csv").unlink()
    with pytest.raises(ConvlineError, match=r"different settings: .*listing"):
        classify_on_ray(replace(small, resume=True), address)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": ["nowhere"]}, "no Ray cluster at nowhere:1"),
        ({"shard": (1, 2)}, "cannot be combined with - or --shard"),
        ({"rescan": True}, "--rescan is not for --engine ray; bring the finished table up to date without Ray"),
        ({"inputs": ["-"]}, "cannot be combined with - or"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_ray_starts(job: Job, change: dict[str, object], says: str) -> None:
    with pytest.raises(ConvlineError, match=says):
        classify_on_ray(replace(job, output=Path("nowhere.csv"), **change), "nowhere:1")  # type: ignore[arg-type]


def test_an_address_without_ray_is_wrong_usage(job: Job, tmp_path: Path) -> None:
    wrong = [word for word in arguments(job, tmp_path / "out.csv", "x:1") if word not in ("--engine", "ray")]
    assert subprocess.run(wrong, capture_output=True).returncode == 2


def test_shards_and_table_in_an_object_store(job: Job, tmp_path: Path, address: str) -> None:
    """Through the command, and by a URL: to a worker that is another process, file:// is as good as s3://."""
    store = tmp_path / "bucket"
    store.mkdir()
    url = f"file://{store}/out.csv"
    done = subprocess.run(arguments(job, url, address), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(job, store / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket"]

"""What IO binding brings on a GPU: the runs of a job with it, and without it.

    python benchmarks/bound_runs.py runs/cifar10/model.onnx [MODEL.onnx…] [--provider cuda] [--batch 64] [--rounds 9]

Each way takes the same batches, each from another buffer, as decoding processes leave them, and makes the records of a
job; they alternate, and the medians of all rounds are compared.
    run           session.run, then the records, one batch after the other
    bound         serving/bound_runs.py: the next batch is copied and computed while records are made
    bound, pinned the same from page-locked memory: what registering the shared buffers with CUDA would bring
    threads       session.run on two other threads: the same overlap, and that of two runs, without binding
    model alone   session.run without records, and without another buffer for each batch
`--provider cpu` tries the script. The table on a GPU belongs into benchmarks/results/bound_runs.txt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated

import numpy as np
import torch
import typer
from machine import hardware, versions
from numpy.typing import NDArray

from convline.inputs.input_file import InMemory, InputFile
from pipeline.exporting.timing import seconds_per_call
from serving import Classifier
from serving.batch_size import SERVING_BATCH
from serving.bound_runs import BoundRuns, Outputs, one_behind
from serving.session import Provider

BUFFERS = 16
SECONDS = 0.5  # of each way in a round, at least


def main(
    models: Annotated[list[str], typer.Argument(help="ONNX files of convline.")],
    provider: str = "cuda",
    batch: int = SERVING_BATCH,
    rounds: int = 9,
) -> None:
    print(f"{hardware(1)}; {versions('torch', 'onnxruntime-gpu', 'onnxruntime', 'convline')}")
    print(f"provider {provider}, batches of {batch}; images/s, medians of {rounds} rounds; in brackets: times `run`")
    for name in models:
        with Classifier(name, as_provider(provider), threads=1, batch_size=batch) as classifier:
            compare(name, classifier, rounds)


def as_provider(name: str) -> Provider:
    if name not in ("cpu", "cuda", "tensorrt"):
        raise typer.BadParameter("use cuda, tensorrt or cpu")
    return name  # type: ignore[return-value]


def compare(name: str, classifier: Classifier, rounds: int) -> None:
    shape = classifier.buffer().shape
    buffers = np.random.default_rng(0).integers(0, 256, (BUFFERS, *shape), np.uint8)
    files = [InputFile(f"photos/{number:06}.jpg", InMemory(b"")) for number in range(shape[0])]
    session = classifier.model.session

    def records(outputs: Iterable[Outputs]) -> None:
        for values in outputs:
            classifier.entries(files, [None] * len(files), values, top_k=1)

    def overlapping(started: Iterable[Future[Outputs]]) -> None:
        records(future.result() for future in one_behind(started))

    def run(images: NDArray[np.uint8]) -> Outputs:
        return list(session.run(classifier.outputs, {"image": images}))

    with BoundRuns(session, classifier.outputs, shape) as runs, ThreadPoolExecutor(2) as threads:
        runs.check(buffers[0], run(buffers[0]))
        ways: dict[str, Callable[[], object]] = {
            "run": lambda: records(map(run, buffers)),
            "bound": lambda: overlapping(map(runs.start, buffers)),
            "threads": lambda: overlapping(threads.submit(run, images) for images in buffers),
            "model alone": lambda: [run(buffers[0]) for _ in buffers],
        }
        if torch.cuda.is_available():
            pinned = torch.from_numpy(buffers).pin_memory().numpy()
            ways["bound, pinned"] = lambda: overlapping(map(runs.start, pinned))
        taken = seconds_per_call(ways, SECONDS, rounds)
    print(f"\n{name}, {classifier.buffer().nbytes / 1e6:.2f} MB a batch")
    for way, seconds in taken.items():
        print(f"{way:15}{BUFFERS * shape[0] / seconds:10,.0f} ({taken['run'] / seconds:.2f}×)", flush=True)


if __name__ == "__main__":
    typer.run(main)

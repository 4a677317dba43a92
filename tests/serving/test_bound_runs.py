"""IO binding as on a GPU, with the CPU as the device: the same calls, on memory of the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convline.errors import ModelError
from serving import Classifier
from serving.bound_runs import SLOTS, BoundRuns, Outputs
from serving.classify import classify
from serving.job import Job
from serving.model import OnnxModel, open_model
from serving.session import OUTPUTS, UNFAMILIAR
from tests.serving.helpers import encode, noise, write

BATCHES = 3 * SLOTS + 1


def assert_same_bits(model: OnnxModel, outputs: list[str], shape: tuple[int, ...]) -> None:
    """Batches of noise, the last one with a few images and zeros, through one buffer that is overwritten at once."""
    batches = [noise(*shape) for _ in range(BATCHES)]
    batches[-1][2:] = 0
    buffer = np.empty(shape, np.uint8)
    results = []
    with BoundRuns(model.session, outputs, shape) as runs:
        for batch in batches:
            buffer[:] = batch
            results.append(runs.start(buffer))
            buffer[:] = 255
        found = [result.result() for result in results]
    for batch, values in zip(batches, found, strict=True):
        expected = model.session.run(outputs, {"image": batch})
        assert [value.tobytes() for value in values] == [value.tobytes() for value in expected]
    assert len({values[1].tobytes() for values in found}) == BATCHES


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_outputs_have_the_same_bits(model: Path, batch: int) -> None:
    assert_same_bits(open_model(model, "cpu", 1), OUTPUTS, (batch, 8, 8, 1))


@pytest.mark.parametrize("size", [(24, 24), (57, 31)])
def test_so_have_those_of_a_file_for_any_size_that_tells_how_unfamiliar_images_are(
    insects: Path, size: tuple[int, int]
) -> None:
    assert_same_bits(open_model(insects / "any-size.onnx", "cpu", 1), [*OUTPUTS, UNFAMILIAR], (5, *size, 3))


def test_a_device_that_keeps_the_first_batch_or_computes_wrongly_is_found(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, images = open_model(model, "cpu", 1), noise(4, 8, 8, 1)
    expected: Outputs = list(opened.run(images))

    def check(runs: BoundRuns) -> None:
        with runs:
            runs.check(images, expected)

    check(BoundRuns(opened.session, OUTPUTS, images.shape))
    expected[1] = expected[1] + np.float32(0.1) * np.abs(expected[1]).max()
    with pytest.raises(ModelError, match="other results with IO binding"):
        check(BoundRuns(opened.session, OUTPUTS, images.shape))
    expected = list(opened.run(images))
    stale = BoundRuns(opened.session, OUTPUTS, images.shape)
    for _ in range(SLOTS):
        slot = stale._free.get()
        slot.load(images)
        monkeypatch.setattr(slot, "load", lambda _: None)
        stale._free.put(slot)
    with pytest.raises(ModelError, match="other results with IO binding"):
        check(stale)


@pytest.mark.parametrize("unfamiliar", [False, True])
def test_a_job_gives_the_table_that_the_cpu_gives(
    insects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfamiliar: bool
) -> None:
    """With rejects in every place, a batch of rejects alone, and a last batch that is not full."""
    for number in range(23):
        is_image = number % 5 and not 8 <= number < 12
        write(tmp_path / f"images/{number:02}.png", encode(noise(20, 30, 3), "PNG") if is_image else b"text")
    tables = []
    for provider in ("cpu", "cuda"):

        class Opened(Classifier):
            def __init__(self, *arguments: object, **options: object) -> None:
                super().__init__(*arguments, **options)  # type: ignore[arg-type]
                self.model = replace(self.model, provider=provider)  # noqa: B023

        monkeypatch.setattr("serving.classify.Classifier", Opened)
        output = tmp_path / f"{provider}.csv"
        images, file = [str(tmp_path / "images")], insects / "any-size.onnx"
        job = Job(images, file, output, top_k=2, batch_size=4, threads=2, provider="cpu", unfamiliar=unfamiliar)
        summary = classify(job)
        assert (summary.provider, summary.tally.classified, summary.tally.found) == (provider, 15, 23)
        tables.append((output.read_bytes(), Path(f"{output}.rejects.jsonl").read_bytes()))
    assert tables[0] == tables[1]

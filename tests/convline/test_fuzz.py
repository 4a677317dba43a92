"""Damaged files of every format: decoded or rejected with a reason, never a crash, a hang or another file's row."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convline.errors import ImageError, Reason
from convline.images import ImageSpec
from convline.inputs.input_file import InMemory, InputFile
from convline.process_pool import ProcessPool
from serving.classifier import try_decode
from serving.classify import classify
from serving.job import Job
from tests.convline import tiff_files
from tests.convline.tiff_files import tiff
from tests.serving.helpers import csv_rows, encode, exif, json_lines, noise, write

SPEC = ImageSpec(8, 8, 3)
SECONDS = 10.0  # limit per file
MEMORY = 4 * 2**30  # limit in bytes: a few copies of the largest image that is accepted

SOFT = Image.fromarray(noise(5, 5, 3)).resize((40, 30), Image.Resampling.BICUBIC)
SEEDS = {
    "jpeg": encode(SOFT, "JPEG", exif=exif(6)),
    "progressive jpeg": encode(SOFT, "JPEG", progressive=True, subsampling=0),
    "cmyk jpeg": encode(SOFT.convert("CMYK"), "JPEG"),
    "png": encode(SOFT, "PNG"),
    "16-bit png": encode(noise(9, 7).astype(np.uint16) * 257, "PNG"),
    "palette png": encode(SOFT.quantize(16), "PNG", transparency=3),
    "webp": encode(SOFT, "WEBP"),
    "lossless webp": encode(Image.fromarray(noise(20, 20, 4)), "WEBP", lossless=True),
    "tiff": encode(SOFT, "TIFF"),
    "lzw tiff": encode(SOFT, "TIFF", compression="tiff_lzw"),
    "jpeg tiff": encode(SOFT, "TIFF", compression="jpeg"),
    "gif": encode(SOFT.quantize(16), "GIF", save_all=True, append_images=[SOFT.rotate(90).quantize(16)]),
    "bmp": encode(SOFT, "BMP"),
    "1-bit bmp": encode(SOFT.convert("1"), "BMP"),
    "planar 16-bit tiff": tiff(noise(9, 7, 3).astype(int) * 257, 16, tiff_files.RGB, planar=True),
    "tiled 12-bit tiff": tiff(noise(9, 7, 1).astype(int), 12, tiff_files.MINISBLACK, deflate=True, tile=(4, 8)),
    "palette tiff": tiff(noise(9, 7, 1) // 16, 4, tiff_files.PALETTE, more=[(320, [*range(48)])]),
    "jpeg 2000": encode(SOFT, "JPEG2000", irreversible=True),
}

small = st.integers(0, 255)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file after a few accidents: bytes changed, removed, doubled, the end cut off, part of another file inserted."""
    data = bytearray(SEEDS[draw(st.sampled_from(sorted(SEEDS)))])
    for _ in range(draw(st.integers(1, 4))):
        # damage to headers has the most different effects
        limit = draw(st.sampled_from([64, len(data)]))
        at = draw(st.integers(0, max(0, min(limit, len(data)) - 1)))
        accident = draw(st.sampled_from(["change", "extreme", "cut", "double", "end", "graft"]))
        length = draw(st.integers(1, 64))
        if accident == "change":
            data[at : at + 1] = bytes([draw(small)])
        elif accident == "extreme":  # in sizes and counts
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
            )
        elif accident == "cut":
            del data[at : at + length]
        elif accident == "double":
            data[at:at] = data[at : at + length]
        elif accident == "end":
            del data[at:]
        else:
            other = SEEDS[draw(st.sampled_from(sorted(SEEDS)))]
            data[at : at + length] = other[at : at + length]
    return bytes(data)


@dataclass(frozen=True)
class DecodingOutcome:
    """A file's shape or reject reason, the detail, the seconds it took, and the peak memory of its process."""

    result: tuple[int, ...] | str
    detail: str
    seconds: float
    memory: int


def examine(files: list[InputFile], _: int = 0) -> DecodingOutcome:
    began = time.perf_counter()
    decoded = try_decode(files[0], SPEC)
    taken = time.perf_counter() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if isinstance(decoded, ImageError):
        return DecodingOutcome(decoded.reason, decoded.detail, taken, memory)
    return DecodingOutcome(decoded.shape, "", taken, memory)


def fuzz(examples: int) -> set[object]:
    """The outcomes of `examples` damaged files, decoded in a process that may crash."""
    outcomes: set[object] = set()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples <= 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged())
    def decode_one(data: bytes) -> None:
        (outcome,) = workers.map(iter([[InputFile("x", InMemory(data))]]), lambda _files, result, _buffer: result)
        assert outcome.result == (8, 8, 3) or outcome.result in get_args(Reason), outcome
        assert "the process that decoded it ended" not in outcome.detail
        assert outcome.seconds < SECONDS and outcome.memory < MEMORY
        outcomes.add(outcome.result)

    with ProcessPool(1, examine, try_out) as workers:
        decode_one()
    return outcomes


def try_out(files: list[InputFile]) -> None:
    examine(files)


@pytest.mark.parametrize("examples", [1000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_damaged_file_is_decoded_or_rejected(examples: int) -> None:
    assert {(8, 8, 3), "truncated", "unreadable", "not-an-image"} <= fuzz(examples)


def test_whole_files_are_decoded() -> None:
    for data in SEEDS.values():
        assert examine([InputFile("x", InMemory(data))]).result == (8, 8, 3)


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_files_change_no_row_of_their_neighbours(model: Path, tmp_path: Path, count: int) -> None:
    random = np.random.default_rng(count)
    seeds = list(SEEDS.values())
    for number in range(count):
        data = bytearray(seeds[number % len(seeds)])
        if number % 5:  # four of five are damaged
            for at in random.integers(0, len(data), random.integers(1, 6)):
                data[at] = random.integers(256)
            data = data[: len(data) if number % 2 else int(random.integers(len(data)))]
        write(tmp_path / f"in/{number:05}", bytes(data))
    write(tmp_path / "alone/x", b"")
    alone = {}
    for kind, seed in enumerate(seeds):
        write(tmp_path / "alone/x", seed)
        classify(Job([str(tmp_path / "alone")], model, tmp_path / f"{kind}.csv", provider="cpu"))
        (row,) = csv_rows(tmp_path / f"{kind}.csv")
        alone[kind] = (row["label"], row["probability"])
    summary = classify(Job([str(tmp_path / "in")], model, tmp_path / "out.csv", provider="cpu"))
    rows = {row["path"]: (row["label"], row["probability"]) for row in csv_rows(tmp_path / "out.csv")}
    rejects = json_lines(tmp_path / "out.csv.rejects.jsonl")
    assert summary.tally.found == count == len(rows) + len(rejects)
    assert {f"{number:05}" for number in range(count)} == rows.keys() | {reject["path"] for reject in rejects}
    assert all(rows[f"{number:05}"] == alone[number % len(seeds)] for number in range(0, count, 5))
    assert {reject["reason"] for reject in rejects} <= set(get_args(Reason))
    assert not any("the process that decoded" in reject["detail"] for reject in rejects)

"""What it is worth to keep the memory of a decoded photograph for the next one (convline/malloc.py).

    python benchmarks/kept_memory.py PHOTOGRAPH [--megapixels 12] [--count 20] [--rounds 5]

PHOTOGRAPH, resized to so many megapixels and saved as a JPEG of quality 90, is decoded for a model of 224 x 224 pixels,
again and again, in a process that keeps freed memory and in one that returns it to the system, in turns. Printed are
milliseconds an image of the CPU, medians of the rounds, and the median of the ratios within them.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Annotated

import typer
from machine import hardware, versions
from PIL import Image

from convline.images import ImageSpec, decode
from convline.malloc import KEPT_FOR_DECODING, keep_freed_memory

SPEC = ImageSpec(224, 224, 3)


def main(
    photograph: Annotated[Path, typer.Argument(help="A photograph of about that size.")],
    megapixels: float = 12.0,
    count: Annotated[int, typer.Option(help="Images that are decoded in each round.")] = 20,
    rounds: int = 5,
) -> None:
    jpeg, size = encoded(photograph, megapixels)
    print(f"{hardware(1)}; {versions('pillow', 'convline')}")
    print(f"a JPEG of {size[0]}x{size[1]}, medians of {rounds} rounds of {count}")
    processes = multiprocessing.get_context("spawn")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for keeps, measured in seconds.items():
            with processes.Pool(1) as pool:
                measured.append(pool.apply(seconds_for_each, (jpeg, count, keeps)))
    for keeps, measured in seconds.items():
        ratio = statistics.median(each / kept for each, kept in zip(measured, seconds[True], strict=True))
        print(f"{'kept' if keeps else 'returned':10}{1000 * statistics.median(measured):8.1f} ms{ratio:8.2f}×")


def encoded(photograph: Path, megapixels: float) -> tuple[bytes, tuple[int, int]]:
    """The photograph as a JPEG of so many megapixels, and its width and height."""
    with Image.open(photograph) as image:
        scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        resized = image.convert("RGB").resize((round(scale * image.width), round(scale * image.height)))
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=90)
    return file.getvalue(), resized.size


def seconds_for_each(jpeg: bytes, count: int, keeps: bool) -> float:
    """CPU seconds for an image, the first one left out."""
    if keeps:
        keep_freed_memory(KEPT_FOR_DECODING)
    decode(jpeg, SPEC)
    start = time.process_time()
    for _ in range(count):
        decode(jpeg, SPEC)
    return (time.process_time() - start) / count


if __name__ == "__main__":
    typer.run(main)

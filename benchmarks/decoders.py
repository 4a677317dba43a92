"""Other JPEG decoders against the one that convline uses, Pillow's, on photographs.

    pip install simplejpeg opencv-python-headless
    python benchmarks/decoders.py --photographs DIR [--photographs DIR2 …] [--rounds 5]

Each DIR holds JPEGs, also in folders. They are grouped by their longer side; of each group at most 8 are taken. A
group of few is filled with larger ones that Pillow makes smaller (LANCZOS, quality 90, 4:2:0). The last group has the
largest once more, encoded anew in this way, as most of those found are progressive, which few cameras write. Those of
benchmarks/results/decoders.txt are from the Debian packages lomiri-wallpapers-16.04 (usr/share/backgrounds) and
mate-backgrounds (usr/share/backgrounds/mate/nature), the two of scikit-learn's wheel (sklearn/datasets/images), and an
image folder of cats and dogs whose shorter side is 224 px.

Everything runs on one thread, and the decoders take turns on each photograph. Times are those of the CPU, which other
work on the machine disturbs little, and ratios medians of those within the rounds:
    full size  from the file's bytes to all its pixels, uint8 [height, width, RGB]
    finished   to the 224 x 224 pixels that a model gets: orientation, resize and crop are convline's in every case,
               only the pixels that they are made of come from another decoder. "reduced" is convline's `jpeg=reduced`
Then where the time of a finished image goes, how pixels differ from convline's, and what each decoder does with JPEGs
of other kinds.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import simplejpeg
import torch
import typer
from machine import hardware, versions
from numpy.typing import NDArray
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_jpeg

from convline.decoders.supported_formats import load_pixels, open_image
from convline.images import ImageSpec, decode, fit_pixels
from convline.malloc import KEPT_FOR_DECODING, keep_freed_memory

Pixels = NDArray[np.uint8]
Decoder = Callable[[bytes], Pixels]

FULL = ImageSpec(None, None, 3)
FINISHED = ImageSpec(224, 224, 3)
OURS = "convline"
GROUPS = (350, 750, 1500, 3000, 10**6)  # the longer side, at most
IN_GROUP, FEWEST = 8, 6
AS_CAMERAS = {"quality": 90, "subsampling": "4:2:0"}  # and not progressive
SEED = 20261127


def with_simplejpeg(data: bytes) -> Pixels:
    return simplejpeg.decode_jpeg(data, "RGB")


def with_torchvision(data: bytes) -> Pixels:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # it warns of memory that is read-only
    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()  # its memory is in this order


def with_opencv(data: bytes) -> Pixels:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise ValueError("no image")
    return pixels


OTHERS: dict[str, Decoder] = {
    "simplejpeg": with_simplejpeg,
    "torchvision": with_torchvision,
    "OpenCV": with_opencv,
}
AT_FULL_SIZE: dict[str, Decoder] = {OURS: lambda data: decode(data, FULL), **OTHERS}


def finished(decoder: Decoder) -> Decoder:
    """From bytes to what a model gets, with the pixels of another decoder; the header is read by Pillow."""

    def finish(data: bytes) -> Pixels:
        header = open_image(data)
        image = Image.fromarray(decoder(data))
        image.info = header.info  # the orientation
        return fit_pixels(image, FINISHED)

    return finish


TO_FINISHED: dict[str, Decoder] = {
    OURS: lambda data: decode(data, FINISHED),
    **{name: finished(decoder) for name, decoder in OTHERS.items()},
    "reduced": lambda data: decode(data, replace(FINISHED, jpeg="reduced")),
}


@dataclass(frozen=True)
class Group:
    """JPEGs of about one size, and how those of them were `made` that are not files as they were found."""

    files: list[bytes]
    made: str = ""

    def __str__(self) -> str:
        headers = [Image.open(io.BytesIO(data)) for data in self.files]
        sides = sorted(max(header.size) for header in headers)
        progressive = sum("progressive" in header.info for header in headers)
        of = f"{len(headers)} photographs of {sides[0]:,} to {sides[-1]:,} px"
        return f"{of} ({progressive} progressive{', ' * bool(self.made)}{self.made})"


def main(
    photographs: Annotated[list[Path], typer.Option(help="A folder of JPEGs; may be given several times.")],
    rounds: int = 5,
) -> None:
    keep_freed_memory(KEPT_FOR_DECODING)  # as the processes that decode do
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    libraries = versions("pillow", "simplejpeg", "torchvision", "opencv-python-headless", "convline")
    print(f"{hardware(1)}; libjpeg-turbo {features.version('libjpeg_turbo')} in Pillow; {libraries}")
    groups = grouped(photographs)
    for group in groups:
        print(f"\n{group}; medians of {rounds} rounds")
        compare(group.files, rounds)
        print(parts(group.files, rounds), flush=True)
    files = [data for group in groups for data in group.files]
    print(f"\nvalues, from 0 to 255, of all {len(files)}, against convline's")
    for title, decoders in (("full size", AT_FULL_SIZE), ("finished", TO_FINISHED)):
        for name, difference in differences(files, decoders).items():
            print(f"{name:14}{title:11}{difference}", flush=True)
    print_other_kinds(files[-1])


def grouped(folders: list[Path]) -> list[Group]:
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    by_limit: dict[int, list[bytes]] = {limit: [] for limit in GROUPS}
    for path in paths:
        with Image.open(path) as image:
            longer = max(image.size)
        by_limit[next(limit for limit in GROUPS if longer <= limit)].append(path.read_bytes())
    groups = []
    for limit in GROUPS:
        files = spread(by_limit[limit], IN_GROUP)
        larger = [data for other in GROUPS if other > limit for data in by_limit[other]]
        made = spread(larger, IN_GROUP - len(files)) if len(files) < FEWEST else []
        files += [smaller(data, limit) for data in made]
        if files:
            groups.append(Group(files, f"{len(made)} made of larger ones" if made else ""))
    anew = [encoded(Image.open(io.BytesIO(data)).convert("RGB"), **AS_CAMERAS) for data in groups[-1].files]
    return [*groups, Group(anew, "those above encoded anew")]


def spread(files: list[bytes], count: int) -> list[bytes]:
    """At most `count` of the files, evenly spread over their order."""
    return [files[number * len(files) // count] for number in range(count)] if len(files) > count else list(files)


def smaller(data: bytes, limit: int) -> bytes:
    """The photograph with a longer side of two thirds of the limit, as most of a group are not the largest."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    longer = limit * 2 // 3
    image.thumbnail((longer, longer), Image.Resampling.LANCZOS)
    return encoded(image, **AS_CAMERAS)


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def compare(files: list[bytes], rounds: int) -> None:
    at_full_size, to_finished = (measure(files, decoders, rounds) for decoders in (AT_FULL_SIZE, TO_FINISHED))
    print(f"{'':14}{'full size':>14}{'':10}{'finished':>14}")
    for name in TO_FINISHED:
        cells = [cell(of[OURS], of[name]) if name in of else f"{'':24}" for of in (at_full_size, to_finished)]
        print(f"{name:14}" + "".join(cells))


def measure(files: list[bytes], decoders: dict[str, Decoder], rounds: int) -> dict[str, list[float]]:
    """The milliseconds that each decoder takes for an image, in each round."""
    rng = np.random.default_rng(SEED)
    repeats = repetitions(files, decoders[OURS])
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        seconds = dict.fromkeys(decoders, 0.0)
        for data in files * repeats:
            for name in rng.permutation(list(decoders)):
                seconds[name] += timed(partial(decoders[name], data))
        for name, total in seconds.items():
            taken[name].append(1000 * total / len(files) / repeats)
    return taken


def cell(ours: list[float], theirs: list[float]) -> str:
    """How long theirs took, and how many times as fast as ours it was."""
    ratio = statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
    return f"{statistics.median(theirs):11.2f} ms {ratio:8.2f}×"


def repetitions(files: list[bytes], decoder: Decoder) -> int:
    """How often files are decoded in a round, so that small ones take long enough to be timed."""
    return max(1, round(0.1 / timed(lambda: [decoder(data) for data in files])))


def timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def parts(files: list[bytes], rounds: int) -> str:
    """What part of the time of finished images each step of convline takes."""
    seconds = np.zeros((rounds, 3))
    for number in range(rounds):
        for data in files:
            times = [time.process_time()]
            image = open_image(data)
            times.append(time.process_time())
            image = load_pixels(image, data)
            times.append(time.process_time())
            fit_pixels(image, FINISHED)
            times.append(time.process_time())
            seconds[number] += np.diff(times)
    opened, decoded, fitted = np.median(seconds / seconds.sum(axis=1, keepdims=True), axis=0)
    return f"of convline's time: header {opened:.0%}, decoding {decoded:.0%}, orientation, resize and crop {fitted:.0%}"


def differences(files: list[bytes], decoders: dict[str, Decoder]) -> dict[str, str]:
    largest: dict[str, list[int]] = {name: [] for name in decoders if name != OURS}
    means: dict[str, list[float]] = {name: [] for name in largest}
    for data in files:
        ours = decoders[OURS](data)
        for name in largest:
            difference = cv2.absdiff(ours, decoders[name](data))
            largest[name].append(int(difference.max()))
            means[name].append(float(difference.mean()))
    return {
        name: f"{values.count(0)} of {len(files)} identical; differ by at most {max(values)}, "
        f"on average by {statistics.mean(means[name]):.3f}"
        for name, values in largest.items()
    }


def other_kinds(data: bytes) -> dict[str, bytes]:
    """JPEGs of a photograph in kinds that few of the photographs are of."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    whole = encoded(image)
    return {
        "grey": encoded(image.convert("L")),
        "CMYK (Adobe)": encoded(image.convert("CMYK")),
        "RGB, not YCbCr": encoded(image, keep_rgb=True),
        "4:4:4": encoded(image, subsampling="4:4:4"),
        "4:2:2": encoded(image, subsampling="4:2:2"),
        "progressive": encoded(image, progressive=True),
        "turned by EXIF": encoded(image, exif=exif),
        "1 x 1": encoded(image.crop((0, 0, 1, 1))),
        "without its end marker": whole[:-2],
        "first half of the file": whole[: len(whole) // 2],
        "damaged inside": whole[: len(whole) // 2] + b"\xff\xd0" + whole[len(whole) // 2 + 2 :],
        "bytes after its end": whole + bytes(1000),
        "no JPEG": b"\xff\xd8\xff" + bytes(1000),
    }


def print_other_kinds(photograph: bytes) -> None:
    print("\nJPEGs of other kinds, finished: the largest difference from convline's values")
    names = [OURS, *OTHERS]
    print(f"{'':24}" + "".join(f"{name:>14}" for name in names))
    for kind, data in other_kinds(photograph).items():
        outcomes = [outcome(TO_FINISHED[name], data) for name in names]
        print(f"{kind:24}" + "".join(f"{told(pixels, outcomes[0]):>14}" for pixels in outcomes))


def outcome(decoder: Decoder, data: bytes) -> Pixels | None:
    """None if the decoder refuses it, for which each has exceptions of its own."""
    try:
        return decoder(data)
    except Exception:
        return None


def told(pixels: Pixels | None, ours: Pixels | None) -> str:
    if pixels is None:
        return "refused"
    return "decoded" if ours is None or pixels is ours else str(int(cv2.absdiff(pixels, ours).max()))


if __name__ == "__main__":
    typer.run(main)

"""Whether every client gets the answers of `serving classify` from a file of `export --any-size`.

    python benchmarks/clients.py SOURCE photos cifar10 --runs-dir runs --data-dir data

SOURCE is a .tar of photographs. 500 images are parts of them, and of two of scikit-learn, from 1x1 to 3000x4000 (height
x width), as PNG, which every decoder reads alike. Each client gets them as they are and is compared with `serving
classify` with the default file of the same run, which takes images of one size. MLflow's server gets 20 of them, as a
request is JSON. client_answers.py says what the clients are. Node.js, npm and Chromium are needed.

Printed for each client: images, the largest |Δprobability| over the classes that it states, and how many most probable
classes are others. "pixels" are those that the part of the file that resizes gives to the network, against those of
serving. The status is 1 if pixels differ by more than 1 of 255, probabilities by more than 2e-3, or a most probable
class is another, unless two are equally probable. The output is kept in benchmarks/results/clients.txt.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import client_answers
import numpy as np
import onnx
import typer
from client_answers import Answers, Exports
from machine import hardware, versions
from PIL import Image

from convline.cpus import usable_cpus
from convline.images import ImageSpec, fit_pixels
from pipeline.export import ExportOptions, export
from pipeline.exporting.any_size_proof import PIXEL_TOLERANCE, PROBABILITY_TOLERANCE
from pipeline.exporting.resize_graph import RESIZED, resizing_part
from pipeline.exporting.tolerances import TIE
from pipeline.run import Run
from serving.model import open_model
from serving.session import open_session

IMAGES, OF_MLFLOW = 500, 20
LARGEST = (3000, 4000)  # height, width
# besides those that are drawn; 1x4000 would be 224x896000 before the crop, which serving refuses
SIZES = [
    *((1, 1), LARGEST, (224, 224), (32, 32)),
    *((1, width) for width in (2, 31, 224, 1000, 3000, 4000)),
    *((height, 1) for height in (2, 31, 224, 1000, 3000)),
]
PHOTOGRAPHS = 200  # of SOURCE that are used
SEED = 20261126


@dataclass(frozen=True)
class Comparison:
    """Answers of a client against those of serving: over how many images, over how many classes of each, the largest
    |Δprobability|, and the images with another most probable class, unless two classes are equally probable."""

    images: int
    classes: int
    probability: float
    other_top1: int

    @property
    def is_equal(self) -> bool:
        return self.probability <= PROBABILITY_TOLERANCE and not self.other_top1  # NaN is not equal

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.classes} classes of each: |Δprobability| at most {self.probability:.1e}, "
            f"{self.other_top1} other top-1"
        )


def main(
    source: Annotated[Path, typer.Argument(help="A .tar of photographs.")],
    runs: Annotated[list[str], typer.Argument(help="Names of runs.")],
    runs_dir: Annotated[Path, typer.Option(help="Where runs are.")] = Path("runs"),
    data_dir: Annotated[Path, typer.Option(help="Where datasets are.")] = Path("data"),
) -> None:
    print(f"{hardware(usable_cpus())}; {versions('onnxruntime-gpu', 'onnxruntime', 'mlflow', 'pillow', 'convline')}")
    is_equal = True
    with tempfile.TemporaryDirectory() as name:
        there = Path(name)
        print(client_answers.install(there / "npm"), flush=True)
        (there / "images").mkdir()
        write_images(source, there / "images")
        for run in runs:
            found = Run.find(runs_dir, run)
            is_equal = compare_clients(export_both(found, data_dir, there / run), there / "images") and is_equal
    if not is_equal:
        sys.exit("not every client gives the answers of serving")


def write_images(source: Path, folder: Path) -> None:
    """Parts of photographs, resized where they are not large enough, at times also where they are."""
    rng = np.random.default_rng(SEED)
    drawn = np.exp(rng.uniform(0, np.log(LARGEST), (IMAGES - len(SIZES), 2))).round().astype(int)
    photographs = read_photographs(source, rng)
    for number, (height, width) in enumerate([*SIZES, *map(tuple, drawn)]):
        photograph = photographs[rng.integers(len(photographs))]
        # width and height of the part: from that of the image to all of the photograph
        part = [
            int(rng.integers(min(wanted, side), side + 1))
            for wanted, side in zip((width, height), photograph.size, strict=True)
        ]
        left, top = (int(rng.integers(side - length + 1)) for side, length in zip(photograph.size, part, strict=True))
        box = (left, top, left + part[0], top + part[1])
        image = photograph.resize((int(width), int(height)), Image.Resampling.BICUBIC, box)
        image.save(folder / f"{number:03}-{height}x{width}.png", compress_level=1)


def read_photographs(source: Path, rng: np.random.Generator) -> list[Image.Image]:
    from sklearn.datasets import load_sample_image

    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with tarfile.open(source) as opened:
        files = sorted(member.name for member in opened if member.isfile())
        for name in rng.choice(files, PHOTOGRAPHS, replace=False):
            data = opened.extractfile(str(name)).read()  # type: ignore[union-attr]
            photographs.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return photographs


def export_both(run: Run, data_dir: Path, folder: Path) -> Exports:
    """The default file of a run, and its file for any size."""
    folder.mkdir()
    exports = Exports(run, folder)
    for path, any_size in ((exports.default, False), (exports.any_size, True)):
        export(run, run.dataset(data_dir), path, ExportOptions(any_size=any_size))
    return exports


def compare_clients(exports: Exports, images: Path) -> bool:
    """Print how each client differs from serving; returns whether none does, beyond the tolerances."""
    spec = open_model(exports.default, "cpu").spec
    files = sorted(images.iterdir())
    expected = client_answers.of_serving(exports.default, images, exports.classes)
    refused = ", ".join(file.stem.partition("-")[2] for file in files if file.name not in expected) or "none"
    print(f"\n{exports.run.name}, images of {spec.height}x{spec.width}x{spec.channels}; serving refuses: {refused}")
    answered = [file for file in files if file.name in expected]
    is_equal = compare_pixels(exports.any_size, answered, spec)
    by_area = sorted(answered, key=lambda file: np.prod([int(side) for side in file.stem.partition("-")[2].split("x")]))
    some = [by_area[place] for place in np.linspace(0, len(by_area) - 1, OF_MLFLOW).round().astype(int)]
    clients = {
        "serving": lambda: client_answers.of_serving(exports.any_size, images, exports.classes),
        "Python": lambda: client_answers.of_python(exports, answered),
        "Node.js": lambda: client_answers.of_node(exports, answered),
        "Chromium": lambda: client_answers.of_chromium(exports, answered),
        "MLflow's server": lambda: client_answers.of_mlflow(exports, some),
    }
    for name, ask in clients.items():
        compared = compare(ask(), expected, some if name == "MLflow's server" else answered)
        print(f"{name:16}{compared}", flush=True)
        is_equal = is_equal and compared.is_equal
    return is_equal


def compare_pixels(path: Path, files: list[Path], spec: ImageSpec) -> bool:
    session, _ = open_session(resizing_part(onnx.load(path)).SerializeToString(), "cpu", name=path)
    largest, others, values = 0, 0, 0
    for file in files:
        image = Image.open(file)
        pixels = np.asarray(image).reshape(1, image.height, image.width, spec.channels)
        difference = np.abs(session.run([RESIZED], {"image": pixels})[0].astype(np.int16) - fit_pixels(image, spec))
        largest = max(largest, int(difference.max()))
        others, values = others + int(np.count_nonzero(difference)), values + difference.size
    counted = f"in {others:,} of {values:,} values ({others / values:.2%})"
    print(f"{'pixels':16}{len(files)} images: differ by at most {largest} of 255, {counted}", flush=True)
    return largest <= PIXEL_TOLERANCE


def compare(answers: Answers, expected: Answers, files: list[Path]) -> Comparison:
    differences: list[float] = []
    classes, others = [], 0
    for file in files:
        given, wanted = answers[file.name], expected[file.name]
        differences += [abs(probability - wanted[label]) for label, probability in given.items()]
        classes.append(len(given))
        others += max(wanted.values()) - wanted[max(given, key=given.__getitem__)] > TIE
    return Comparison(len(files), min(classes), float(np.max(differences)), others)


if __name__ == "__main__":
    typer.run(main)

"""How well images of another kind are told from a model's own test images, by the output of `export --unfamiliar`, and
by what needs no such output: the energy of the logits, and the probability of the answer.

    pipeline train photos --dataset pets --set data.validation=100
    python benchmarks/unfamiliar.py runs/photos [--data-dir data] [--mnist FOLDER] [--textures FOLDER] [--other DATASET]

The run is exported to a temporary file. For each kind of image: the AUROC, the share of pairs of one such image and one
test image in which the other image has the larger score, with its 95% interval by bootstrap; and the share of images
whose `unfamiliar` is above 1, as it is for 1 of 100 validation images.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from machine import hardware, versions
from numpy.typing import NDArray
from PIL import Image
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from convline.cpus import usable_cpus
from convline.images import fit_pixels
from pipeline.dataset import Dataset
from pipeline.export import ExportOptions, export
from pipeline.metrics import wilson_interval
from pipeline.run import Run
from serving.batch_size import SERVING_BATCH
from serving.model import OnnxModel, open_model

Images = NDArray[np.uint8]
Scores = NDArray[np.float64]
COUNT = 500  # images of each kind
RESAMPLINGS = 1000
SEED = 0


def main(
    run: Annotated[Path, typer.Argument(help="The folder of a run with validation images.")],
    data_dir: Path = Path("data"),
    mnist: Annotated[Path | None, typer.Option(help="The folder with MNIST's archives.")] = None,
    textures: Annotated[Path | None, typer.Option(help="A folder with large images of textures.")] = None,
    other: Annotated[Path | None, typer.Option(help="A prepared dataset of images of other classes.")] = None,
) -> None:
    opened = Run.open(run)
    dataset = opened.dataset(data_dir)
    print(f"{hardware(usable_cpus())}; {versions('onnxruntime-gpu', 'onnxruntime', 'torch', 'convline')}")
    with tempfile.TemporaryDirectory() as folder:
        exported = export(opened, dataset, Path(folder, "model.onnx"), ExportOptions(unfamiliar=True))
        model = open_model(exported.path, "cpu")
    test = opened.split(dataset, "test")
    familiar = scores(model, test.images[test.rows])
    above = int((familiar["unfamiliar"] > 1).sum())
    count = len(test)
    low, high = wilson_interval(above, count)
    print(
        f"{opened.name}, step {model.metadata['run']['step']:,}: {count:,} test images, unfamiliar above 1: "
        f"{above / count:.1%} ({low:.1%} to {high:.1%})"
    )
    print(f"{'':22}{'AUROC: unfamiliar':>26}{'energy':>26}{'probability':>26}   above 1")
    for name, images in other_images(model, mnist, textures, other):
        found = scores(model, images)
        cells = "".join(f"{auroc(familiar[kind], found[kind]):>26}" for kind in ("unfamiliar", "energy", "probability"))
        print(f"{f'{name} ({len(images)})':22}{cells}   {(found['unfamiliar'] > 1).mean():.1%}")


def scores(model: OnnxModel, images: Images) -> dict[str, Scores]:
    """Scores that are larger for stranger images, float64 [n]. Energy: Liu et al. 2020, arXiv:2010.03759."""
    batches = [model.run_all(images[start : start + SERVING_BATCH]) for start in range(0, len(images), SERVING_BATCH)]
    probability, logit, unfamiliar = (np.concatenate(parts).astype(np.float64) for parts in zip(*batches, strict=True))
    return {"unfamiliar": unfamiliar, "energy": -logsumexp(logit, axis=1), "probability": -probability.max(1)}


def auroc(familiar: Scores, others: Scores) -> str:
    """With its 95% interval."""
    draws = np.random.default_rng(SEED)
    is_other = np.arange(len(familiar) + len(others)) >= len(familiar)

    def resampled() -> Scores:
        return np.concatenate([draws.choice(part, len(part)) for part in (familiar, others)])

    value = roc_auc_score(is_other, np.concatenate([familiar, others]))
    low, high = np.quantile([roc_auc_score(is_other, resampled()) for _ in range(RESAMPLINGS)], (0.025, 0.975))
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


def other_images(
    model: OnnxModel, mnist: Path | None, textures: Path | None, other: Path | None
) -> Iterator[tuple[str, Images]]:
    """Images that show none of the classes, in the model's size, by the names of their kinds."""
    rng, spec = np.random.default_rng(SEED), model.spec
    height, width, channels = spec.height or 0, spec.width or 0, spec.channels
    mode = "L" if channels == 1 else "RGB"

    def fitted(images: Iterator[Image.Image]) -> Images:
        return np.stack([fit_pixels(image.convert(mode), spec) for image in images]).reshape(
            -1, height, width, channels
        )

    if mnist:
        digits = np.frombuffer(gzip.decompress((mnist / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        yield "MNIST", fitted(Image.fromarray(digit) for digit in digits.reshape(-1, 28, 28)[:COUNT])
    if textures:
        yield "textures", fitted(parts(sorted(textures.glob("*.png")), rng))
    if other:
        split = Dataset.open(other.parent, other.name).split("test")
        rows = np.sort(rng.permutation(len(split))[:COUNT])
        yield other.name, fitted(Image.fromarray(image.squeeze()) for image in split.images[rows])
    yield "noise", rng.integers(0, 256, (COUNT, height, width, channels), np.uint8)
    plain = rng.integers(0, 256, (COUNT, 1, 1, channels), np.uint8)
    yield "one colour", np.ascontiguousarray(np.broadcast_to(plain, (COUNT, height, width, channels)))


def parts(files: list[Path], rng: np.random.Generator) -> Iterator[Image.Image]:
    """Random square parts of textures, of random tints."""
    pictures: list[Images] = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    for number in range(COUNT):
        picture = pictures[number % len(pictures)]
        side = int(rng.integers(64, 300))
        top, left = (int(rng.integers(0, length - side + 1)) for length in picture.shape[:2])
        part = picture[top : top + side, left : left + side]
        yield Image.fromarray((part * rng.uniform(0.5, 1, 3)).astype(np.uint8))


if __name__ == "__main__":
    typer.run(main)

"""What `pipeline check` finds of planted copies and changed labels, and how long it takes.

    python benchmarks/check.py CIFAR10-IMAGES.tar.gz [--seed 0]

The archive holds train/<class>/… and test/<class>/…. Planted, drawn by the seed, in both splits:
    200 exact copies of files, under another name, in a split drawn anew
    200 near copies: compressed again as JPEG at quality 50 to 90, or resized to 24 to 64 pixels and back
    2% of all images in the folder of another class, drawn at random
Printed: how many of the copies are found; the share of planted ones among the pairs that are found; and the share of
the changed labels that the first 2% of images by doubtfulness hold (as many as were changed).
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import hardware, versions
from PIL import Image

from convline.cpus import usable_cpus

COPIES, CHANGED = 200, 0.02

Files = dict[str, bytes]  # by path


def main(
    archive: Annotated[Path, typer.Argument(help="CIFAR-10 as images.")],
    seed: int = 0,
) -> None:
    print(f"{hardware(usable_cpus())}; {versions('torch', 'convline')}; seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        originals, changed, exact, near = plant(read(archive), np.random.default_rng(seed))
        write(folder / "planted.tar", originals)
        print(pipeline(folder, "preprocess", "planted", "--source", "planted.tar", "--allow-leaks").splitlines()[-1])
        began = time.perf_counter()
        found = json.loads(pipeline(folder, "check", "planted", "--json"))
        seconds = time.perf_counter() - began
    report(found, changed, exact, near)
    print(f"pipeline check: {seconds:.0f} s, start-up included, {found['images']:,} images")


def read(archive: Path) -> Files:
    """The images by split, class and name, whatever folders are around them."""
    with tarfile.open(archive) as opened:
        members = {"/".join(member.name.split("/")[-3:]): member for member in opened if member.isfile()}
        images = {path: member for path, member in members.items() if path.split("/")[0] in ("train", "test")}
        return {path: opened.extractfile(member).read() for path, member in images.items()}  # type: ignore[union-attr]


def plant(files: Files, rng: np.random.Generator) -> tuple[Files, set[str], dict[str, str], dict[str, str]]:
    """The files with what is planted; the paths whose label was changed; exact and near copies, with the paths that
    they are copies of."""
    paths = sorted(files)
    classes = sorted({path.split("/")[1] for path in paths})
    drawn = rng.permutation(len(paths))
    to_change = {paths[row] for row in drawn[: round(CHANGED * len(paths))]}
    to_copy = [paths[row] for row in drawn[len(to_change) : len(to_change) + 2 * COPIES]]
    planted, changed = {}, set()
    for path, data in files.items():
        if path in to_change:
            split, label, name = path.split("/")
            other = rng.choice([each for each in classes if each != label])
            path = f"{split}/{other}/changed-{label}-{name}"
            changed.add(path)
        planted[path] = data
    exact: dict[str, str] = {}
    near: dict[str, str] = {}
    for number, original in enumerate(to_copy):
        is_near = number >= COPIES
        name = f"{rng.choice(['train', 'test'])}/{original.split('/')[1]}/copy-{number}"
        copy = f"{name}.png" if is_near and number % 2 else f"{name}.jpg"
        planted[copy] = altered(files[original], number, rng) if is_near else files[original]
        (near if is_near else exact)[copy] = original
    return planted, changed, exact, near


def altered(data: bytes, number: int, rng: np.random.Generator) -> bytes:
    """Compressed again, or, with an odd number, resized and back."""
    image, saved = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    if number % 2:
        side = int(rng.integers(24, 65))
        image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC).save(
            saved, "png"
        )
    else:
        image.save(saved, "jpeg", quality=int(rng.integers(50, 91)))
    return saved.getvalue()


def write(path: Path, files: Files) -> None:
    with tarfile.open(path, "w") as opened:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))


def pipeline(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def report(found: dict[str, Any], changed: set[str], exact: dict[str, str], near: dict[str, str]) -> None:
    named = {frozenset((pair["first"]["path"], pair["second"]["path"])): pair["is_equal"] for pair in found["pairs"]}
    equal = {pair for pair, is_equal in named.items() if is_equal}
    exact_pairs, near_pairs = ({frozenset(pair) for pair in copies.items()} for copies in (exact, near))
    print(f"exact copies: {len(exact_pairs & equal)} of {len(exact)} found, as the same pixels")
    # an image that was enlarged and reduced may have its pixels again
    as_equal = len(near_pairs & equal)
    print(f"near copies: {len(near_pairs & named.keys())} of {len(near)} found, {as_equal} of them as the same pixels")
    others = sorted(sorted(pair) for pair in named.keys() - exact_pairs - near_pairs)
    share = 1 - len(others) / len(named)
    print(f"pairs found: {len(named)}, of which {share:.1%} are planted; the others: {others[:10]}")
    first = [each["image"]["path"] for each in found["doubtful_labels"][: len(changed)]]
    print(
        f"changed labels: {len(changed):,}; the first {len(changed):,} of {len(found['doubtful_labels']):,} doubtful "
        f"ones hold {len(changed.intersection(first)) / len(changed):.1%}"
    )


if __name__ == "__main__":
    typer.run(main)

"""`--jpeg reduced`: checks on a sample of a source that JPEGs decoded at reduced size give nearly the same pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from convline.console import log
from convline.errors import ConvlineError, ImageError
from convline.images import ImageSpec, decode
from convline.inputs.input_file import InputFile
from convline.time_limit import SECONDS
from pipeline.preparing.parallel_decoding import Files, map_in_processes

SAMPLE_SIZE = 64  # images
MAX_DIFFERENCE = 2.0  # mean absolute difference of an image's values, from 0 to 255


def compare_reduced(files: Files, count: int, spec: ImageSpec, time_limit: float = SECONDS) -> dict[str, float]:
    """The mean absolute difference, from 0 to 255, between images decoded at reduced and at full size, over a sample of
    the `count` files: {"images": sample size, "mean": …, "largest": …}.

    Raises ConvlineError where an image differs by more than MAX_DIFFERENCE.
    """
    stride = max(1, count // SAMPLE_SIZE)
    full = replace(spec, jpeg="full")

    def difference(batch: list[InputFile]) -> dict[str, float]:
        try:
            data = batch[0].read()
            difference = np.abs(decode(data, spec).astype(int) - decode(data, full)).mean()
        except ImageError:  # rejected when all are decoded
            return {}
        return {batch[0].path: float(difference)}

    differences: dict[str, float] = {}
    sample = (file for file in files() if file.row % stride == 0)
    for result in map_in_processes(difference, sample, -(-count // stride), files_per_task=1, time_limit=time_limit):
        differences |= result
    if not differences:
        return {"images": 0}
    worst = max(differences, key=lambda path: differences[path])
    if differences[worst] > MAX_DIFFERENCE:
        raise ConvlineError(
            f"{worst} decoded at reduced size differs by {differences[worst]:.1f} of 255 on average, more than "
            f"{MAX_DIFFERENCE}; leave out --jpeg reduced"
        )
    mean = sum(differences.values()) / len(differences)
    log(f"reduced JPEGs: {len(differences)} images differ by {mean:.2f} of 255, at most by {differences[worst]:.2f}")
    return {"images": len(differences), "mean": mean, "largest": differences[worst]}

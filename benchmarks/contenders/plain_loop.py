"""A folder classified as one would at first: Pillow, NumPy and onnxruntime in one loop, with onnxruntime's defaults.

python plain_loop.py FOLDER MODEL OUTPUT THREADS [LIMIT]
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

BATCH = 64


def pixels(path: Path, height: int, width: int) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image)


def main(folder: str, model: str, output: str, threads: str, limit: str = "0") -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    classes = json.loads(session.get_modelmeta().custom_metadata_map["convline.classes"])
    _, height, width, _ = session.get_inputs()[0].shape
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())[: int(limit) or None]
    with open(output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "probability"])
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = np.stack([pixels(path, height, width) for path in batch])
            (probability,) = session.run(["probability"], {"image": images})
            for path, row in zip(batch, probability, strict=True):
                best = int(row.argmax())
                writer.writerow([path, classes[best], row[best]])


main(*sys.argv[1:])

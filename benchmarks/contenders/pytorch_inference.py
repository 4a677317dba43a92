"""A folder classified as timm's inference.py does: DataLoader workers, the eager PyTorch model, a CSV at the end.

python pytorch_inference.py FOLDER RUN OUTPUT THREADS [LIMIT]
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.network import load_network
from pipeline.run import Run

BATCH = 64


class Images(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path], height: int, width: int) -> None:
        self.paths = paths
        self.fit = transforms.Compose([transforms.Resize(min(height, width)), transforms.CenterCrop((height, width))])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.fit(Image.open(self.paths[index]).convert("RGB"))))


def main(folder: str, run_folder: str, output: str, threads: str, limit: str = "0") -> None:
    torch.set_num_threads(int(threads))
    run = Run.open(Path(run_folder))
    served = load_network(run)[0].eval()
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())[: int(limit) or None]
    loader = DataLoader(Images(paths, run.spec.height or 0, run.spec.width or 0), BATCH, num_workers=int(threads))
    best, labels = [], []
    with torch.inference_mode():
        for images in loader:
            probability, label = served(images)[0].topk(1)
            best.append(probability)
            labels.append(label)
    with open(output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "probability"])
        for path, label, probability in zip(paths, torch.cat(labels).tolist(), torch.cat(best).tolist(), strict=True):
            writer.writerow([path, run.classes[label[0]], probability[0]])


main(*sys.argv[1:])

"""The cifar10 network trained as PyTorch's own tutorials do: DataLoader, torchvision transforms, eager layers.

    python pytorch_loop.py IMAGES.npy LABELS.npy BATCH THREADS STEPS    prints seconds a step, without the first ones

With what the recipe asks for besides: SGD, L2 on two layers, a moving average of the weights, a line every 10 steps.
"""

import sys
import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

WARM_UP = 10
DISTORTIONS = transforms.Compose(
    [
        transforms.RandomCrop(24),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(brightness=63 / 255, contrast=(0.2, 1.8)),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    ]
)


class Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, images: str, labels: str) -> None:
        self.images, self.labels = np.load(images), np.load(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return DISTORTIONS(Image.fromarray(self.images[index])), int(self.labels[index])


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Flatten(),
        nn.Linear(64 * 6 * 6, 384),
        nn.ReLU(),
        nn.Linear(384, 192),
        nn.ReLU(),
        nn.Linear(192, 10),
    )


def main(images: str, labels: str, batch: int, threads: int, steps: int) -> float:
    torch.set_num_threads(threads)
    data = Images(images, labels)
    loader = DataLoader(data, batch, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True)
    model = network()
    decayed_weights = [model.get_parameter(name) for name in ("9.weight", "11.weight")]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss()
    step = 0
    while True:
        for inputs, targets in loader:
            if step == WARM_UP:
                began = time.perf_counter()
            logits = model(inputs)
            decayed = decayed_weights[0].square().sum() + decayed_weights[1].square().sum()
            loss = criterion(logits, targets) + 0.002 * decayed
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            if step % 10 == 0:
                accuracy = (logits.argmax(1) == targets).float().mean()
                print(f"step {step}, loss {loss.item():.3f}, accuracy {accuracy.item():.3f}", file=sys.stderr)
            step += 1
            if step == WARM_UP + steps:
                return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))

"""A small network trained from scratch as an experienced user of torchvision would write it, in one script.

    python torchvision_script.py FOLDER --epochs N [--size 64 --seed 0 --threads 2 --network resnet18]

FOLDER holds train/<class>/… and test/<class>/…. ImageFolder, resized crops, flips and colour jitter, a DataLoader with
a worker for each CPU, AdamW, OneCycleLR, label smoothing. At the end prints a line of JSON: the seconds from the start
of the process to the first step, those of all epochs, and how many test images of how many are right.
"""

import argparse
import json
import time

import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images_of(folder: str, split: str, size: int) -> ImageFolder:
    if split == "train":
        changes = [
            transforms.RandomResizedCrop(size, scale=(0.35, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4),
        ]
    else:
        changes = [transforms.Resize(size), transforms.CenterCrop(size)]
    pixels = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return ImageFolder(f"{folder}/{split}", transforms.Compose([*changes, *pixels]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    train_images = images_of(options.folder, "train", options.size)
    test_images = images_of(options.folder, "test", options.size)
    workers = options.threads
    train = DataLoader(train_images, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True)
    model = models.get_model(options.network, weights=None, num_classes=len(train_images.classes))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, epochs=options.epochs, steps_per_epoch=len(train)
    )
    begun = time.time()
    for epoch in range(options.epochs):
        model.train()
        for images, labels in train:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}, loss {loss.item():.3f}", flush=True)
    ended = time.time()

    model.eval()
    right = count = 0
    with torch.inference_mode():
        for images, labels in DataLoader(test_images, BATCH, num_workers=workers):
            right += int((model(images).argmax(1) == labels).sum())
            count += len(labels)
    started = psutil.Process().create_time()
    print(json.dumps({"seconds_to_begin": begun - started, "seconds": ended - begun, "right": right, "count": count}))


if __name__ == "__main__":
    main()

"""A pretrained network fine-tuned as timm's train.py does it, on the CPU.

    python timm_loop.py FOLDER SETTINGS.json

FOLDER holds train/<class>/… and test/<class>/…. timm's dataset decodes each file with Pillow at every use, its loader
augments with torchvision's transforms in worker processes; the network runs eagerly in the default memory format, with
timm's layer-wise learning rates, cosine schedule and moving average. train.py itself freezes nothing. Its users do as
here: a frozen backbone computes without gradients at every step, as in inference, and the head alone learns.

SETTINGS: network, weights (a file whose tensors are in the network's order), threads, workers, size, mean, std,
crop_pct, interpolation, scale, ratio, flip (probability), color_jitter, erasing, mixup, cutmix, batch, frozen_steps,
steps (in all), learning_rate, head_multiplier, layer_decay, weight_decay, warmup (fraction), label_smoothing,
average_decay, freeze_statistics, seed. At the end prints a line of JSON: the seconds from the start of the process to
the end of each step, and how many test images of how many are right, by the average.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from timm import create_model
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

SETTINGS = json.loads(Path(sys.argv[2]).read_text())
STARTED = psutil.Process().create_time()


def loader(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    is_training = split == "train"
    return create_loader(
        create_dataset("", root=sys.argv[1], split=split, is_training=is_training),
        input_size=(3, SETTINGS["size"], SETTINGS["size"]),
        batch_size=SETTINGS["batch"],
        is_training=is_training,
        scale=SETTINGS["scale"],
        ratio=SETTINGS["ratio"],
        hflip=SETTINGS["flip"],
        color_jitter=SETTINGS["color_jitter"],
        re_prob=SETTINGS["erasing"],
        interpolation=SETTINGS["interpolation"],
        mean=SETTINGS["mean"],
        std=SETTINGS["std"],
        crop_pct=SETTINGS["crop_pct"],
        num_workers=SETTINGS["workers"],
        device=torch.device("cpu"),
    )


def batches(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Without end."""
    images = loader(split)
    while True:
        yield from images


def pretrained(classes: int) -> nn.Module:
    model = create_model(SETTINGS["network"])
    tensors = torch.load(SETTINGS["weights"], weights_only=True, map_location="cpu")
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    model.reset_classifier(classes)
    return model


def set_mode(model: Any, *, frozen: bool) -> None:
    model.requires_grad_(not frozen).train(not frozen)
    model.get_classifier().requires_grad_(True).train()
    if SETTINGS["freeze_statistics"]:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


def mixing(classes: int) -> tuple[Mixup | None, nn.Module]:
    """What mixes a batch, if anything does, and the loss that fits."""
    if SETTINGS["mixup"] or SETTINGS["cutmix"]:
        smoothing = SETTINGS["label_smoothing"]
        mixup = Mixup(SETTINGS["mixup"], SETTINGS["cutmix"], label_smoothing=smoothing, num_classes=classes)
        return mixup, SoftTargetCrossEntropy()
    return None, LabelSmoothingCrossEntropy(SETTINGS["label_smoothing"])


def phase(
    model: Any,
    average: ModelEmaV3,
    images: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: range,
    *,
    frozen: bool,
) -> list[float]:
    """Train; the times at which the steps ended."""
    set_mode(model, frozen=frozen)
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=SETTINGS["learning_rate"] * (SETTINGS["head_multiplier"] if frozen else 1),
        weight_decay=SETTINGS["weight_decay"],
        layer_decay=None if frozen else SETTINGS["layer_decay"],
    )
    warmup = round(SETTINGS["warmup"] * len(steps))
    schedule = CosineLRScheduler(optimizer, len(steps), warmup_t=warmup, warmup_prefix=False, t_in_epochs=False)
    mixup, criterion = mixing(model.num_classes)
    ended = []
    for number, (step, (inputs, targets)) in enumerate(zip(steps, images, strict=False), 1):
        if mixup is not None:
            inputs, targets = mixup(inputs, targets)
        loss = criterion(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=step)
        schedule.step_update(number)
        ended.append(time.time() - STARTED)
        if step % 10 == 0:
            print(f"step {step}, loss {loss.item():.3f}", file=sys.stderr)
    return ended


def main() -> None:
    torch.set_num_threads(SETTINGS["threads"])
    torch.manual_seed(SETTINGS["seed"])
    model = pretrained(sum(each.is_dir() for each in Path(sys.argv[1], "train").iterdir()))
    average = ModelEmaV3(model, decay=SETTINGS["average_decay"], use_warmup=True)
    images = batches("train")
    frozen, steps = SETTINGS["frozen_steps"], SETTINGS["steps"]
    ended = phase(model, average, images, range(frozen), frozen=True) if frozen else []
    ended += phase(model, average, images, range(frozen, steps), frozen=False)
    del images  # ends its workers
    trained = average.module.eval()
    right = count = 0
    with torch.inference_mode():
        for inputs, targets in loader("test"):
            right += int((trained(inputs).argmax(1) == targets).sum())
            count += len(targets)
    print(json.dumps({"ended": ended, "right": right, "count": count}))


if __name__ == "__main__":
    main()

"""The barest loop there is around a recipe's network: forward, loss, backward and update of one fixed batch.

python bare_loop.py RECIPE HEIGHT WIDTH CHANNELS THREADS STEPS    prints seconds a step, without the first ones
"""

import sys
import time

import torch
from torch.nn import functional as F

from models import build
from pipeline.recipe import load

WARM_UP = 200


def main(name: str, height: int, width: int, channels: int, threads: int, steps: int) -> float:
    torch.set_num_threads(threads)
    recipe = load(name)
    network = build(recipe.model.name, (channels, height, width), 10, **recipe.model.options)
    optimizer = recipe.optimizer.build(network.parameters())
    images = torch.rand(recipe.train.batch_size, channels, height, width)
    labels = torch.randint(10, (recipe.train.batch_size,))
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            began = time.perf_counter()
        loss = F.cross_entropy(network(images), labels, reduction=recipe.train.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    print(main(sys.argv[1], *map(int, sys.argv[2:])))

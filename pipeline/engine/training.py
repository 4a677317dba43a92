"""All that a training holds between two steps: made, saved, restored and evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.served import Served
from pipeline.average import MovingAverage
from pipeline.dataset import Dataset, Split
from pipeline.engine import checkpoint
from pipeline.engine.augment import Distortions
from pipeline.engine.batches import Batches
from pipeline.engine.guard import FiniteGuard
from pipeline.engine.memory import keep_freed_memory
from pipeline.engine.monitor import Monitor, cut_back
from pipeline.engine.network import build_served, predictor
from pipeline.engine.pretrained import load_pretrained
from pipeline.engine.run import Run
from pipeline.evaluate import evaluate
from serving.machine import usable_cpus


@dataclass
class Training:
    """A training of `run`'s recipe on `device`."""

    run: Run
    device: torch.device
    served: Served
    average: MovingAverage
    optimizer: Optimizer
    batches: Batches
    distort: Distortions
    guard: FiniteGuard
    evaluated: dict[str, Split]  # opened once: a dataset that is prepared again meanwhile does not change them

    @classmethod
    def begin(cls, run: Run, dataset: Dataset, device: torch.device) -> Training:
        keep_freed_memory()
        recipe = run.recipe
        served = build_served(recipe, run.info["dataset"]).to(device).train()
        if not checkpoint.paths(run.folder / "checkpoints"):
            load_pretrained(served.network, recipe.model)
        open_split = partial(dataset.split, validation=recipe.data.validation, seed=recipe.train.seed)
        split = open_split("train")
        return cls(
            run=run,
            device=device,
            served=served,
            average=MovingAverage(served.network, recipe.train.average_decay),
            optimizer=recipe.optimizer.build(served.network.parameters()),
            batches=Batches(split, recipe.data.sampling, recipe.train.batch_size, recipe.train.seed, device),
            distort=Distortions(recipe.augment, served.preprocessing, recipe.train.seed),
            guard=FiniteGuard(device),
            evaluated={name: open_split(name) for name in recipe.train.evaluate_splits if recipe.train.evaluate_every},
        )

    def penalties(self) -> dict[str, Tensor]:
        """The L2 terms of the loss, by layer: coefficient * ‖weight‖² / 2."""
        weight = self.served.network.get_parameter
        coefficients = self.run.recipe.train.l2
        return {f"l2/{layer}": c / 2 * weight(f"{layer}.weight").square().sum() for layer, c in coefficients.items()}

    def restore(self, watch: Monitor) -> int:
        """Load the newest checkpoint, if there is one; returns the step to go on from."""
        state = checkpoint.load_newest(self.run.folder / "checkpoints")
        torch.set_num_threads(state["threads"] if state else usable_cpus())  # sums depend on it
        cut_back(self.run.metrics, int(state["monitor"]["metrics_size"]) if state else 0)
        if state is None:
            return 0
        self.served.network.load_state_dict(state["raw"])
        self.average.network.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        watch.restore(state["monitor"], state["step"])
        return int(state["step"])

    def save(self, step: int, watch: Monitor) -> None:
        """A checkpoint after `step` updates, never of weights that are not finite."""
        self.guard.check()
        raw, averaged = self.served.network.state_dict(), self.average.network.state_dict()
        self.guard.check_weights(step, [*raw.values(), *averaged.values()])
        state: dict[str, Any] = {
            "raw": raw,
            "averaged": averaged,
            "optimizer": self.optimizer.state_dict(),
            "threads": torch.get_num_threads(),
            "monitor": watch.state(),
        }
        checkpoint.save(self.run.folder / "checkpoints", step, state)
        watch.resume_clock(step)

    def evaluate(self, step: int, watch: Monitor) -> None:
        """precision@1 of the averaged weights on the splits that the recipe names."""
        settings = self.run.recipe.train
        if not settings.evaluate_every:
            return
        predict = predictor(Served(self.served.preprocessing, self.average.network), self.device)
        precision: dict[str, float] = {}
        for name, split in self.evaluated.items():
            evaluation = evaluate(predict, split, self.run.classes, settings.evaluate_limit)
            precision[name] = evaluation.precision_at(1)
        watch.evaluated(step, precision)

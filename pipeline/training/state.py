"""All that a training holds between two steps: made, saved, restored and evaluated."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from models.served import Served
from pipeline import checkpoint
from pipeline.average import MovingAverage
from pipeline.dataset import Dataset, Split
from pipeline.metrics import evaluate
from pipeline.network import build_served, predictor
from pipeline.run import Run
from pipeline.tracking.points import cut_back
from pipeline.training.augment import Distortions
from pipeline.training.batches import Batches
from pipeline.training.distributed import World
from pipeline.training.finite_guard import FiniteGuard
from pipeline.training.memory import keep_freed_memory
from pipeline.training.monitor import Monitor
from pipeline.training.pretrained import load_pretrained
from pipeline.training.threads import set_threads


@dataclass
class Training:
    """A training of `run`'s recipe on `device`."""

    run: Run
    device: torch.device
    world: World
    served: Served
    model: nn.Module  # the network, as the ranks train it together
    parameters: list[nn.Parameter]
    average: MovingAverage
    optimizer: Optimizer
    batches: Batches
    distort: Distortions
    guard: FiniteGuard
    evaluated: dict[str, Split]  # opened once: a dataset that is prepared again meanwhile does not change them

    @classmethod
    def begin(
        cls,
        run: Run,
        dataset: Dataset,
        device: torch.device,
        world: World,
        memory_limit: int | None = None,
        *,
        is_new: bool = True,
    ) -> Training:
        """As it is before the first step; one that is not new is to be restored."""
        keep_freed_memory()
        recipe = run.recipe
        served = build_served(recipe, run.info["dataset"]).to(device)
        if is_new:
            load_pretrained(served.network, recipe.model)
        open_split = partial(dataset.split, validation=recipe.data.validation, seed=recipe.train.seed)
        split, size, seed = open_split("train"), recipe.train.batch_size, recipe.train.seed
        share = world.share(size)
        model = world.distributed(served.network, device)
        return cls(
            run=run,
            device=device,
            world=world,
            served=served,
            model=_compile(model, device) if recipe.train.compile else model,
            parameters=list(served.network.parameters()),
            average=MovingAverage(served.network, recipe.train.average_decay),
            optimizer=recipe.optimizer.build(served.network.parameters()),
            batches=Batches(split, recipe.data.sampling, size, seed, device, share, memory_limit),
            distort=Distortions(recipe.augment, served.preprocessing, seed, size, share),
            guard=FiniteGuard(device, world),
            evaluated={name: open_split(name) for name in recipe.train.evaluate_splits if recipe.train.evaluate_every},
        )

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the cross-entropy, whose mean over the ranks is the whole batch's: a mean or a sum, as the
        recipe says."""
        settings = self.run.recipe.train
        with torch.autocast(self.device.type, torch.bfloat16) if settings.precision == "bfloat16" else nullcontext():
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, labels, reduction=settings.loss)
        return logits, loss * self.world.size if settings.loss == "sum" else loss

    def backward(self, cross_entropy: Tensor) -> dict[str, Tensor]:
        """Set the gradients of the loss, which is the cross-entropy and the L2 terms; returns those by layer:
        coefficient * ‖weight‖² / 2, whose gradient is coefficient * weight."""
        for parameter in self.parameters:
            parameter.grad = None
        cross_entropy.backward()
        terms: dict[str, Tensor] = {}
        for layer, coefficient in self.run.recipe.train.l2.items():
            weight = self.served.network.get_parameter(f"{layer}.weight")
            values = weight.detach()
            if weight.grad is None:  # the network does without this layer
                weight.grad = torch.zeros_like(values)
            weight.grad.add_(values, alpha=coefficient)
            terms[f"l2/{layer}"] = coefficient / 2 * torch.dot(values.flatten(), values.flatten())
        return terms

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients together."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def restore(self, state: dict[str, Any] | None, watch: Monitor, threads: int | None = None) -> int:
        """Go on from a checkpoint's `state`, if there is one, with so many threads (see `set_threads`); returns the
        step to go on from.

        Raises ConvlineError where it is not this run's.
        """
        is_alike = state is not None and state.get("ranks", 1) == self.world.size
        set_threads(threads, self.world.local_size, state["threads"] if state and is_alike else None)
        if state is not None:
            self.run.check_provenance(state)
            with self.run.fitting(state):
                self.served.network.load_state_dict(state["raw"])
                self.average.network.load_state_dict(state["averaged"])
                self.optimizer.load_state_dict(state["optimizer"])
            watch.restore(state["monitor"], state["step"], self.device)
        if self.world.is_main:
            checkpoint.tidy(self.run.folder / "checkpoints")
            sizes = state["monitor"] if state else {}
            cut_back(self.run.metrics, int(sizes.get("metrics_size", 0)))
            cut_back(self.run.summaries, int(sizes.get("summaries_size", 0)))
        return int(state["step"]) if state else 0

    def check(self, step: int) -> None:
        """Raises ConvlineError where the loss, or the weights after `step` updates, are not finite: they are never
        saved."""
        self.guard.check()
        networks = (self.served.network, self.average.network)
        self.guard.check_weights(step, [value for network in networks for value in network.state_dict().values()])

    def save(self, step: int, watch: Monitor) -> None:
        """A checkpoint after `step` updates, which have been checked."""
        if self.world.is_main:
            state: dict[str, Any] = {
                "raw": self.served.network.state_dict(),
                "averaged": self.average.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "threads": torch.get_num_threads(),
                "ranks": self.world.size,
                "monitor": watch.state(),
                "provenance": self.run.provenance(),
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
            share = split.take(settings.evaluate_limit).shard(self.world.size, self.world.rank)
            evaluation = evaluate(predict, share, self.run.classes)
            for counts in (evaluation.confusion, evaluation.ranks):
                self.world.sum(torch.from_numpy(counts))
            precision[name] = evaluation.precision_at(1)
        watch.evaluated(step, precision)


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    """By torch.compile; on CUDA its kernels are launched together, as graphs."""
    return cast(nn.Module, torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None))

"""The state of a training: network, average, optimiser, data. It computes a step, and is saved and restored."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.served_network import ServedNetwork
from pipeline import checkpoint
from pipeline.average import MovingAverage
from pipeline.dataset import Dataset, Split
from pipeline.metrics import evaluate
from pipeline.network import predictor
from pipeline.run import Run
from pipeline.tracking.points import cut_back
from pipeline.training.augmentations import Augmentations
from pipeline.training.batch_loader import BatchLoader
from pipeline.training.distributed import RankGroup
from pipeline.training.loss import add_l2_gradients, cross_entropy
from pipeline.training.malloc import keep_freed_memory
from pipeline.training.non_finite_loss import NonFiniteLossGuard
from pipeline.training.progress_log import ProgressLog
from pipeline.training.randomness import seed_step
from pipeline.training.threads import set_threads
from pipeline.training.torch_internals import update_weights


@dataclass
class TrainingState:
    """A training of `run`'s recipe on `device`."""

    run: Run
    device: torch.device
    ranks: RankGroup
    served: ServedNetwork  # what is exported; its network is the one in training
    network: nn.Module  # the same network, compiled and distributed over the ranks as needed
    parameters: list[nn.Parameter]
    average: MovingAverage
    optimizer: Optimizer
    batches: BatchLoader
    augment: Augmentations
    guard: NonFiniteLossGuard
    # opened once, so that preparing the dataset again during the training does not change them
    evaluated_splits: dict[str, Split]

    @classmethod
    def create(
        cls,
        run: Run,
        dataset: Dataset,
        served: ServedNetwork,
        device: torch.device,
        ranks: RankGroup,
        memory_limit: int | None = None,
    ) -> TrainingState:
        """The state before the first step. `served` is freshly built, and moved to `device` here."""
        keep_freed_memory()
        recipe = run.recipe
        served = served.to(device)
        open_split = partial(dataset.split, validation=recipe.data.validation, seed=recipe.train.seed)
        split, size, seed = open_split("train"), recipe.train.batch_size, recipe.train.seed
        share = ranks.share(size)
        network = ranks.distributed(served.network, device)
        return cls(
            run=run,
            device=device,
            ranks=ranks,
            served=served,
            network=_compile(network, device) if recipe.train.compile else network,
            parameters=list(served.network.parameters()),
            average=MovingAverage(served.network, recipe.train.average_decay),
            optimizer=recipe.optimizer.build(served.network.parameters()),
            batches=BatchLoader(split, recipe.data.sampling, size, seed, device, share, memory_limit),
            augment=Augmentations(recipe.augment, served.preprocessing, seed, size, share),
            guard=NonFiniteLossGuard(device, ranks),
            evaluated_splits={
                name: open_split(name) for name in recipe.train.evaluate_splits if recipe.train.evaluate_every
            },
        )

    def prepare(self, images: Tensor, step: int) -> Tensor:
        """Augment and standardise a batch: from uint8 [share, height, width, channels] to the network's input, float32
        [share, channels, height, width] of the cropped size."""
        return self.served.preprocessing.standardized(self.augment(images, step))

    def forward(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Logits, and the cross-entropy of this rank's share (see `loss.cross_entropy`)."""
        settings = self.run.recipe.train
        seed_step(settings.seed, step, self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if settings.precision == "bfloat16" else nullcontext():
            logits = self.network(inputs)
            return logits, cross_entropy(logits, labels, settings.loss, self.ranks.size)

    def backward(self, cross_entropy: Tensor) -> dict[str, Tensor]:
        """Set the gradients of the whole loss, cross-entropy and L2 penalties; returns the penalties."""
        for parameter in self.parameters:
            parameter.grad = None
        cross_entropy.backward()
        return add_l2_gradients(self.served.network, self.run.recipe.train.l2)

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients together."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def update(self, step: int) -> float:
        """Update the weights; returns the learning rate."""
        recipe = self.run.recipe
        learning_rate = recipe.optimizer.learning_rate * recipe.schedule.factor(step, recipe.train.steps)
        update_weights(self.optimizer, learning_rate)
        return learning_rate

    def evaluate(self, step: int, progress: ProgressLog) -> None:
        """Log the precision@1 of the averaged weights on the splits that the recipe names, if it asks for it."""
        settings = self.run.recipe.train
        if not settings.evaluate_every:
            return
        predict = predictor(ServedNetwork(self.served.preprocessing, self.average.network), self.device)
        precision: dict[str, float] = {}
        for name, split in self.evaluated_splits.items():
            share = split.take(settings.evaluate_limit).shard(self.ranks.size, self.ranks.rank)
            evaluation = evaluate(predict, share, self.run.classes)
            for counts in (evaluation.confusion, evaluation.ranks):
                self.ranks.sum(torch.from_numpy(counts))
            precision[name] = evaluation.precision_at(1)
        progress.log_precision(step, precision)

    def check_finite(self, step: int) -> None:
        """Raises ConvlineError where the loss, or the weights after `step` updates, are not finite. Call it before
        `save`."""
        self.guard.check()
        networks = (self.served.network, self.average.network)
        self.guard.check_weights(step, [value for network in networks for value in network.state_dict().values()])

    def save(self, step: int, progress: ProgressLog) -> None:
        """Save a checkpoint after `step` updates."""
        if self.ranks.is_main:
            state: dict[str, Any] = {
                "raw": self.served.network.state_dict(),
                "averaged": self.average.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "threads": torch.get_num_threads(),
                "ranks": self.ranks.size,
                "monitor": progress.state(),
                "provenance": self.run.provenance(),
            }
            checkpoint.save(self.run.folder / "checkpoints", step, state)
        progress.restart_clock(step)

    def restore(self, state: dict[str, Any] | None, progress: ProgressLog, threads: int | None = None) -> int:
        """Continue from the `state` of a checkpoint, if there is one, and set the number of `threads` (see
        `set_threads`); returns the step to continue from.

        Raises ConvlineError where the checkpoint does not fit the run.
        """
        same_ranks = state is not None and state.get("ranks", 1) == self.ranks.size
        set_threads(threads, self.ranks.local_size, state["threads"] if state and same_ranks else None)
        if state is not None:
            self.run.check_provenance(state)
            with self.run.loading(state):
                self.served.network.load_state_dict(state["raw"])
                self.average.network.load_state_dict(state["averaged"])
                self.optimizer.load_state_dict(state["optimizer"])
            progress.restore(state["monitor"], state["step"], self.device)
        if self.ranks.is_main:
            checkpoint.remove_unfinished(self.run.folder / "checkpoints")
            sizes = state["monitor"] if state else {}
            cut_back(self.run.metrics, int(sizes.get("metrics_size", 0)))
            cut_back(self.run.summaries, int(sizes.get("summaries_size", 0)))
        return int(state["step"]) if state else 0


def _compile(network: nn.Module, device: torch.device) -> nn.Module:
    """The network by torch.compile; on CUDA its kernels are launched together, as CUDA graphs."""
    return cast(nn.Module, torch.compile(network, mode="reduce-overhead" if device.type == "cuda" else None))

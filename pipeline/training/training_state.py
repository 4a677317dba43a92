"""The state of a training: network, average, optimiser, data. It computes a step, and is saved and restored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from convline.console import log
from convline.malloc import keep_freed_memory
from models.served_network import ServedNetwork
from pipeline import checkpoint
from pipeline.average import MovingAverage
from pipeline.dataset import Dataset, Split
from pipeline.device import copy_to_device
from pipeline.metrics import evaluate
from pipeline.network import predictor
from pipeline.run import Run
from pipeline.tracking.points import cut_back
from pipeline.training.augmentations import Augmentations
from pipeline.training.batch_loader import BatchLoader
from pipeline.training.best_checkpoint import BestCheckpoint
from pipeline.training.distributed import RankGroup
from pipeline.training.frozen_backbone import features, freeze, unfreeze
from pipeline.training.loss import CrossEntropy, add_l2_gradients, balanced_class_weights
from pipeline.training.non_finite_loss import NonFiniteLossGuard
from pipeline.training.parameter_groups import RATE, parameter_groups
from pipeline.training.progress_log import ProgressLog
from pipeline.training.randomness import seed_step
from pipeline.training.step_graph import StepGraph
from pipeline.training.threads import set_threads
from pipeline.training.torch_internals import begin_velocities, load_optimizer, update_weights

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS_BEFORE_RECORDING = 3  # of each phase, on CUDA; they choose algorithms and create what optimisers keep


@dataclass(frozen=True)
class Batch:
    """This rank's share of a batch. `inputs`: of the network, float32 [n, channels, height, width], or of its head
    alone. `labels`: int64 [n]. `mixing`: see `CrossEntropy`."""

    inputs: Tensor
    labels: Tensor
    mixing: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Batch:
        """The inverse of `tensors`."""
        inputs, labels, *mixing = tensors
        return cls(inputs, labels, (mixing[0], mixing[1]) if mixing else None)

    def tensors(self) -> list[Tensor]:
        return [self.inputs, self.labels, *(self.mixing or ())]

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` equal parts."""
        if count == 1:
            return [self]
        return [Batch.of(piece) for piece in zip(*(tensor.chunk(count) for tensor in self.tensors()), strict=True)]


@dataclass(frozen=True)
class StepResult:
    """What a step computed, on the device. `logits`: float32 [share, classes]. `cross_entropy`: of this rank's share,
    scaled so that its mean over the ranks is that of the whole batch. `penalties`: of L2, by layer. `loss`: their sum.
    `gradient_norm`: where it was limited."""

    logits: Tensor
    cross_entropy: Tensor
    penalties: dict[str, Tensor]
    loss: Tensor
    gradient_norm: Tensor | None = None


@dataclass
class TrainingState:
    """A training of `run`'s recipe on `device`. Call `begin` before the first step, and where `phase_begins`."""

    run: Run
    device: torch.device
    ranks: RankGroup
    served: ServedNetwork  # what is exported; its network is the one in training
    head: list[str]  # the names of the layers that learn while the others are frozen
    network: nn.Module  # what learns, as it is called: compiled and distributed over the ranks as needed
    parameters: list[nn.Parameter]
    average: MovingAverage
    optimizer: Optimizer
    scaler: GradScaler | None  # for float16
    split: Split
    batches: BatchLoader
    augment: Augmentations
    loss: CrossEntropy
    guard: NonFiniteLossGuard
    best: BestCheckpoint
    # opened once, so that preparing the dataset again during the training does not change them
    evaluated_splits: dict[str, Split]
    features: Tensor | None = None  # inputs of the head for each image of the split, while they can be kept
    is_frozen: bool = False  # whether the head alone learns
    graph: StepGraph | None = None  # of the steps of this phase, once they are recorded
    record_at: int | None = None  # the step at which they are to be recorded

    @classmethod
    def create(
        cls,
        run: Run,
        dataset: Dataset,
        served: ServedNetwork,
        head: list[str],
        device: torch.device,
        ranks: RankGroup,
        memory_limit: int | None = None,
    ) -> TrainingState:
        """The state before the first step. `served` is freshly built, and moved to `device` here."""
        keep_freed_memory()
        recipe = run.recipe
        settings = recipe.train
        served = served.to(device)
        open_split = partial(dataset.split, validation=recipe.data.validation, seed=settings.seed)
        split, size, seed = open_split("train"), settings.batch_size, settings.seed
        share = ranks.share(size)
        augment = Augmentations(recipe.augment, served.preprocessing, seed, size, share)
        loaded = slice(None) if augment.needs_whole_batch else share
        class_weights = None
        if settings.class_weights == "balanced":
            class_weights = balanced_class_weights(split.class_counts(len(run.classes))).to(device)
        return cls(
            run=run,
            device=device,
            ranks=ranks,
            served=served,
            head=head,
            network=served.network,
            parameters=list(served.network.parameters()),
            average=MovingAverage(served.network, settings.average_decay),
            optimizer=recipe.optimizer.build(parameter_groups(served.network, head, recipe.optimizer)),
            scaler=GradScaler(device.type) if settings.precision == "float16" else None,
            split=split,
            batches=BatchLoader(split, recipe.data.sampling, size, seed, device, loaded, memory_limit),
            augment=augment,
            loss=CrossEntropy(settings.loss, settings.label_smoothing, class_weights),
            guard=NonFiniteLossGuard(device, ranks),
            best=BestCheckpoint(settings.keep, settings.patience),
            evaluated_splits={name: open_split(name) for name in settings.evaluated_splits},
        )

    def phase_begins(self, step: int) -> bool:
        """Whether other layers learn from this step on than before."""
        return step in (0, self.run.recipe.train.frozen_steps)

    def begin(self, step: int) -> None:
        """Let the layers learn that do so from `step` on."""
        settings, network = self.run.recipe.train, self.served.network
        self.features = self.graph = None
        # several ranks leave their exchanges to NCCL's own schedule; an optimiser that is not fused counts on the host
        is_fused = all(group["fused"] for group in self.optimizer.param_groups)
        is_recorded = self.device.type == "cuda" and self.ranks.size == 1 and is_fused
        self.record_at = step + STEPS_BEFORE_RECORDING if is_recorded else None
        self.is_frozen = step < settings.frozen_steps
        if self.is_frozen:
            freeze(network, self.head)
            self.network = self.ranks.with_shared_dropout(network)
            if not self._augments(step):
                self.features = features(network, self.head, self.served.preprocessing, self.split, self.ranks)
            if self.features is not None:
                self.network = network.get_submodule(self.head[0])
            kept = "computed at each step" if self.features is None else f"of {len(self.split):,} images computed once"
            log(f"the backbone is frozen for {settings.frozen_steps - step:,} steps, its outputs {kept}")
            return
        unfreeze(network, keep_statistics=settings.freeze_statistics)
        if settings.frozen_steps:
            begin_velocities(self.optimizer)
        self.network = self.ranks.distributed(network, self.device)
        if settings.compile:
            self.network = cast(nn.Module, torch.compile(self.network))

    def _augments(self, step: int) -> bool:
        recipe = self.run.recipe
        is_on = recipe.augment.while_frozen or step >= recipe.train.frozen_steps
        return is_on and not self.augment.is_off

    def load(self, step: int) -> Batch:
        """This rank's share of a batch, augmented and standardised."""
        share = self.ranks.share(len(self.batches))
        # of the whole batch where images are to be mixed, because any image may be another's partner
        of_loaded = share if self.augment.needs_whole_batch else slice(None)
        if self.features is not None:
            positions = copy_to_device(torch.from_numpy(self.batches.positions(step)[share]), self.device)
            return Batch(self.features[positions], self.batches.labels(step)[of_loaded])
        images, labels = self.batches.load(step)
        if not self._augments(step):
            return Batch(self.served.preprocessing(images[of_loaded]), labels[of_loaded])
        alternates = self.run.recipe.augment.flip == "alternating"
        mirrored = self.batches.mirrored(step) if alternates else None
        images, mixed = self.augment(images, step, mirrored), None
        if self.augment.needs_whole_batch:
            images, mixed = self.augment.mix(images, labels, step)
        inputs = self.served.preprocessing.standardized(images)
        return Batch(inputs, labels) if mixed is None else Batch(inputs, mixed.label, (mixed.partner, mixed.weight))

    def recorded_step(self, step: int, batch: Batch) -> StepGraph | None:
        """The CUDA graph of `step`, which is recorded when it is due; None where there is none (yet)."""
        if self.record_at is not None and step >= self.record_at:
            self.record_at = None
            self.graph = StepGraph.record(self, batch, step)
        return self.graph

    def begin_step(self, step: int) -> float:
        """Set the seed and the learning rates of `step`; returns the highest rate."""
        recipe = self.run.recipe
        seed_step(recipe.train.seed, step, self.device)
        learning_rate = recipe.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE, 1.0)
        return learning_rate

    def compute_gradients(self, batch: Batch, step: int | Tensor) -> StepResult:
        """Set the gradients of the whole loss; where it is not finite, to 0."""
        settings = self.run.recipe.train
        for parameter in self.parameters:
            parameter.grad = None
        parts = batch.parts(settings.accumulate)
        scale = self.ranks.size if settings.loss == "sum" else 1 / len(parts)
        all_logits, losses = [], []
        for number, part in enumerate(parts, 1):
            with self._sends_gradients(number == len(parts)):
                with self._autocast():
                    output = self.network(part.inputs)
                    loss = self.loss(output, part.labels, part.mixing)
                if scale != 1:
                    loss = loss * scale
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            all_logits.append(output.detach())
            losses.append(loss.detach())
        if self.is_frozen:  # without DistributedDataParallel
            self.ranks.average_gradients(self.parameters)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        penalties = add_l2_gradients(self.served.network, settings.l2)
        logits = all_logits[0] if len(parts) == 1 else torch.cat(all_logits)
        cross_entropy = losses[0] if len(parts) == 1 else torch.stack(losses).sum()
        loss = sum(penalties.values(), cross_entropy)
        self.guard.mask(step, loss, self.parameters)
        return StepResult(logits, cross_entropy, penalties, loss)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.run.recipe.train.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _sends_gradients(self, sends: bool) -> AbstractContextManager[Any]:
        """A block whose backward pass averages the gradients over the ranks, or not."""
        network = getattr(self.network, "_orig_mod", self.network)  # what torch.compile wraps
        return nullcontext() if sends or not isinstance(network, DistributedDataParallel) else network.no_sync()

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of all gradients together."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def update(self) -> Tensor | None:
        """Update the weights. Returns the norm of the gradients if it was limited."""
        limit, norm = self.run.recipe.train.clip_norm, None
        if limit:
            norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        if self.scaler is None:
            update_weights(self.optimizer)
        else:  # leaves the weights as they are where gradients are not finite, and lowers the scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return norm

    def evaluate(self, step: int, progress: ProgressLog) -> None:
        """Log the precision@1 of the averaged weights on the splits that the recipe names, if it asks for it."""
        settings = self.run.recipe.train
        if not settings.evaluate_every:
            return
        predict = predictor(ServedNetwork(self.served.preprocessing, self.average.network), self.device)
        precision: dict[str, float] = {}
        for name, split in self.evaluated_splits.items():
            # where validation decides, all of it counts: the first images are often of the first classes alone
            limit = None if name == "validation" and settings.uses_validation else settings.evaluate_limit
            share = split.take(limit).shard(self.ranks.size, self.ranks.rank)
            evaluation = evaluate(predict, share, self.run.classes)
            for counts in (evaluation.confusion, evaluation.ranks):
                self.ranks.sum(torch.from_numpy(counts))
            precision[name] = evaluation.precision_at(1)
        progress.log_precision(step, precision)
        if step and "validation" in precision:
            self.best.update(step, precision["validation"])

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
                "best": self.best.state(),
                **({} if self.scaler is None else {"scaler": self.scaler.state_dict()}),
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
                load_optimizer(self.optimizer, state["optimizer"])
                if self.scaler is not None:
                    self.scaler.load_state_dict(state["scaler"])
            self.best.restore(state.get("best"))
            progress.restore(state["monitor"], state["step"], self.device)
        if self.ranks.is_main:
            checkpoint.remove_unfinished(self.run.folder / "checkpoints")
            sizes = state["monitor"] if state else {}
            cut_back(self.run.metrics, int(sizes.get("metrics_size", 0)))
            cut_back(self.run.summaries, int(sizes.get("summaries_size", 0)))
        return int(state["step"]) if state else 0

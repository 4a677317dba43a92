"""The training loop: batch, forward, loss, guard, backward, step, average, log, save."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from convline.console import log
from convline.errors import ConvlineError
from convline.files import atomic_write, restore_folder
from models import head_layers
from models.served_network import ServedNetwork
from models.whitening import WhiteningConv2d
from pipeline import checkpoint
from pipeline.dataset import Dataset
from pipeline.device import choose_device, native_precision
from pipeline.network import build_network, check_trains
from pipeline.preparing.official_datasets import known_datasets
from pipeline.preprocess import preprocess
from pipeline.pretrained.load import load_pretrained
from pipeline.pretrained.resolve import resolve_weights
from pipeline.pretrained.weight_sources import PretrainedWeights
from pipeline.recipe import Recipe, check_warmup, differences
from pipeline.run import Run, lock_run
from pipeline.tracking.follower import Follower
from pipeline.training.best_checkpoint import BestCheckpoint
from pipeline.training.distributed import RankGroup, join
from pipeline.training.interrupts import StopRequest, stop_request
from pipeline.training.parameter_groups import description, parameter_groups
from pipeline.training.progress_log import ProgressLog, progress_log
from pipeline.training.rank_environment import restart_count
from pipeline.training.training_state import TrainingState

WHITENED_IMAGES = 5000  # of which a whitening layer is computed


def train(
    recipe: Recipe,
    folder: Path,
    data_dir: Path,
    device: str = "auto",
    *,
    resume: bool = False,
    overwrite: bool = False,
    tracking: bool = True,
    memory_limit: int | None = None,
    threads: int | None = None,
) -> Run:
    """Train `recipe` into the run `folder`; a missing dataset is prepared first.

    `memory_limit`: training images of more bytes (default: half of the device's free memory) are streamed from disk.
    `threads`: the number that each rank computes with on the CPU (see `set_threads`).
    Raises ConvlineError for a recipe that does not fit its dataset, for a run that exists (unless `resume` continues
    it or `overwrite` replaces it) or has another recipe, and where the loss stops being finite.
    Exits with 130 or 143, after saving, when interrupted.
    """
    if restart_count():
        resume, overwrite = True, False
    with join(device) as ranks, ExitStack() as locks:
        chosen_device = choose_device(device, ranks.local_rank)
        ranks.on_main(lambda: _check_precision(recipe, chosen_device))
        ranks.on_main(lambda: _prepare_dataset(recipe, data_dir, folder))
        dataset = _open_dataset(recipe, data_dir, ranks)
        starts_new = ranks.on_main(lambda: overwrite or not checkpoint.paths(folder / "checkpoints"))
        precision = ranks.on_main(lambda: _precision(recipe, chosen_device, folder, starts_new=starts_new))
        with_steps = ranks.main_first(lambda: _with_steps(recipe.with_precision(precision), dataset))
        recipe, weights = ranks.main_first(
            lambda: resolve_weights(with_steps, dataset.meta, folder, starts_new=starts_new)
        )
        ranks.on_main(lambda: _check_batches(recipe, dataset, ranks))
        served, head = ranks.main_first(lambda: _build_network(recipe, dataset, ranks, weights))
        info = ranks.on_main(
            lambda: _open_run(recipe, folder, dataset, weights, resume=resume, overwrite=overwrite).info
        )
        run = Run(folder, info, recipe)
        if ranks.on_main(lambda: _is_finished(run)):
            log(f"{folder} is finished; there is nothing to do")
            return run
        ranks.on_main(lambda: run.check_dataset(dataset))
        ranks.on_main(lambda: locks.enter_context(lock_run(folder)))
        follower = Follower(run) if tracking and ranks.is_main else None
        with _log_what_is_saved(run):
            state = ranks.on_main(lambda: checkpoint.load_newest(folder / "checkpoints"))
            if state is None and not starts_new:  # all checkpoints are damaged
                _, weights = resolve_weights(with_steps, dataset.meta, folder, starts_new=True)
                _load_weights(served, recipe, dataset, weights)
            training = TrainingState.create(run, dataset, served, head, chosen_device, ranks, memory_limit)
            for line in (training.batches.description, *description(served.network, head, recipe)):
                log(line)
            with progress_log(run, ranks) as progress, stop_request() as stop:
                first_step = training.restore(state, progress, threads)
                del state  # it is as large as the network and its optimiser
                train_steps(training, first_step, progress, stop)
    if follower is not None:
        follower.finish()
    return run


def train_steps(training: TrainingState, first_step: int, progress: ProgressLog, stop: StopRequest) -> None:
    """Train from `first_step` to the last step."""
    settings, guard = training.run.recipe.train, training.guard
    if first_step == 0:
        training.evaluate(0, progress)
    for step in range(first_step, settings.steps):
        if step == first_step or training.phase_begins(step):
            training.begin(step)
        batch = training.load(step)
        learning_rate = training.begin_step(step)
        summarizes = training.features is None and progress.summary_is_due(step)
        graph = None if summarizes else training.recorded_step(step, batch)
        if graph is not None:
            result = graph.replay(batch, step)
        else:
            result = training.compute_gradients(batch, step)
            if summarizes:
                progress.summarize_layers(step, training.served.network, batch.inputs)
            result = replace(result, gradient_norm=training.update())
        training.average.update(step)

        progress.smooth(result.loss)
        done = step + 1
        is_last = done == settings.steps
        exit_status = training.ranks.agreed_stop(step, training.device, stop.status)
        if step % settings.log_every == 0 or is_last:
            guard.check()
            terms = result.penalties and {"cross_entropy": result.cross_entropy, **result.penalties}
            norm = training.gradient_norm() if result.gradient_norm is None else result.gradient_norm
            values = {"loss": result.loss, **terms, "gradient_norm": norm}
            progress.log_step(step, values, result.logits, batch.labels, learning_rate)
        if settings.evaluate_every and (done % settings.evaluate_every == 0 or is_last):
            training.evaluate(done, progress)
        ends = is_last or training.best.stops
        is_kept = training.best.is_worth_saving(done)
        if done % settings.checkpoint_every == 0 or ends or is_kept or exit_status is not None:
            training.check_finite(done)
            if ends:
                progress.finish(done, done - first_step)
            training.save(done, progress)
        if ends:
            if sentence := training.best.sentence(is_last=is_last):
                log(sentence)
            return
        if exit_status is not None:
            sys.exit(exit_status)


@contextmanager
def _log_what_is_saved(run: Run) -> Iterator[None]:
    """Where a signal ends the block, log the last checkpoint and how to continue."""
    try:
        yield
    except SystemExit as stopped:
        if stopped.code in (130, 143):
            saved = checkpoint.paths(run.folder / "checkpoints")
            details = (
                f"{saved[-1]} is saved, --resume continues from step {checkpoint.step_of(saved[-1])}"
                if saved
                else "nothing is saved yet, --resume starts at step 0"
            )
            log(f"stopped: {details}")
        raise


def _prepare_dataset(recipe: Recipe, data_dir: Path, folder: Path) -> None:
    """Prepare the recipe's dataset if it is missing; restore a dataset or run whose replacement was killed."""
    name = recipe.data.dataset
    for replaced in (data_dir / name, folder):
        restore_folder(replaced)
    if not (data_dir / name / "meta.json").exists():
        if name in known_datasets():
            log(f"the dataset {name} is not in {data_dir} yet: preparing it")
        preprocess(name, data_dir)


def _open_dataset(recipe: Recipe, data_dir: Path, ranks: RankGroup) -> Dataset:
    """Raises ConvlineError where the dataset differs from that of rank 0."""
    dataset = Dataset.open(data_dir, recipe.data.dataset)
    if ranks.broadcast(dataset.fingerprint) != dataset.fingerprint:
        raise ConvlineError(
            f"{dataset.folder} is not the dataset of rank 0 (its fingerprint differs); prepare the same one everywhere"
        )
    return dataset


def _check_precision(recipe: Recipe, device: torch.device) -> None:
    """Raises ConvlineError where the device does not compute in the recipe's precision."""
    if recipe.train.precision == "float16" and device.type != "cuda":
        raise ConvlineError(
            "train.precision float16 needs a CUDA device; set train.precision to float32, or to bfloat16"
        )


def _precision(recipe: Recipe, device: torch.device, folder: Path, *, starts_new: bool) -> str:
    """The recipe's precision; where it is "auto", that of the run which is resumed, or what it means on `device`."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    precision = native_precision(device) if starts_new else Run.open(folder).recipe.train.precision
    log(f"precision: {precision}")
    return precision


def _check_batches(recipe: Recipe, dataset: Dataset, ranks: RankGroup) -> None:
    """Raises ConvlineError where the dataset lacks a split that is needed, or where batches are too large or uneven."""
    settings = recipe.train
    ranks.check_batch_size(settings.batch_size)
    split = dataset.split("train", recipe.data.validation, settings.seed)
    if recipe.data.sampling == "independent" and settings.batch_size > len(split):
        raise ConvlineError(
            f"train.batch_size {settings.batch_size} exceeds the {len(split)} training images of {dataset.name}"
        )
    if settings.batch_size // ranks.size % settings.accumulate:
        raise ConvlineError(
            f"train.accumulate {settings.accumulate} does not divide the {settings.batch_size // ranks.size} images of "
            "a batch into equal parts; choose a divisor"
        )
    for name in settings.evaluated_splits:
        dataset.split(name, recipe.data.validation, settings.seed)


def _with_steps(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with its epochs as steps. Raises ConvlineError where its warm-up is not shorter."""
    images = len(dataset.split("train", recipe.data.validation, recipe.train.seed))
    settled = recipe.model_copy(update={"train": recipe.train.with_steps(images)})
    check_warmup(settled)
    return settled


def _head(recipe: Recipe, dataset: Dataset) -> list[str]:
    """The names of the network's last layers; empty where the recipe treats no layer differently.

    Raises ConvlineError where it does, and the network has none.
    """
    if not recipe.treats_head_apart:
        return []
    image = dataset.meta["image"]
    shape = (image["channels"], *(recipe.preprocess.crop_size or (image["height"], image["width"])))
    head = head_layers(recipe.model.name, shape, len(dataset.classes), **recipe.model.options)
    if not head:
        raise ConvlineError(
            "train.freeze and optimizer.head_multiplier need a network with a head, as Muon does, and "
            f"{recipe.model.name} has none; leave them out, or choose another network"
        )
    return head


def _build_network(
    recipe: Recipe, dataset: Dataset, ranks: RankGroup, weights: PretrainedWeights | None
) -> tuple[ServedNetwork, list[str]]:
    """The network before the first step, with pretrained `weights`, if any; and its head (see `_head`).

    Raises ConvlineError, before anything is written, where it cannot be trained on this dataset.
    """
    served = build_network(recipe, dataset.meta)
    check_trains(served, recipe, dataset.meta, recipe.train.batch_size // ranks.size // recipe.train.accumulate)
    head = _head(recipe, dataset)
    layers = [name for name, layer in served.network.named_modules() if hasattr(layer, "weight")]
    if unknown := sorted(recipe.train.l2.keys() - set(layers)):
        raise ConvlineError(f"train.l2: {recipe.model.name} has no layer {unknown[0]!r}; it has {', '.join(layers)}")
    try:
        recipe.optimizer.build(parameter_groups(served.network, head, recipe.optimizer))
    except ValueError as error:
        raise ConvlineError(f"optimizer: {error}") from error
    _load_weights(served, recipe, dataset, weights)
    return served, head


def _load_weights(served: ServedNetwork, recipe: Recipe, dataset: Dataset, weights: PretrainedWeights | None) -> None:
    """Set the weights that training starts from and that are not drawn."""
    whitening = [layer for layer in served.network.modules() if isinstance(layer, WhiteningConv2d)]
    if whitening:
        split = dataset.split("train", recipe.data.validation, recipe.train.seed)
        spread = np.linspace(0, len(split) - 1, min(WHITENED_IMAGES, len(split))).astype(np.int64)
        images = served.preprocessing(torch.from_numpy(split.images[np.sort(split.rows[spread])]))
        for layer in whitening:
            layer.fit(images)
    if weights is not None:
        log(load_pretrained(served, recipe.model, dataset.meta["image"]["channels"], dataset.meta["classes"], weights))


def _open_run(
    recipe: Recipe,
    folder: Path,
    dataset: Dataset,
    weights: PretrainedWeights | None,
    *,
    resume: bool,
    overwrite: bool,
) -> Run:
    """Create the run, or open it to resume it. Raises ConvlineError where it cannot be resumed with this recipe."""
    origin = None if weights is None else weights.to_dict()
    if overwrite and (folder / "run.json").exists():
        with lock_run(folder):  # refused while it is being trained
            return Run.create(folder, recipe, dataset, origin)
    if not folder.exists() or not any(folder.iterdir()):
        return Run.create(folder, recipe, dataset, origin)
    if not (folder / "run.json").exists():
        raise ConvlineError(f"{folder} exists and is not a run; choose another --run")
    if not resume:
        raise ConvlineError(f"{folder} exists: --resume continues it, --overwrite replaces it")
    run = Run.open(folder)
    changed = differences(run.recipe, recipe)
    if run.info["dataset"]["fingerprint"] != dataset.fingerprint:
        changed.append("the dataset's fingerprint")
    if origin is not None and run.info.get("weights") != origin:
        changed.append("the pretrained weights")
    if changed == ["train.steps"]:
        _change_steps(run, recipe)
    elif changed:
        raise ConvlineError(
            f"{folder} was started with different settings: {', '.join(changed)}; train into another --run, or "
            "--overwrite it"
        )
    return Run(folder, run.info, recipe)


def _change_steps(run: Run, recipe: Recipe) -> None:
    """Change the number of steps of a run. Raises ConvlineError where its learning rates up to now would have been
    different with the new number."""
    with lock_run(run.folder):
        state = checkpoint.load_newest(run.folder / "checkpoints")
        done = 0 if state is None else int(state["step"])
        before, steps = run.recipe.train.steps, recipe.train.steps
        if steps < done:
            raise ConvlineError(f"{run.folder} has trained {done} steps already; set train.steps to {done} or more")
        if any(recipe.learning_rate(step) != run.recipe.learning_rate(step) for step in range(done)):
            raise ConvlineError(
                f"{run.folder} was started with {before} steps and cannot continue to {steps}: the learning rates of "
                f"the schedule {recipe.schedule.name!r} depend on train.steps; train into another --run, or "
                "--overwrite it"
            )
        with atomic_write(run.folder / "recipe.toml", "w", encoding="utf-8") as file:
            file.write(recipe.to_toml())


def _is_finished(run: Run) -> bool:
    paths = checkpoint.paths(run.folder / "checkpoints")
    if any(checkpoint.load(path) for path in paths if checkpoint.step_of(path) >= run.recipe.train.steps):
        return True
    settings = run.recipe.train
    newest = checkpoint.load_newest(run.folder / "checkpoints") if settings.patience else None
    best = BestCheckpoint(settings.keep, settings.patience)
    best.restore(None if newest is None else newest.get("best"))
    return best.stops

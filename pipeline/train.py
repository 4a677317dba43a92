"""The training loop: batch, forward, loss, guard, backward, step, average, log, save."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from convline.console import log
from convline.errors import ConvlineError
from convline.files import atomic_write, restore_folder
from pipeline import checkpoint
from pipeline.dataset import Dataset
from pipeline.network import build_served, check_trains, choose_device
from pipeline.preparing.official_datasets import known_datasets
from pipeline.preprocess import preprocess
from pipeline.recipe import Recipe, differences
from pipeline.run import Run
from pipeline.tracking.follower import Follower
from pipeline.training.distributed import World, join
from pipeline.training.interrupts import stop_request
from pipeline.training.monitor import monitor
from pipeline.training.optimizers import update
from pipeline.training.pretrained import load_pretrained
from pipeline.training.randomness import seed_step
from pipeline.training.state import Training
from pipeline.training.torchrun import restarts


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
    """Train `recipe` into the run `folder`; a dataset that is missing is prepared first.

    Raises ConvlineError for a recipe that does not fit its dataset, for a run that exists (unless `resume`
    goes on with it or `overwrite` replaces it) or is another recipe's, and where the loss stops being finite.
    Exits 130 or 143, after saving, when interrupted. Training images of more than `memory_limit` bytes (default:
    half of the device's free memory) are streamed from disk. `threads`: of each rank, on the CPU (see `set_threads`).
    """
    if restarts():
        resume, overwrite = True, False
    with join(device) as world, ExitStack() as held:
        where = choose_device(device, world.local_rank)
        world.on_main(lambda: _prepare(recipe, data_dir, folder))
        dataset = _open_dataset(recipe, data_dir, world)
        world.on_main(lambda: _check_fit(recipe, dataset, world, is_new=overwrite or not folder.exists()))
        info = world.on_main(lambda: _open_run(recipe, folder, dataset, resume=resume, overwrite=overwrite).info)
        run = Run(folder, info, recipe)
        if world.on_main(lambda: _is_finished(run)):
            log(f"{folder} is finished: {recipe.train.steps} steps; there is nothing to do")
            return run
        world.on_main(lambda: held.enter_context(run.lock()))
        follower = Follower(run) if tracking and world.is_main else None
        with _saying_what_is_saved(run):
            loop(run, dataset, where, world, memory_limit, threads)
    if follower is not None:
        follower.finish()
    return run


def loop(
    run: Run,
    dataset: Dataset,
    device: torch.device,
    world: World,
    memory_limit: int | None = None,
    threads: int | None = None,
) -> None:
    """From the newest checkpoint, or from the start, to the last step."""
    recipe, settings = run.recipe, run.recipe.train
    state = world.on_main(lambda: checkpoint.load_newest(run.folder / "checkpoints"))
    training = Training.begin(run, dataset, device, world, memory_limit, is_new=state is None)
    log(training.batches.whereabouts)
    preprocessing = training.served.preprocessing
    with monitor(run, world) as watch, stop_request() as stop:
        first = training.restore(state, watch, threads)
        del state  # it is as large as the network and its optimiser
        if first == 0:
            training.evaluate(0, watch)
        for step in range(first, settings.steps):
            images, labels = training.batches.draw(step)
            inputs = preprocessing.standardized(training.distort(images, step))
            seed_step(settings.seed, step, device)
            logits, cross_entropy = training.forward(inputs, labels)
            penalties = training.backward(cross_entropy)
            loss = sum(penalties.values(), cross_entropy.detach())
            training.guard.mask(step, loss, training.parameters)
            watch.summarize(step, training.served.network, inputs)

            learning_rate = recipe.optimizer.learning_rate * recipe.schedule.factor(step, settings.steps)
            update(training.optimizer, learning_rate)
            training.average.update(step)

            watch.observe(loss)
            done = step + 1
            is_last = done == settings.steps
            status = world.agreed_stop(step, device, stop.status)
            if step % settings.log_every == 0 or is_last:
                training.guard.check()
                terms = penalties and {"cross_entropy": cross_entropy, **penalties}
                values = {"loss": loss, **terms, "gradient_norm": training.gradient_norm()}
                watch.log(step, values, logits, labels, learning_rate)
            if settings.evaluate_every and (done % settings.evaluate_every == 0 or is_last):
                training.evaluate(done, watch)
            if done % settings.checkpoint_every == 0 or is_last or status is not None:
                training.check(done)
                if is_last:
                    watch.finish(done, done - first)
                training.save(done, watch)
            if status is not None and not is_last:
                sys.exit(status)


@contextmanager
def _saying_what_is_saved(run: Run) -> Iterator[None]:
    """Where a signal ends the block."""
    try:
        yield
    except SystemExit as stopped:
        if stopped.code in (130, 143):
            saved = checkpoint.paths(run.folder / "checkpoints")
            what = (
                f"{saved[-1]} is saved, --resume goes on from step {checkpoint.step_of(saved[-1])}"
                if saved
                else ("nothing is saved yet, --resume begins at step 0")
            )
            log(f"stopped: {what}")
        raise


def _prepare(recipe: Recipe, data_dir: Path, folder: Path) -> None:
    """Prepare the dataset if it is missing; restore what a killed process was replacing."""
    name = recipe.data.dataset
    for replaced in (data_dir / name, folder):
        restore_folder(replaced)
    if not (data_dir / name / "meta.json").exists():
        if name in known_datasets():
            log(f"the dataset {name} is not in {data_dir} yet: preparing it")
        preprocess(name, data_dir)


def _open_dataset(recipe: Recipe, data_dir: Path, world: World) -> Dataset:
    """Raises ConvlineError for one that is not rank 0's."""
    dataset = Dataset.open(data_dir, recipe.data.dataset)
    if world.broadcast(dataset.fingerprint) != dataset.fingerprint:
        raise ConvlineError(
            f"{dataset.folder} is not the dataset of rank 0 (its fingerprint differs); prepare the same one everywhere"
        )
    return dataset


def _check_fit(recipe: Recipe, dataset: Dataset, world: World, is_new: bool) -> None:
    """Refuse, before anything is written, a recipe that cannot train on this dataset."""
    served = build_served(recipe, dataset.meta)
    settings = recipe.train
    world.check_batch_size(settings.batch_size)
    check_trains(served, recipe, dataset.meta, settings.batch_size // world.size)
    if is_new:
        load_pretrained(served.network, recipe.model)
    try:
        recipe.optimizer.build(served.network.parameters())
    except ValueError as error:
        raise ConvlineError(f"optimizer: {error}") from error
    layers = [name for name, layer in served.network.named_modules() if hasattr(layer, "weight")]
    if unknown := sorted(settings.l2.keys() - set(layers)):
        raise ConvlineError(f"train.l2: {recipe.model.name} has no layer {unknown[0]!r}; it has {', '.join(layers)}")
    split = dataset.split("train", recipe.data.validation, settings.seed)
    if recipe.data.sampling == "independent" and settings.batch_size > len(split):
        raise ConvlineError(
            f"train.batch_size {settings.batch_size} exceeds the {len(split)} training images of {dataset.name}"
        )
    for name in settings.evaluate_splits if settings.evaluate_every else ():
        dataset.split(name, recipe.data.validation, settings.seed)


def _open_run(recipe: Recipe, folder: Path, dataset: Dataset, *, resume: bool, overwrite: bool) -> Run:
    if overwrite and (folder / "run.json").exists():
        with Run.open(folder).lock():  # not while it is being trained
            return Run.create(folder, recipe, dataset)
    if not folder.exists() or not any(folder.iterdir()):
        return Run.create(folder, recipe, dataset)
    if not (folder / "run.json").exists():
        raise ConvlineError(f"{folder} exists and is no run; choose another --run")
    if not resume:
        raise ConvlineError(f"{folder} exists: --resume goes on with it, --overwrite replaces it")
    run = Run.open(folder)
    changed = differences(run.recipe, recipe)
    if run.info["dataset"]["fingerprint"] != dataset.fingerprint:
        changed.append("the dataset's fingerprint")
    if changed == ["train.steps"]:
        _change_steps(run, recipe)
    elif changed:
        raise ConvlineError(
            f"{folder} was begun otherwise, different are: {', '.join(changed)}; "
            "train into another --run, or --overwrite it"
        )
    return Run(folder, run.info, recipe)


def _change_steps(run: Run, recipe: Recipe) -> None:
    """Let a run go on to another number of steps, if its learning rates have been the same so far as they would have
    been with that number from the start. Raises ConvlineError where they have not."""
    with run.lock():
        state = checkpoint.load_newest(run.folder / "checkpoints")
        done = 0 if state is None else int(state["step"])
        before, steps = run.recipe.train.steps, recipe.train.steps
        if steps < done:
            raise ConvlineError(f"{run.folder} has trained {done} steps already; give train.steps as many or more")
        factor = recipe.schedule.factor
        if any(factor(step, steps) != factor(step, before) for step in range(done)):
            raise ConvlineError(
                f"{run.folder} was begun with {before} steps and cannot go on to {steps}: the learning rates of the "
                f"schedule {recipe.schedule.name!r} depend on train.steps; train into another --run, or --overwrite it"
            )
        with atomic_write(run.folder / "recipe.toml", "w", encoding="utf-8") as file:
            file.write(recipe.to_toml())


def _is_finished(run: Run) -> bool:
    there = checkpoint.paths(run.folder / "checkpoints")
    return any(checkpoint.load(path) for path in there if checkpoint.step_of(path) >= run.recipe.train.steps)

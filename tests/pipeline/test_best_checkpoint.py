"""`keep = "best"` and `patience`: validation alone says which weights count, and when training ends."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from pipeline import checkpoint
from pipeline.dataset import Dataset
from pipeline.network import load_network
from pipeline.recipe import load
from pipeline.run import Run
from pipeline.sync import sync
from pipeline.train import train
from pipeline.training.best_checkpoint import BestCheckpoint
from serving.model import open_model
from tests.conftest import Cli
from tests.pipeline.helpers import refused
from tests.pipeline.small_datasets import pictures, write_dataset
from tests.trainings import assert_same_weights, final_state, points

STEPS = 12
COMMON = [
    "data.dataset=falling",
    "model.name=softmax_regression",
    "preprocess.standardize=scale",
    "schedule.name=constant",
]
COMMON += ["optimizer.name=sgd", "optimizer.learning_rate=0.003", "train.batch_size=20", "train.average_decay=0"]
COMMON += ["train.checkpoint_every=1", "train.evaluate_every=2", "train.log_every=5", f"train.steps={STEPS}"]
BEST = [*COMMON, "train.keep=best"]
PATIENT = [*COMMON, "train.patience=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colours. In validation the labels of two classes are exchanged: the better a network knows the
    training images, the worse it does there. In test they are right."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = pictures([0, 10, 10], 8, 2)
    images_of_first, first = pictures([9, 0, 0], 8, 3)
    validation = np.concatenate([images, images_of_first]), np.concatenate([3 - labels, first])
    splits = {"train": pictures([30, 30, 30], 8), "validation": validation, "test": pictures([10, 10, 10], 8, 1)}
    write_dataset(folder, "falling", splits)
    return folder


def trained(data: Path, folder: Path, settings: list[str], **options: Any) -> Run:
    return train(load("digits", settings), folder, data, "cpu", tracking=False, **options)


def precisions(run: Path, split: str = "validation_") -> dict[int, float]:
    key = f"{split}precision_at_1"
    return {point["step"]: point[key] for point in points(run) if key in point}


@pytest.fixture(scope="module")
def best(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in runs/falling. Do not change it."""
    return trained(data, tmp_path_factory.mktemp("project") / "runs/falling", BEST)


def best_step(run: Run) -> int:
    """By the log: the earliest of the best evaluations, without the one before the first step."""
    found = precisions(run.folder)
    return max(sorted(found.keys() - {0}), key=lambda step: found[step])


def test_the_checkpoint_that_is_best_on_validation_counts(best: Run) -> None:
    found, test = precisions(best.folder), precisions(best.folder, "")
    step = best_step(best)
    assert step <= STEPS - 6 and found[STEPS] < found[step]
    assert test[STEPS] >= test[step]  # by test, the last weights would be the best
    saved = [checkpoint.step_of(path) for path in checkpoint.paths(best.folder / "checkpoints")]
    assert saved == [step, STEPS - 2, STEPS - 1, STEPS]  # the newest three and the best
    served, loaded = load_network(best)
    assert loaded == step
    state = torch.load(best.folder / f"checkpoints/step-{step}.pt")
    assert all(torch.equal(value, state["averaged"][name]) for name, value in served.network.state_dict().items())


def test_evaluation_export_and_parity_use_the_best_weights(data: Path, best: Run, cli: Cli) -> None:
    step = best_step(best)
    options = (best.folder, "--data-dir", data)
    report = json.loads(cli("pipeline", "evaluate", *options, "--split", "validation", "--json").stdout)
    assert (report["step"], report["precision_at_1"]) == (step, precisions(best.folder)[step])
    assert "parity passed" in cli("pipeline", "export", *options).stdout
    assert open_model(best.model, "cpu").metadata["run"]["step"] == step
    assert "parity passed" in cli("pipeline", "parity", *options).stdout
    best.model.unlink()


def test_all_validation_images_decide_although_fewer_are_evaluated_of_other_splits(
    data: Path, best: Run, tmp_path: Path
) -> None:
    """The rows of a dataset are often sorted by class."""
    run = trained(data, tmp_path / "run", [*BEST, "train.evaluate_limit=3"])
    assert precisions(run.folder) == precisions(best.folder)
    assert set(precisions(run.folder, "").values()) <= {0, 1 / 3, 2 / 3, 1}
    plain = trained(
        data, tmp_path / "plain", [*COMMON, "train.evaluate_limit=3", 'train.evaluate_splits=["validation"]']
    )
    assert set(precisions(plain.folder).values()) <= {0, 1 / 3, 2 / 3, 1}


def test_the_log_names_the_step_that_counts(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(data, tmp_path / "run", BEST)
    step = best_step(run)
    said = f"the weights after {step} steps count, the best on validation ({precisions(run.folder)[step]:.3f})"
    assert said in capsys.readouterr().err


def test_validation_images_of_the_datasets_own_are_used_whatever_the_recipe_holds_out(data: Path) -> None:
    dataset = Dataset.open(data, "falling")
    for held_out in (0, 0.5):
        assert len(dataset.split("train", held_out)) == 90
        validation = dataset.split("validation", held_out)
        assert len(validation) == 29
        assert np.array_equal(validation.labels, np.load(data / "falling/validation.labels.npy"))


def test_a_run_that_is_resumed_before_and_after_its_best_step_has_the_same_best(
    data: Path, best: Run, tmp_path: Path
) -> None:
    step = best_step(best)
    for number, stop in enumerate((step - 2, step, step + 2)):
        short = [setting for setting in BEST if "steps=" not in setting] + [f"train.steps={stop}"]
        run = trained(data, tmp_path / str(number), short)
        trained(data, run.folder, BEST, resume=True)
        assert_same_weights(run.folder, best.folder)
        assert final_state(run.folder)["best"] == final_state(best.folder)["best"]
        assert load_network(run)[1] == step


def test_a_best_checkpoint_that_is_lost_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(data, tmp_path / "run", BEST)
    path = run.folder / f"checkpoints/step-{best_step(run)}.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert load_network(run)[1] == STEPS
    assert f"the best checkpoint in {path.parent}, of step {best_step(run)}, is lost" in capsys.readouterr().err


def test_training_ends_when_validation_gets_no_better(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(data, tmp_path / "run", PATIENT)
    found = precisions(run.folder)
    last = max(found)
    assert last == best_step(run) + 4 < STEPS  # two evaluations after the best
    assert "stopped: 2 evaluations were not better on validation" in capsys.readouterr().err
    assert final_state(run.folder)["step"] == load_network(run)[1] == last  # the last weights count
    end = points(run.folder)[-1]
    assert end["step"] == last and "training_seconds" in end
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    trained(data, run.folder, PATIENT, resume=True)
    assert "is finished" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sync(run)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (sent,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert sent.info.status == "FINISHED"


def test_a_training_that_ends_soon_after_it_was_resumed_ends_well(data: Path, tmp_path: Path) -> None:
    """It logs no step in between."""
    whole = trained(data, tmp_path / "whole", PATIENT)
    last = max(precisions(whole.folder))
    assert (last - 2) % 5 and (last - 1) % 5  # the last two steps are not logged
    short = [setting for setting in PATIENT if "steps=" not in setting] + [f"train.steps={last - 2}"]
    run = trained(data, tmp_path / "run", short)
    trained(data, run.folder, PATIENT, resume=True)
    assert_same_weights(run.folder, whole.folder)
    assert points(run.folder)[-1].keys() == points(whole.folder)[-1].keys()


def test_a_patient_training_that_reached_its_steps_goes_on_to_more(data: Path, tmp_path: Path) -> None:
    settings = [setting for setting in COMMON if "steps=" not in setting] + ["train.patience=50"]
    run = trained(data, tmp_path / "run", [*settings, "train.steps=4"])
    trained(data, run.folder, [*settings, "train.steps=7"], resume=True)
    assert final_state(run.folder)["step"] == 7


@pytest.mark.parametrize("setting", ["train.keep=best", "train.patience=2"])
def test_a_dataset_without_validation_images_is_refused(project: Path, tmp_path: Path, setting: str) -> None:
    with refused("the validation split of digits is empty; see data.validation"):
        train(load("digits", [setting, "data.validation=0"]), tmp_path / "run", project / "data", "cpu", tracking=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["train.keep=best", "train.patience=2"])
def test_decisions_need_evaluations(setting: str) -> None:
    with refused('keep = "best" and patience need evaluations: set evaluate_every'):
        load("digits", [setting, "train.evaluate_every=0"])


def test_of_equal_weights_the_earliest_are_the_best() -> None:
    best = BestCheckpoint("best", patience=2)
    for step, precision in ((10, 0.0), (20, 0.5), (30, 0.5), (40, 0.4)):
        assert not best.stops
        best.update(step, precision)
        assert best.is_worth_saving(step) == (step <= 20)
    assert best.stops and best.state() == {"keep": "best", "step": 20, "precision": 0.5, "evaluations": 2}

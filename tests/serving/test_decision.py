"""With a threshold, answers that are not probable enough are `unsure`: in tables, folders, pages, summaries, Python."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pyarrow.parquet
import pytest

from convline.errors import ConvlineError, ModelError
from serving import Classifier
from serving.classify import classify
from serving.job import Job
from serving.output_files import partial_path
from serving.records import Prediction, decide
from tests.conftest import run_command
from tests.pages import check
from tests.serving.helpers import csv_rows, interrupted, json_lines, resealed

THRESHOLD = 0.9


@pytest.fixture(scope="module")
def decided_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model with a threshold of its own."""
    return with_decision(model, tmp_path_factory.mktemp("model") / "decided.onnx", {"threshold": THRESHOLD})


def with_decision(model: Path, target: Path, decision: Any, classes: list[str] | None = None) -> Path:
    def edit(proto: onnx.ModelProto) -> None:
        props = {entry.key: entry.value for entry in proto.metadata_props} | {"convline.decision": json.dumps(decision)}
        props |= {"convline.classes": json.dumps(classes)} if classes else {}
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, props)

    return resealed(model, target, edit)


def table(job: Job) -> list[dict[str, str]]:
    classify(job)
    assert job.output is not None
    return csv_rows(job.output)


def expected(row: dict[str, Any], threshold: float = THRESHOLD) -> str:
    return str(row["label"]) if float(row["probability"]) >= threshold else "unsure"


def test_the_threshold_of_the_file_adds_a_column_after_the_probability(
    samples: Path, model: Path, decided_model: Path, tmp_path: Path
) -> None:
    plain = table(Job([str(samples)], model, tmp_path / "plain.csv", top_k=2))
    rows = table(Job([str(samples)], decided_model, tmp_path / "decided.csv", top_k=2))
    assert list(rows[0]) == ["path", "label", "probability", "decision", "label_2", "probability_2"]
    assert [row.pop("decision") for row in rows] == [expected(row) for row in plain]
    assert rows == plain and "unsure" in {expected(row) for row in plain} != {"unsure"}


def test_an_option_overrides_the_threshold_of_the_file(samples: Path, decided_model: Path, tmp_path: Path) -> None:
    rows = table(Job([str(samples)], decided_model, tmp_path / "x.csv", threshold=0.99))
    assert [row["decision"] for row in rows] == [expected(row, 0.99) for row in rows]
    rows = table(Job([str(samples)], decided_model, tmp_path / "all.csv", threshold=0.0))
    assert [row["decision"] for row in rows] == [row["label"] for row in rows]


def test_a_probability_equal_to_the_threshold_is_sure() -> None:
    assert (decide("cat", 0.9, 0.9), decide("cat", 0.89999, 0.9), decide("cat", 0.1, None)) == ("cat", "unsure", None)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_formats_have_the_same_decisions(samples: Path, model: Path, tmp_path: Path, ending: str) -> None:
    rows = table(Job([str(samples)], model, tmp_path / "x.csv", threshold=THRESHOLD))
    output = tmp_path / f"x.{ending}"
    classify(Job([str(samples)], model, output, threshold=THRESHOLD))
    others = json_lines(output) if ending == "jsonl" else pyarrow.parquet.read_table(output).to_pylist()
    assert list(others[0]) == ["path", "label", "probability", "decision"]
    assert [row["decision"] for row in others] == [row["decision"] for row in rows]


def test_a_table_without_images_has_the_column_too(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    classify(Job([str(tmp_path / "empty")], model, tmp_path / "x.csv", threshold=0.5))
    assert (tmp_path / "x.csv").read_text() == "path,label,probability,decision\n"


def test_standard_output_and_the_summary_tell_the_unsure(samples: Path, decided_model: Path, tmp_path: Path) -> None:
    printed = run_command(tmp_path, "serving", "classify", samples, "--model", decided_model)
    unsure = sum(line.endswith(",unsure") for line in printed.stdout.splitlines())
    assert unsure and f"; {unsure} unsure" in printed.stderr
    options = ("--output", "x.csv", "--json")
    summary = run_command(tmp_path, "serving", "classify", samples, "--model", decided_model, *options).stdout
    assert json.loads(summary)["unsure"] == unsure


def test_without_a_threshold_the_summary_and_the_journal_say_nothing_of_it(
    samples: Path, model: Path, tmp_path: Path
) -> None:
    summary = classify(Job([str(samples)], model, tmp_path / "x.csv"))
    assert "unsure" not in summary.to_dict() and "unsure" not in summary.sentence()


def test_unsure_images_are_sorted_into_a_folder_of_their_own(samples: Path, model: Path, tmp_path: Path) -> None:
    job = Job([str(samples)], model, tmp_path / "x.csv", threshold=THRESHOLD, sort_into=tmp_path / "sorted")
    decisions = Counter(row["decision"] for row in table(job))
    sorted_files = {
        folder.name: sum(path.is_file() for path in folder.rglob("*")) for folder in (tmp_path / "sorted").iterdir()
    }
    assert sorted_files == decisions and decisions["unsure"]


def test_a_class_named_unsure_is_refused_with_a_threshold(samples: Path, model: Path, tmp_path: Path) -> None:
    names = [*map(str, range(9)), "unsure"]
    path = with_decision(model, tmp_path / "named.onnx", {"threshold": 0.5}, names)
    with pytest.raises(ConvlineError, match="a class named unsure, which is also the decision"):
        classify(Job([str(samples)], path, tmp_path / "x.csv"))
    assert not (tmp_path / "x.csv").exists()


def test_the_page_shows_unsure_images_and_how_many_there_are(samples: Path, model: Path, tmp_path: Path) -> None:
    report = tmp_path / "x.html"
    rows = table(Job([str(samples)], model, tmp_path / "x.csv", threshold=0.999, report=report))
    unsure = sum(row["decision"] == "unsure" for row in rows)
    page = check(report)
    assert "Unsure" in page.texts("h2") and str(unsure) in page.texts("dd")
    classify(Job([str(samples)], model, tmp_path / "y.csv", report=tmp_path / "plain.html"))
    assert "nsure" not in (tmp_path / "plain.html").read_text()


@pytest.mark.parametrize("option", ["resume", "rescan"])
@pytest.mark.parametrize("threshold", [None, 0.8])
def test_a_job_with_another_threshold_does_not_continue_one(
    samples: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, threshold: float | None
) -> None:
    job = Job([str(samples)], model, tmp_path / "x.csv", batch_size=16, threshold=THRESHOLD)
    interrupted(job, monkeypatch, after=2)
    changed: dict[str, Any] = {"threshold": threshold, option: True}
    with pytest.raises(ConvlineError, match="started with different settings: threshold"):
        classify(replace(job, **changed))
    assert partial_path(tmp_path / "x.csv").exists()


@pytest.mark.parametrize("option", ["resume", "rescan"])
def test_a_job_that_continues_ends_with_the_bytes_of_an_uninterrupted_one(
    samples: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    whole = Job([str(samples)], model, tmp_path / "whole.csv", batch_size=16, threshold=THRESHOLD)
    unsure = classify(whole).tally.unsure
    job = replace(whole, output=tmp_path / "x.csv")
    interrupted(job, monkeypatch, after=2)
    options: dict[str, Any] = {option: True}
    summary = classify(replace(job, **options))
    assert summary.resumed == 32 and summary.tally.unsure == unsure
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_finished_table_of_another_threshold_is_not_taken_for_this_job(
    samples: Path, model: Path, tmp_path: Path
) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        job: dict[str, Any] = {"inputs": [str(samples)], "model": model, "output": tmp_path / f"x.{ending}"}
        first = classify(Job(**job, threshold=THRESHOLD))
        assert classify(Job(**job, threshold=THRESHOLD, resume=True)).tally.unsure == first.tally.unsure
        with pytest.raises(ConvlineError, match=r"not written with --threshold 0\.3; choose another name"):
            classify(Job(**job, threshold=0.3, resume=True))


def test_the_python_api_gives_the_decision(samples: Path, model: Path, decided_model: Path) -> None:
    files = sorted(samples.rglob("*.png"))
    for path, threshold, used in ((model, None, None), (decided_model, None, THRESHOLD), (model, 0.5, 0.5)):
        with Classifier(path, threshold=threshold) as classifier:
            found = classifier.classify(files)
        predictions = [entry for entry in found if isinstance(entry, Prediction)]
        assert len(predictions) == len(files)
        assert all(p.decision == decide(p.labels[0], p.probabilities[0], used) for p in predictions)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability(model: Path, samples: Path, tmp_path: Path, threshold: float) -> None:
    with pytest.raises(ConvlineError, match="is not a probability"):
        Classifier(model, threshold=threshold)
    command = ("serving", "classify", samples, "--model", model, "--threshold", threshold)
    run_command(tmp_path, *command, status=2)


@pytest.mark.parametrize("decision", [{}, {"threshold": "0.9"}, {"threshold": 1.5}, [0.9]])
def test_a_damaged_decision_is_refused(model: Path, tmp_path: Path, decision: Any) -> None:
    with pytest.raises(ModelError, match=r"missing or damaged metadata: decision"):
        Classifier(with_decision(model, tmp_path / "m.onnx", decision))

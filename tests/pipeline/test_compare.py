"""`pipeline compare`: whether runs differ by more than chance, and runs that were tested on different images."""

import json
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest

from pipeline.reporting.paired_comparison import PairedComparison, packed_bits, unpacked_bits
from tests.conftest import run_command
from tests.pipeline.helpers import image_folder


@pytest.mark.parametrize("count", [0, 1, 8, 9, 1000])
def test_bits_come_back_from_their_text(count: int) -> None:
    hits = np.random.default_rng(count).random(count) < 0.7
    np.testing.assert_array_equal(unpacked_bits(packed_bits(hits), count), hits)
    with pytest.raises(ValueError, match="images"):
        unpacked_bits(packed_bits(hits), count + 9)


@pytest.mark.parametrize(("only_first", "only_second"), [*product((0, 1, 3, 9), (0, 2, 9)), (30, 12)])
def test_the_probability_is_that_of_fair_coins(only_first: int, only_second: int) -> None:
    """If both are equally good, each image that one alone gets right is a toss of a coin."""
    tosses = only_first + only_second
    as_uneven = [heads for heads in range(tosses + 1) if abs(2 * heads - tosses) >= abs(only_first - only_second)]
    expected = sum(comb(tosses, heads) for heads in as_uneven) / 2**tosses
    assert PairedComparison(only_first, only_second).probability == pytest.approx(expected)


def test_only_images_on_which_two_runs_differ_count() -> None:
    first, second = (np.array([bool(int(bit)) for bit in bits]) for bits in ("1110001", "1101001"))
    assert PairedComparison.of(first, second) == PairedComparison(1, 1)


def test_equally_good_runs_seem_different_in_at_most_5_of_100_comparisons() -> None:
    draws = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        first, second = draws.random((2, 400)) < 0.9
        found += PairedComparison.of(first, second).probability < 0.05
    assert found <= 65  # of 50 on average, two standard deviations more


def test_the_sentence_says_whether_it_may_be_chance() -> None:
    assert PairedComparison(30, 5).sentence("new", "old") == (
        "only new is right on 30 test images, only old on 5: new is better by more than chance (McNemar, p = 2.2e-05)"
    )
    assert "only old is right on 6 test images, only new on 4: the difference may be chance" in PairedComparison(
        4, 6
    ).sentence("new", "old")


def train(folder: Path, run: str, *settings: object, dataset: str = "digits", steps: int = 20) -> None:
    options = ("--dataset", dataset, "--run", run, "--steps", steps, "--tracking", "none")
    run_command(folder, "pipeline", "train", "mlp", *options, "--set", "data.validation=0", *settings)


def test_runs_that_differ_by_more_than_chance_are_told_from_others(own_project: Path) -> None:
    train(own_project, "weak")
    train(own_project, "same", "--seed", 0)
    for name in ("digits", "weak", "same"):
        run_command(own_project, "pipeline", "evaluate", name)
    compared = run_command(own_project, "pipeline", "compare", "digits", "weak", "same").stdout.splitlines()
    hits = {}
    for name in ("digits", "weak"):
        report = json.loads((own_project / f"runs/{name}/evaluation.json").read_text())
        hits[name] = unpacked_bits(report["hits"], 359)
        assert hits[name].mean() == pytest.approx(report["precision_at_1"])
    only = PairedComparison.of(hits["digits"], hits["weak"])
    assert only.sentence("digits", "weak") in compared and "digits is better by more than chance" in compared[4]
    assert f"{100 * hits['digits'].mean():.2f}% (" in compared[1]
    assert "digits is better by more than chance" in (own_project / "runs/compare.html").read_text()
    between_equals = run_command(own_project, "pipeline", "compare", "weak", "same").stdout
    assert "only weak is right on 0 test images, only same on 0: the difference may be chance" in between_equals


def test_runs_on_different_test_images_have_their_own_curves(own_project: Path, tmp_path: Path) -> None:
    source = image_folder(tmp_path / "noise", {f"{name}": 20 for name in "abc"}, size=(8, 8), mode="L")
    run_command(own_project, "pipeline", "preprocess", "noise", "--source", source)
    train(own_project, "noise", dataset="noise")
    for name in ("digits", "noise"):
        run_command(own_project, "pipeline", "evaluate", name)
    shown = run_command(own_project, "pipeline", "compare", "digits", "noise").stdout
    assert "tested on different images" in shown and "McNemar" not in shown
    page = (own_project / "runs/compare.html").read_text()
    assert "Smoothed loss (digits)" in page and "Smoothed loss (noise)" in page

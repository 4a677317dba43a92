"""metrics.jsonl -> MLflow: sends what the server lacks, as often as it is asked to."""

from __future__ import annotations

import time
from contextlib import ExitStack

from convline.console import log
from convline.cpus import lower_priority
from convline.errors import ConvlineError
from convline.mlflow_client import tracking_uri
from pipeline.run import Run
from pipeline.tracking.sender import Sender, draw_layers

INTERVAL = 2.0  # seconds between two looks at the file
LONGEST = 30.0  # between two attempts, where the server does not answer
POINTS = 100  # in one request, which takes 1,000 values at most
ARTIFACTS = ("recipe.toml", "run.json", "evaluation.json", "parity.json", "model.onnx", "report.html", "pictures/*.png")
REDRAWN = 60.0  # seconds between two looks at the summaries, at least
DRAWING_SHARE = 0.01  # of the time, at most


def sync(run: Run, follow: bool = False) -> str:
    """Send what MLflow lacks of a run; with `follow`, again and again until its training has ended.

    A server that does not answer is tried again while the training goes on. Returns the MLflow run's id.
    Raises ConvlineError where MLflow is missing, or the last attempt fails.
    """
    sender = Sender(run, tracking_uri(), in_hurry=lambda: follow and not run.is_training())
    with ExitStack() as stack:
        if follow:
            lower_priority()  # training comes first
            _follow(run, sender, stack)
        sender.send_points()
        if follow:
            draw_layers(run)
        return sender.finish()


def _follow(run: Run, sender: Sender, stack: ExitStack) -> None:
    """Send again and again while the run is being trained; ever more seldom while the server fails."""
    pause = INTERVAL
    next_drawing = time.monotonic() + REDRAWN
    while run.is_training() and run.is_current():
        try:
            sender.send_points()
            sender.sample_system(stack)
            if (began := time.monotonic()) > next_drawing:
                sender.send_pictures()
                took = time.monotonic() - began
                next_drawing = began + max(REDRAWN, took / DRAWING_SHARE)
            pause = INTERVAL
        except ConvlineError as error:
            log(f"{error}; trying again")
            pause = min(2 * pause, LONGEST)
        until = time.monotonic() + pause
        while run.is_training() and time.monotonic() < until:
            time.sleep(INTERVAL / 2)

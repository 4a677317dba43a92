"""`pipeline sync`: sends metrics and files of a run to MLflow, once or (`--follow`) every SEND_INTERVAL seconds."""

from __future__ import annotations

import time
from contextlib import ExitStack

from convline.console import log
from convline.cpus import lower_priority
from convline.errors import ConvlineError
from convline.mlflow_client import tracking_uri
from pipeline.run import Run
from pipeline.tracking.sender import Sender, draw_layer_plots

SEND_INTERVAL = 2.0  # seconds after which new metrics are sent
LONGEST_PAUSE = 30.0  # seconds between two attempts while the server does not answer
DRAW_INTERVAL = 60.0  # seconds between two drawings of the layer plots, at least
DRAWING_SHARE = 0.01  # of the time that drawing and sending layer plots may take


def sync(run: Run, follow: bool = False) -> str:
    """Send what MLflow does not have of a run; with `follow`, repeatedly until its training has ended.

    If the server does not answer, it is tried again as long as the training runs. Returns the MLflow run's id. Raises
    ConvlineError if MLflow is not installed, or if the last attempt fails.
    """
    sender = Sender(run, tracking_uri(), in_hurry=lambda: follow and not run.is_training())
    with ExitStack() as stack:
        if follow:
            lower_priority()  # training comes first
            _follow(run, sender, stack)
        sender.send_points()
        if follow:
            draw_layer_plots(run)
        return sender.finish()


def _follow(run: Run, sender: Sender, stack: ExitStack) -> None:
    """Send repeatedly while the run is being trained, with longer and longer pauses while the server fails."""
    pause = SEND_INTERVAL
    next_drawing = time.monotonic() + DRAW_INTERVAL
    while run.is_training() and run.is_current():
        try:
            sender.send_points()
            sender.sample_system(stack)
            if (began := time.monotonic()) > next_drawing:
                sender.send_layer_plots()
                took = time.monotonic() - began
                next_drawing = began + max(DRAW_INTERVAL, took / DRAWING_SHARE)
            pause = SEND_INTERVAL
        except ConvlineError as error:
            log(f"{error}; trying again")
            pause = min(2 * pause, LONGEST_PAUSE)
        next_attempt = time.monotonic() + pause
        while run.is_training() and time.monotonic() < next_attempt:
            time.sleep(SEND_INTERVAL / 2)


def sync_if_tracked(run: Run) -> None:
    """`sync` a run that was sent to MLflow before; if the server fails, log a warning."""
    if run.is_tracked():
        try:
            sync(run)
        except ConvlineError as error:
            log(f"warning: {error}")

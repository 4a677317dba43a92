"""The progress bar and log lines of a training, and the metrics that it writes to metrics.jsonl and summaries.jsonl.

The loop in pipeline/train.py says when metrics are logged (train.log_every); summaries follow train.summary_every.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convline.console import log, progress
from pipeline.run import Run
from pipeline.tracking.points import PointWriter, packed
from pipeline.training.distributed import RankGroup
from pipeline.training.layer_summary import sample, summarize

if TYPE_CHECKING:
    from convline.console import ProgressBar

SMOOTHING = 0.9
SPARKLINE_CHARACTERS = "▁▂▃▄▅▆▇█"
SPARKLINE_LENGTH = 30  # logged losses that the progress bar shows
SUMMARY_SHARE = 0.015  # of the training time, at most


class ProgressLog:
    """Writes points to metrics.jsonl and shows them: as a progress bar on a terminal, elsewhere as log lines like those
    of the reproduced systems.

    Values stay on the device until a point is logged. `elapsed` is in seconds of training, those before a resumption
    included. images_per_second leaves out evaluations and checkpoints.
    """

    def __init__(self, run: Run, bar: ProgressBar, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._settings = run.recipe.train
        self._points, self._summaries = (
            PointWriter(path if ranks.is_main else None) for path in (run.metrics, run.summaries)
        )
        self._bar = bar
        self._start = time.perf_counter()
        self._seconds_to_first_step: float | None = None
        self._smoothed_loss: Tensor | None = None
        self._shown_losses: deque[float] = deque(maxlen=SPARKLINE_LENGTH)
        self._shown_precision = ""
        self._tracking_seconds = 0.0  # time spent on writing points and log lines
        self._summary_seconds = 0.0
        self.restart_clock(0)

    def restore(self, state: dict[str, float], step: int, device: torch.device) -> None:
        """Continue, on `device`, from the `state` of a checkpoint at `step`."""
        self._smoothed_loss = torch.tensor(state["smoothed_loss"], device=device)
        self._start -= state["elapsed"]
        self._summary_seconds = state.get("summary_seconds", 0.0)
        self.restart_clock(step)
        self._bar.update(self._bar.task_ids[0], completed=step)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of the log; all points so far are written to the disk first."""
        smoothed_loss = float("nan") if self._smoothed_loss is None else float(self._smoothed_loss)
        return {
            "elapsed": self.elapsed,
            "smoothed_loss": smoothed_loss,
            "metrics_size": self._points.durable_size(),
            "summaries_size": self._summaries.durable_size(),
            "summary_seconds": self._summary_seconds,
        }

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def smooth(self, loss: Tensor) -> None:
        """Update the smoothed loss, on the device; called at every step."""
        if self._smoothed_loss is None:
            self._smoothed_loss = loss.clone()
        else:
            self._smoothed_loss.lerp_(loss, 1 - SMOOTHING)

    def log_step(
        self,
        step: int,
        values: dict[str, Tensor],
        logits: Tensor,
        labels: Tensor,
        learning_rate: float,
    ) -> None:
        """Write and show a point at `step` (from 0): the means over all ranks of `values`, with the loss among them,
        smoothed loss, batch accuracy and speed."""
        assert self._smoothed_loss is not None
        values |= {"smoothed_loss": self._smoothed_loss, "batch_accuracy": (logits.argmax(1) == labels).float().mean()}
        means = dict(zip(values, self._ranks.mean(list(values.values())), strict=True))
        loss, accuracy = means["loss"], means["batch_accuracy"]
        now = time.perf_counter()
        if self._seconds_to_first_step is None:
            self._seconds_to_first_step = now - self._clock_start
        seconds = (now - self._clock_start) / max(1, step + 1 - self._clock_step)
        self.restart_clock(step + 1)
        rate = self._settings.batch_size / seconds
        self._points.write(
            step,
            {
                **means,
                "learning_rate": learning_rate,
                "images_per_second": rate,
                "seconds_per_batch": seconds,
                "elapsed": self.elapsed,
            },
        )
        self._shown_losses.append(means["smoothed_loss"])
        below = f"loss {sparkline(self._shown_losses)} {loss:.4g} · {rate:,.0f} images/s{self._shown_precision}"
        self._bar.update(self._bar.task_ids[0], completed=step + 1, status_line=below)
        self._log_line(
            f"step {step}, loss = {loss:.4g}, accuracy = {accuracy:.3f} ({rate:.1f} images/s; {seconds:.3g} s/batch)"
        )
        self._tracking_seconds += time.perf_counter() - now

    def summary_is_due(self, step: int) -> bool:
        """Whether layers are to be summarised at `step`: every train.summary_every steps and at the last one, unless
        summaries have taken more than SUMMARY_SHARE of the time."""
        every, is_last = self._settings.summary_every, step == self._settings.steps - 1
        is_due = every and (step % every == 0 or is_last) and self._ranks.is_main
        return bool(is_due) and self._summary_seconds <= SUMMARY_SHARE * self.elapsed

    def summarize_layers(self, step: int, network: nn.Module, inputs: Tensor) -> None:
        """Write the distributions of each layer's values to summaries.jsonl; called after the backward pass. The
        summaries numbered 0, 1, 2, 4, 8, … and the last one hold images of the batch, too."""
        start = time.perf_counter()
        number, is_last = step // self._settings.summary_every, step == self._settings.steps - 1
        has_images = is_last or number & (number - 1) == 0
        images = {"images": packed(sample(inputs))} if has_images else {}
        self._summaries.write(step, {"layers": summarize(network, inputs), **images})
        self._summary_seconds += time.perf_counter() - start

    def log_precision(self, step: int, precision: dict[str, float]) -> None:
        """Write and show the precision@1 of the averaged weights after `step` updates, by split."""
        self._points.write(
            step, {**{_metric_name(split): value for split, value in precision.items()}, "elapsed": self.elapsed}
        )
        self._shown_precision = "".join(f" · {split} {value:.3f}" for split, value in precision.items())
        shown = (f"{split} precision @ 1 = {value:.3f}" for split, value in precision.items())
        self._log_line(f"after {step} steps, " + ", ".join(shown))
        self.restart_clock(step)

    def finish(self, steps: int, trained: int) -> None:
        """Write and show how long the training took: in all, per 100 steps, and up to the first of the `trained` steps
        of this process."""
        if self._seconds_to_first_step is None:  # it ends early, and this process has not logged a step
            self._seconds_to_first_step = time.perf_counter() - self._clock_start
        figures = {
            "training_seconds": self.elapsed,
            "seconds_per_100_steps": 100 * self.elapsed / steps,
            "seconds_to_first_step": self._seconds_to_first_step,
            "tracking_seconds": self._tracking_seconds,
            "summary_seconds": self._summary_seconds,
        }
        self._points.write(steps, figures)
        log(
            f"trained {trained} steps; {self.elapsed:.1f} s in all, {figures['seconds_per_100_steps']:.2f} s "
            f"per 100 steps, {self._seconds_to_first_step:.2f} s to the first step"
        )

    def restart_clock(self, step: int) -> None:
        """Measure images_per_second from now, after `step` steps: what came before, such as a checkpoint, does not
        count."""
        self._clock_start, self._clock_step = time.perf_counter(), step

    def close(self) -> None:
        self._points.close()
        self._summaries.close()

    def _log_line(self, text: str) -> None:
        if self._bar.disable:
            log(f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}: {text}")


def sparkline(values: Sequence[float]) -> str:
    """A line of bars, one character per value, from the lowest value to the highest; empty where the terminal cannot
    show it or a value is not finite."""
    # while a bar is shown, rich replaces sys.stderr by a stream without an encoding
    is_utf = sys.__stderr__ is not None and sys.__stderr__.encoding.lower().startswith("utf")
    if not (is_utf and all(map(math.isfinite, values))):
        return ""
    lowest, highest = min(values), max(values)
    step = (highest - lowest) / (len(SPARKLINE_CHARACTERS) - 1) or 1.0
    return "".join(SPARKLINE_CHARACTERS[round((value - lowest) / step)] for value in values)


def _metric_name(split: str) -> str:
    return "precision_at_1" if split == "test" else f"{split}_precision_at_1"


@contextmanager
def progress_log(run: Run, ranks: RankGroup) -> Iterator[ProgressLog]:
    """The log of a training, closed at the end of the block."""
    with progress(run.name, run.recipe.train.steps, "steps") as bar:
        opened = ProgressLog(run, bar, ranks)
        try:
            yield opened
        finally:
            opened.close()
            sys.stderr.flush()

"""What a training shows and records: metrics.jsonl, log lines, the progress bar."""

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
from pipeline.training.distributed import World
from pipeline.training.layer_summary import sample, summarize

if TYPE_CHECKING:
    from convline.console import ProgressBar

SMOOTHING = 0.9
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 30  # points of the loss that are shown on a terminal
SUMMARY_SHARE = 0.015  # of the training time, at most


class Monitor:
    """Records points and shows them: a bar on a terminal, the originals' lines elsewhere.

    Values stay on the device until a point is logged. `elapsed` is in seconds of training, those before a
    resumption included, evaluations and checkpoints left out of images_per_second.
    """

    def __init__(self, run: Run, bar: ProgressBar, world: World) -> None:
        self._world = world
        self._settings = run.recipe.train
        self._points, self._summaries = (  # closed by monitor()
            PointWriter(path if world.is_main else None) for path in (run.metrics, run.summaries)
        )
        self._bar = bar
        self._began = time.perf_counter()
        self._seconds_to_first_step: float | None = None
        self._smoothed: Tensor | None = None
        self._losses: deque[float] = deque(maxlen=SPARKS)
        self._note = ""
        self._tracking_seconds = 0.0  # that writing points and lines took
        self._summary_seconds = 0.0
        self._mark(0)

    def restore(self, state: dict[str, float], step: int, device: torch.device) -> None:
        """Go on, on `device`, from what `state` returned at `step`."""
        self._smoothed = torch.tensor(state["smoothed_loss"], device=device)
        self._began -= state["elapsed"]
        self._summary_seconds = state.get("summary_seconds", 0.0)
        self._mark(step)
        self._bar.update(self._bar.task_ids[0], completed=step)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; the points so far are made durable."""
        smoothed = float("nan") if self._smoothed is None else float(self._smoothed)
        return {
            "elapsed": self.elapsed,
            "smoothed_loss": smoothed,
            "metrics_size": self._points.durable_size(),
            "summaries_size": self._summaries.durable_size(),
            "summary_seconds": self._summary_seconds,
        }

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def observe(self, loss: Tensor) -> None:
        """Every step: the smoothed loss, on the device."""
        if self._smoothed is None:
            self._smoothed = loss.clone()
        else:
            self._smoothed.lerp_(loss, 1 - SMOOTHING)

    def log(
        self,
        step: int,
        values: dict[str, Tensor],
        logits: Tensor,
        labels: Tensor,
        learning_rate: float,
    ) -> None:
        """A point of the curve, at `step` (from 0), over all ranks: `values`, the loss among them, and the rest."""
        assert self._smoothed is not None
        values |= {"smoothed_loss": self._smoothed, "batch_accuracy": (logits.argmax(1) == labels).float().mean()}
        means = dict(zip(values, self._world.mean(list(values.values())), strict=True))
        loss, accuracy = means["loss"], means["batch_accuracy"]
        now = time.perf_counter()
        if self._seconds_to_first_step is None:
            self._seconds_to_first_step = now - self._marked
        seconds = (now - self._marked) / max(1, step + 1 - self._marked_step)
        self._mark(step + 1)
        rate = self._settings.batch_size / seconds
        self._write(
            step,
            **means,
            learning_rate=learning_rate,
            images_per_second=rate,
            seconds_per_batch=seconds,
            elapsed=self.elapsed,
        )
        self._losses.append(means["smoothed_loss"])
        below = f"loss {sparkline(self._losses)} {loss:.4g} · {rate:,.0f} images/s{self._note}"
        self._bar.update(self._bar.task_ids[0], completed=step + 1, status_line=below)
        self._line(
            f"step {step}, loss = {loss:.4g}, accuracy = {accuracy:.3f} ({rate:.1f} images/s; {seconds:.3g} s/batch)"
        )
        self._tracking_seconds += time.perf_counter() - now

    def summarize(self, step: int, network: nn.Module, inputs: Tensor) -> None:
        """Every so many steps, after the backward pass: how the values of each layer are distributed, and at the first
        of them, the second, the fourth and so on, and the last, images of the batch.

        Left out while summaries have taken more than SUMMARY_SHARE of the time.
        """
        every, is_last = self._settings.summary_every, step == self._settings.steps - 1
        is_due = every and (step % every == 0 or is_last)
        if not (is_due and self._world.is_main) or self._summary_seconds > SUMMARY_SHARE * self.elapsed:
            return
        began = time.perf_counter()
        number = step // every
        has_images = is_last or number & (number - 1) == 0
        images = {"images": packed(sample(inputs))} if has_images else {}
        self._summaries.write(step, {"layers": summarize(network, inputs), **images})
        self._summary_seconds += time.perf_counter() - began

    def evaluated(self, step: int, precision: dict[str, float]) -> None:
        """precision@1 of the averaged weights after `step` updates, by split."""
        self._write(step, **{_metric(split): value for split, value in precision.items()}, elapsed=self.elapsed)
        self._note = "".join(f" · {split} {value:.3f}" for split, value in precision.items())
        self._line(f"after {step} steps, " + ", ".join(f"{s} precision @ 1 = {v:.3f}" for s, v in precision.items()))
        self._mark(step)

    def finish(self, steps: int, trained: int) -> None:
        """The machine benchmark: seconds in all, for 100 steps and to the first step of this process."""
        assert self._seconds_to_first_step is not None
        figures = {
            "training_seconds": self.elapsed,
            "seconds_per_100_steps": 100 * self.elapsed / steps,
            "seconds_to_first_step": self._seconds_to_first_step,
            "tracking_seconds": self._tracking_seconds,
            "summary_seconds": self._summary_seconds,
        }
        self._write(steps, **figures)
        log(
            f"trained {trained} steps; {self.elapsed:.1f} s in all, {figures['seconds_per_100_steps']:.2f} s "
            f"per 100 steps, {self._seconds_to_first_step:.2f} s to the first step"
        )

    def resume_clock(self, step: int) -> None:
        """Leave what happened since the last step (a checkpoint, say) out of images_per_second."""
        self._mark(step)

    def close(self) -> None:
        self._points.close()
        self._summaries.close()

    def _mark(self, step: int) -> None:
        self._marked, self._marked_step = time.perf_counter(), step

    def _write(self, step: int, **values: float) -> None:
        self._points.write(step, values)

    def _line(self, text: str) -> None:
        if self._bar.disable:
            log(f"{datetime.now():%Y-%m-%d %H:%M:%S.%f}: {text}")


def sparkline(values: Sequence[float]) -> str:
    """A character a value, the higher the larger, from the least to the greatest of them."""
    # while a bar is shown, sys.stderr is rich's, which does not say
    is_utf = sys.__stderr__ is not None and sys.__stderr__.encoding.lower().startswith("utf")
    if not (is_utf and all(map(math.isfinite, values))):
        return ""
    lowest, highest = min(values), max(values)
    step = (highest - lowest) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - lowest) / step)] for value in values)


def _metric(split: str) -> str:
    return "precision_at_1" if split == "test" else f"{split}_precision_at_1"


@contextmanager
def monitor(run: Run, world: World) -> Iterator[Monitor]:
    with progress(run.name, run.recipe.train.steps, "steps") as bar:
        watch = Monitor(run, bar, world)
        try:
            yield watch
        finally:
            watch.close()
            sys.stderr.flush()

"""How fast models run beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

# the threads of the side before spin for a while after its last call: without a pause the next one runs at two thirds
PAUSE = 0.05


def seconds_per_call(sides: Mapping[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, float]:
    """The median over all rounds, in which the sides take turns of so many `seconds` each."""
    measured: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            time.sleep(PAUSE)
            run()  # its own threads wake up
            began, calls = time.perf_counter(), 0
            while time.perf_counter() - began < seconds or not calls:
                run()
                calls += 1
            measured[side].append((time.perf_counter() - began) / calls)
    return {side: statistics.median(values) for side, values in measured.items()}

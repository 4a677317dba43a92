"""How fast models run beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def seconds_per_call(sides: Mapping[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, float]:
    """The median over all rounds, in which the sides take turns of so many `seconds` each, after one to warm up."""
    measured: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, run in sides.items():
            began, calls = time.perf_counter(), 0
            while time.perf_counter() - began < seconds or not calls:
                run()
                calls += 1
            if number:
                measured[side].append((time.perf_counter() - began) / calls)
    return {side: statistics.median(values) for side, values in measured.items()}

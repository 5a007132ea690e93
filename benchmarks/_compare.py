"""Side-by-side timing: both contenders alternate in one process, so that what disturbs one disturbs the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    count: int,
    unit: str,
    rounds: int = 7,
    goal: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Times both in alternation after one warm-up each and prints the ratio of medians.

    Args:
        name: What is measured.
        ours: One run of clipmb.
        theirs: One run of the peer, on the same input.
        count: Items per run.
        unit: What an item is.
        rounds: Timed runs of each.
        clock: What is measured: the time that passes, or `time.process_time`, which other load disturbs less.
        goal: The ratio that is promised, shown beside the one measured.

    Returns:
        Median time of the peer over median time of clipmb: above 1, clipmb is faster.
    """
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for run in times:
        run()
    order = list(times.items())
    for _ in range(rounds):
        order.reverse()  # so that neither gains or loses by what the other left in caches and in the allocator
        for run, taken in order:
            start = clock()
            run()
            taken.append(clock() - start)
    mine, peer = statistics.median(times[ours]), statistics.median(times[theirs])
    ratio = peer / mine
    promise = "" if goal is None else f"  (goal {goal:g}x: {'met' if ratio >= goal else 'NOT MET'})"
    print(
        f"{name:<44} {count / mine:>12,.1f} {unit}/s   peer {count / peer:>12,.1f}   {ratio:6.2f}x{promise}", flush=True
    )
    return ratio

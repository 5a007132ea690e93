"""Side-by-side timing: the contenders alternate in one process, so that what disturbs one disturbs the others."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable

ROWS = "CLIPMB_BENCH_ROWS"  # the file to which `run.py` has rows of its tables written


def medians(
    runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Times several contenders in alternation, after one warm-up each.

    Args:
        runs: One run of each, by name, on the same input.
        rounds: Timed runs of each, in a random order in each round, so that none gains or loses by what another left
            in caches and in the allocator.
        clock: What is measured: the time that passes, or `time.process_time`, which other load disturbs less.

    Returns:
        The median seconds of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    order = list(runs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = clock()
            runs[name]()
            taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


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
    peer: str = "transformers",
) -> float:
    """Times both in alternation and prints the ratio of medians.

    Args:
        name: What is measured.
        ours: One run of clipmb.
        theirs: One run of the peer, on the same input.
        count: Items per run.
        unit: What an item is.
        rounds: As in `medians`.
        goal: The ratio that is promised, shown beside the one measured.
        clock: As in `medians`.
        peer: The name of the peer.

    Returns:
        Median time of the peer over median time of clipmb: above 1, clipmb is faster.
    """
    found = medians({"ours": ours, "theirs": theirs}, rounds, clock)
    ratio = found["theirs"] / found["ours"]
    row(
        name, clipmb=f"{count / found['ours']:,.1f} {unit}/s", peer=f"{count / found['theirs']:,.1f} ({peer})",
        ratio=f"{ratio:.2f}", goal="" if goal is None else f"{goal:g} ({'met' if ratio >= goal else 'not met'})",
    )  # fmt: skip
    return ratio


def row(what: str, table: str = "", **cells: str) -> None:
    """Prints one line of a table, which `run.py` writes down.

    Args:
        what: What was measured.
        table: The title of the table, where a benchmark has several.
        cells: The other columns.
    """
    shown = "   ".join(f"{name} {value}" for name, value in cells.items() if value)
    label = f"{what} ({table})" if table else what
    print(f"{label:<44} {shown}", flush=True)
    if path := os.environ.get(ROWS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, "what": what.strip(), **cells}) + "\n")

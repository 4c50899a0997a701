"""How well scores foretell outcomes, and how much of that a trivial count would have told."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Judged(NamedTuple):
    """One replayed episode. ``score`` was said before any outcome of its task was known."""

    task: int
    outcome: float
    score: float
    length: int
    tool_calls: int


def auc(scores: Sequence[float], outcomes: Sequence[float]) -> float:
    """Probability that a solved episode scores above an unsolved one, ties counting half (Hanley, McNeil 1982).

    Raises ValueError where there is only one kind of outcome. Example: ``auc([0.1, 0.9], [0, 1]) == 1.0``
    """
    solved = [score for score, outcome in zip(scores, outcomes, strict=True) if outcome > 0.5]
    failed = [score for score, outcome in zip(scores, outcomes, strict=True) if outcome <= 0.5]
    if not solved or not failed:
        raise ValueError("an AUC needs solved and unsolved episodes")
    wins = sum((good > bad) + 0.5 * (good == bad) for good in solved for bad in failed)
    return wins / (len(solved) * len(failed))


def either_way(scores: Sequence[float], outcomes: Sequence[float]) -> float:
    """The AUC of the better sign: a baseline is given the sign that it could not have known."""
    found = auc(scores, outcomes)
    return max(found, 1 - found)


def task_interval(judged: Sequence[Judged], seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval of the scores' AUC; whole tasks are resampled, since trials of a task are alike."""
    by_task: dict[int, list[Judged]] = {}
    for one in judged:
        by_task.setdefault(one.task, []).append(one)
    groups = [by_task[task] for task in sorted(by_task)]
    dice = random.Random(seed)
    found = []
    while len(found) < resamples:
        drawn = [one for group in dice.choices(groups, k=len(groups)) for one in group]
        if len({one.outcome > 0.5 for one in drawn}) == 2:
            found.append(auc([one.score for one in drawn], [one.outcome for one in drawn]))
    found.sort()
    return found[round(0.025 * resamples)], found[round(0.975 * resamples) - 1]


def blocks(tasks: Iterable[int], size: int, seed: int) -> list[list[int]]:
    """Tasks in random order, ``size`` at a time: what is scored together before anything of it is learned."""
    order = sorted(set(tasks))
    random.Random(seed).shuffle(order)
    return [order[at : at + size] for at in range(0, len(order), size)]


def first_scores(rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """The score of each call as it was first said, from rows with ``call``, ``version`` and ``value``."""
    first: dict[str, tuple[int, float]] = {}
    for row in rows:
        call, version, value = str(row["call"]), int(str(row["version"])), float(str(row["value"]))
        if call not in first or version < first[call][0]:
            first[call] = (version, value)
    return {call: value for call, (_, value) in first.items()}


def table(judged: Sequence[Judged], skipped: int, seed: int) -> str:
    """The closing table. ``skipped``: episodes of the first block, scored before the model had learned anything."""
    outcomes = [one.outcome for one in judged]
    low, high = task_interval(judged, seed)
    rows = [
        ("reward model", f"{auc([one.score for one in judged], outcomes):.3f}  (95% {low:.3f} to {high:.3f})"),
        ("episode length", f"{either_way([one.length for one in judged], outcomes):.3f}  (given the better sign)"),
        ("number of tool calls", f"{either_way([one.tool_calls for one in judged], outcomes):.3f}  (the same)"),
    ]
    head = (
        f"AUC on the outcome of {len(judged)} episodes of {len({one.task for one in judged})} tasks, "
        f"{sum(outcomes):.0f} solved ({skipped} more came before the model had learned anything)"
    )
    return "\n".join([head, *(f"  {name:<22}{value}" for name, value in rows)])

"""What 'everloop reward report' says: the numbers of each slice, and the tables that tell them to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reward.features import Example
from reward.model import RewardModel
from reward.release import PRAISED, probe
from reward.report import Row, numbers
from reward.slices import slices
from services.tables import table

COLUMNS = {
    "labels": "labels",
    "auc": "AUC",
    "calibration_error": "cal. error",
    "coverage": "coverage",
    "drift": "drift",
    "length_correlation": "length",
}
SOURCES = {
    "good_if_good": "good if good",
    "bad_if_bad": "bad if bad",
    "up": "a good weighs",
    "down": "a bad weighs",
    "words": "words",
}
LEGEND = """AUC: how often the better of two labels was foretold the likelier; cal. error: foretold against said;
coverage: calls with an opinion; drift: by how much labels came to exceed what was foretold; length: correlation of what
was foretold with the answer's length; planted: pairs of which the good answer wins; -: too few labels to say"""
ASKED = 200  # newest well-rated answers that planted ones are set against, all slices together


def sliced(
    rows: Sequence[Row], names: Sequence[str], snapshots: Mapping[str, RewardModel]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """By slice: the numbers ``whole``, and for each version those of what was first rated while it scored, with the
    share of planted pairs that it judges rightly. And that share of all calls, by version and kind of pair."""
    model = next((snapshots[name] for name in names if name in snapshots), None)
    praised = [row for row in sorted(rows, key=lambda row: -row.time) if row.newest is not None and row.newest > 0.5]
    asked = {(row.episode, row.call) for row in praised[:ASKED]}
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, dict[str, float]] = {}
    for part, its in slices(rows, model).items():
        found[part] = {"whole": numbers(its)}
        good = [Example(row.prompt, row.answer) for row in reversed(its) if (row.episode, row.call) in asked][:PRAISED]
        for name in names:
            won = probe(snapshots[name], good) if name in snapshots else {}
            share = float(np.concatenate(list(won.values())).mean()) if won else None
            found[part][name] = {**numbers([row for row in its if row.reward_version == name]), "planted": share}
            if part == "all" and name in snapshots:
                kinds[name] = {kind: float(one.mean()) for kind, one in won.items()}
    return found, kinds


def told(result: Mapping[str, Any]) -> str:
    """The whole report as tables."""
    now, before = result["version"], result["before"]
    lines = [f"{result['policy']}: reward model {now}, foretold before it was learned", ""]
    lines.append(_numbers(result["slices"], "whole", COLUMNS))
    by_version = {**COLUMNS, "planted": "planted"}
    lines += ["", f"now: what was rated while {now} scored", _numbers(result["slices"], now, by_version)]
    if before is not None:
        lines += ["", f"before: what was rated while {before} did", _numbers(result["slices"], before, by_version)]
    if result["courses"]:
        ends = [[stage, its["episodes"], its["auc"]] for stage, its in result["courses"].items()]
        lines += ["", "how episodes end, foretold when each turn was new", table(["after", "episodes", "AUC"], ends)]
    lines += ["", "planted pairs of which the good answer wins, by kind", _planted(result["planted"])]
    for name, sources in result["sources"].items():
        rows = [[source, *(its[column] for column in SOURCES)] for source, its in sources.items()]
        if rows:
            lines += ["", f"how far each source is believed by {name}", table(["source", *SOURCES.values()], rows)]
    for name, why in result["gone"].items():
        lines += ["", f"{name} cannot be asked any more, so its planted pairs, sources and topics are not told: {why}"]
    return "\n".join([*lines, "", LEGEND])


def _numbers(parts: Mapping[str, Any], which: str, columns: Mapping[str, str]) -> str:
    """A row a slice; a slice in which nothing was rated is left out."""
    rows = [[name, *(its[which][column] for column in columns)] for name, its in parts.items() if its[which]["labels"]]
    return table(["slice", *columns.values()], rows) if rows else "nothing so far"


def _planted(planted: Mapping[str, Mapping[str, float]]) -> str:
    asked = {name: won for name, won in planted.items() if won}
    kinds = list(dict.fromkeys(kind for won in asked.values() for kind in won))
    if not kinds:
        return "not known: no well-rated answers, or the snapshots are gone"
    return table(["version", *kinds], [[name, *(won.get(kind) for kind in kinds)] for name, won in asked.items()])

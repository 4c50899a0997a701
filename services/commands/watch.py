"""``everloop release watch``: a running canary's evidence, refreshed in place until there is a verdict."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from everloop.errors import ConfigError
from everloop.release import ENDED, Release, ReleaseState
from everloop.topics import RELEASES

from services.installation import Installation
from services.tables import table

EVERY = 1.0  # seconds between looks
ARMS = ("canary", "control")
ON_ITS_WAY = (ReleaseState.CANDIDATE, ReleaseState.GATED, ReleaseState.CANARY)


def watch(here: Installation, pair: tuple[str, str], name: str | None, *, once: bool, as_json: bool) -> int:
    """Show until the verdict; ``once``: as it is now. 0: live or still on its way; 1: it ended otherwise."""
    release = found(here, pair, name)
    shown = 0
    while True:
        progress = _progress(here, release)
        lines = [json.dumps(_whole(release, progress))] if as_json else list(told(release, progress))
        shown = _show(lines, shown if sys.stdout.isatty() and not as_json else None)
        if once or release.state not in ON_ITS_WAY:
            return 1 if release.state in ENDED else 0
        time.sleep(EVERY)
        release = found(here, pair, release.id)


def found(here: Installation, pair: tuple[str, str], name: str | None) -> Release:
    """The newest version of the release that a beginning of id or adapter names; None: the canary, else the newest.

    Raises ConfigError where there is none, or several.
    """
    newest: dict[str, Release] = {}
    for release in here.records(RELEASES, Release):
        held = newest.get(release.id)
        if release.key == "/".join(pair) and (held is None or release.step > held.step):
            newest[release.id] = release
    if name is None:
        order = sorted(newest.values(), key=lambda r: (r.state in ON_ITS_WAY, r.state is ReleaseState.CANARY, r.time))
        if order:
            return order[-1]
    fits = [r for r in newest.values() if name and (r.id.startswith(name) or r.adapter.startswith(name))]
    if len(fits) != 1:
        what = "no release yet" if not newest else "no such release" if not fits else f"{len(fits)} such releases"
        raise ConfigError(f"{'/'.join(pair)} has {what}; see 'everloop release list'")
    return fits[0]


def _progress(here: Installation, release: Release) -> dict[str, Any] | None:
    policies = (here.status("releaser") or {}).get("policies") or {}
    policy = policies.get(release.key) or {}
    for its in (policy.get("in_progress"), *policy.get("waiting", [])):
        if its and its.get("release") == release.id:
            return dict(its)
    return None


def _whole(release: Release, progress: dict[str, Any] | None) -> dict[str, Any]:
    return {"release": release.model_dump(mode="json"), "progress": progress}


def told(release: Release, progress: dict[str, Any] | None) -> Iterator[str]:
    """What is compared, how many, the interval, when it decides, what would stop it."""
    yield f"{release.key}  {release.id}  adapter {release.adapter[:12]}  {release.state.value.replace('_', ' ')}"
    yield f"because    {release.reason}"
    its = progress or {}
    if its.get("waits"):
        yield f"waits      {its['waits']}"
    seen = its.get("arms") or release.evidence.get("canary")
    if release.plan is not None and seen:
        yield from _numbers(release, its, seen)
    elif release.state in ON_ITS_WAY and progress is None:
        yield "numbers    unknown: the releaser does not answer, or has not looked yet (everloop status)"


def _numbers(release: Release, its: dict[str, Any], seen: dict[str, Any]) -> Iterator[str]:
    plan = release.plan
    assert plan is not None
    yield (
        f"compares   {plan.metric} (mean of thumbs, ratings and outcomes of each person), canary minus control within "
        f"each stage; margin {plan.margin:g}, {plan.alpha:.0%} error on each side at all times"
    )
    yield ""
    yield table(*_table(release, seen))
    yield ""
    interval = its.get("interval") or seen
    if interval.get("difference") is not None:
        low, high = interval["low"], interval["high"]
        yield f"interval   {low:+.3f} to {high:+.3f} (difference {interval['difference']:+.3f})"
    yield f"guards     {_guards(seen)}"
    if its.get("decides"):
        yield f"decides    {its['decides']}"
    for line in its.get("stops", []):
        yield f"stops      {line}"


def _table(release: Release, seen: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    names = ["stage", "share", *(f"{arm} {what}" for arm in ARMS for what in ("came", "rated", "success"))]
    rows: list[list[Any]] = []
    for number, stage in enumerate(seen.get("stages", [])):
        mark = " now" if number == release.stage and release.state is ReleaseState.CANARY else ""
        cells = [cell for arm in ARMS for cell in (stage[arm]["came"], stage[arm]["units"], _mean(stage[arm]["mean"]))]
        rows.append([f"{number + 1}{mark}", f"{stage['share']:.0%}", *cells])
    whole = [cell for arm in ARMS for cell in (_episodes(seen[arm]), seen[arm]["units"], _mean(seen[arm]["mean"]))]
    return names, [*rows, ["all", "", *whole]]


def _episodes(arm: dict[str, Any]) -> str:
    return f"{arm['episodes']} episodes"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _guards(seen: dict[str, Any]) -> str:
    counts = [
        f"{what} {'/'.join(str(seen[arm].get(what, 0)) for arm in ARMS)}" for what in ("failed", "empty", "broken")
    ]
    lengths = "/".join("-" if seen[arm].get("length") is None else f"{seen[arm]['length']:.0f}" for arm in ARMS)
    calls = "/".join(str(seen[arm].get("calls", 0)) for arm in ARMS)
    return f"canary/control: {', '.join(counts)} of {calls} calls; typical length {lengths} characters"


def _show(lines: list[str], before: int | None) -> int:
    """Print; over the ``before`` lines of the last time where the output is a terminal. Returns how many there are."""
    if before:
        print(f"\x1b[{before}F\x1b[J", end="")
    text = "\n".join(lines)
    print(text, flush=True)
    return _height(text)


def _height(text: str) -> int:
    import shutil

    width = max(shutil.get_terminal_size().columns, 1)
    return sum(max(1, -(-len(line) // width)) for line in text.split("\n"))

"""From ``everloop release rollback``, and from a guard's trip, to the gateway's answers: how long until nobody gets the
withdrawn adapter?

By command, on the processes of ``everloop up``: one adapter is live for good, and one after the other is promoted over
it and rolled back by the command, as an operator would, while two clients ask the gateway without pause. Every answer
says which policy version gave it. Measured are the releaser's decision, the first answer of the version before, and
the last answer of the withdrawn one, which may have begun before. The benchmark fails where the withdrawn adapter
answers a request that was sent after an answer of the version before.

By a guard (``_guards``): adapters that turn bad for users alone, in three ways, each stopped in its canary; from the
answer that tripped the guard on, and how many requests each cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _guards, _report
from benchmarks._guards import Stopped
from benchmarks._spoiled import KINDS
from benchmarks._traffic import CLIENTS, Answer, Traffic
from examples.bank_desk.platform import (
    COMMAND,
    POLICY,
    TENANT,
    Platform,
    environment,
    everloop_command,
    write_config,
)

CACHE = Path(".everloop/cache")
ROLLBACKS, QUICK_ROLLBACKS = 20, 5
EACH, QUICK_EACH = 5, 1  # adapters of each kind that a guard stops
NEVER = 4000  # scored episodes, more than are sent: no training run starts
BEFORE, AFTER = 0.5, 1.0  # seconds of traffic around a rollback
QUESTION = {"model": POLICY, "messages": [{"role": "user", "content": "where is my parcel"}], "max_tokens": 8}


class Rollback(NamedTuple):
    """Seconds from the command's start. ``told``: until the command itself said that it was done."""

    decided: float
    first_before: float
    last_withdrawn: float
    told: float


def make_adapters(base: Path, folder: Path, count: int, groups: Sequence[str] = ()) -> list[str]:
    """Adapters that change every answer's numbers a little; their hashes. ``groups``: of weights; none named: all."""
    import torch

    from trainer.policy import base as bases
    from trainer.policy import lora, targets

    policy = bases.load(str(base), base.parent)
    made = []
    for seed in range(count):
        model = lora.attach(policy, 2, 4.0, groups or targets.GROUPS, seed=seed)
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_B" in name:
                    weights.normal_(0.0, 0.01, generator=chance)
        made.append(lora.save(model, folder))
    return made


def go_live(adapter: Path, config: Path, traffic: Traffic) -> None:
    """Register an adapter made elsewhere and promote it; returns once the gateway answers with it."""
    start = len(traffic.answers)
    everloop_command("release", "register", str(adapter), config=config)
    word = ("--without-evidence", "--reason", "its rollback is measured")
    everloop_command("release", "promote", adapter.name, *word, config=config)
    traffic.until("an answer of the new adapter", lambda new: any(a.version == adapter.name for a in new), start)


def roll_back(withdrawn: str, before: str, config: Path, traffic: Traffic) -> Rollback:
    """One rollback by the command. Ends the benchmark where the withdrawn adapter comes back."""
    time.sleep(BEFORE)
    start, began = len(traffic.answers), time.time()
    command = [*COMMAND, "release", "rollback", "--config", str(config)]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    told = time.time() - began
    traffic.until("an answer of the version before", lambda new: any(a.version == before for a in new), start)
    time.sleep(AFTER)
    first, last = seen(traffic.answers[start:], withdrawn, before, began)
    return Rollback(_decided(withdrawn, config) - began, first - began, last - began, told)


def seen(answers: Sequence[Answer], withdrawn: str, before: str, began: float) -> tuple[float, float]:
    """When the first answer of the version before came, and the last one of the withdrawn adapter (else ``began``).

    Ends the benchmark where the withdrawn adapter answered a request that was sent after that first answer.
    """
    first = min(answer.came for answer in answers if answer.version == before)
    theirs = [answer for answer in answers if answer.version == withdrawn]
    late = [answer for answer in theirs if answer.sent > first]
    if late:
        sys.exit(f"the benchmark failed: {len(late)} requests after the rollback were answered by what it withdrew")
    return first, max((answer.came for answer in theirs), default=began)


def _decided(adapter: str, config: Path) -> float:
    """When the releaser took it back, by its own record."""
    releases = map(json.loads, everloop_command("release", "list", "--json", config=config).splitlines())
    return next(float(r["time"]) for r in releases if r["adapter"] == adapter and r["state"] == "rolled_back")


def run(home: Path, base: Path, count: int) -> list[Rollback]:
    config = write_config(home, CACHE.absolute(), base, NEVER, 0)
    stays, *others = make_adapters(base, home / "made", count + 1)
    with Platform(home, config) as platform:
        traffic = Traffic(platform.start(), QUESTION)
        with traffic.flowing():
            go_live(home / "made" / stays, config, traffic)
            done = []
            for number, adapter in enumerate(others, 1):
                go_live(home / "made" / adapter, config, traffic)
                done.append(roll_back(adapter, stays, config, traffic))
                print(f"{number} of {count}: {1000 * done[-1].last_withdrawn:.0f} ms", file=sys.stderr)
        if traffic.failed:
            sys.exit(f"the benchmark failed: {len(traffic.failed)} requests were refused: {traffic.failed[0]}")
    return done


def report(done: Sequence[Rollback], stopped: Sequence[Stopped]) -> tuple[list[dict[str, Any]], list[_report.Aim]]:
    parts: dict[str, list[float]] = {
        "command to the releaser's decision": [one.decided for one in done],
        "decision to the first answer of the version before": [one.first_before - one.decided for one in done],
        "decision to the last answer of the withdrawn one": [one.last_withdrawn - one.decided for one in done],
        "command to the first answer of the version before": [one.first_before for one in done],
        "command to the last answer of the withdrawn one": [one.last_withdrawn for one in done],
        "command to its own answer": [one.told for one in done],
        "guard's trip to the releaser's decision": [one.decided for one in stopped],
        "guard's trip to the last request sent to the withdrawn one": [one.asked for one in stopped],
        "guard's trip to the last answer of the withdrawn one": [one.answered for one in stopped],
    }
    rows: list[dict[str, Any]] = [
        {"from … to": what, "p50 ms": round(1000 * statistics.median(its)), "max ms": round(1000 * max(its))}
        for what, its in parts.items()
    ]
    for kind in dict.fromkeys(one.kind for one in stopped):
        its = [one for one in stopped if one.kind == kind]
        affected = {"requests p50": round(statistics.median(one.affected for one in its))}
        affected |= {"max": max(one.affected for one in its), "sent after the trip": max(one.after for one in its)}
        rows.append({"from … to": f"affected by an adapter that {kind}", **affected})
    by_command = max(max(one.first_before, one.last_withdrawn) for one in done)
    by_guard = max(max(one.asked, one.answered) for one in stopped)
    return rows, [
        _report.aim("seconds from the command until the version before answers all", 1.0, by_command, most=True),
        _report.aim("seconds from a guard's trip until the version before answers all", 1.0, by_guard, most=True),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return _report.parser("rollback, measured at the gateway").parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    from trainer.policy import tiny_k2

    options, began = parse(arguments), _report.load()
    rollbacks, each = (QUICK_ROLLBACKS, QUICK_EACH) if options.quick else (ROLLBACKS, EACH)
    base = tiny_k2.cached(CACHE.absolute())
    with tempfile.TemporaryDirectory(prefix="ev-back-") as folder:
        done = run(Path(folder) / "command", base, rollbacks)
        spoiled = make_adapters(base, Path(folder) / "made", each * len(KINDS))
        stopped = _guards.run(Path(folder) / "guard", base, CACHE.absolute(), Path(folder) / "made", spoiled)
    rows, aims = report(done, stopped)
    notes = [
        f"{len(done)} rollbacks of {TENANT}/{POLICY}, {CLIENTS} clients that ask without pause, tiny-k2",
        f"{len(stopped)} canaries of half of the people, an engine that answers at once; {each} of each kind",
    ]
    notes += [f"an adapter that {one.kind}: {one.reason}" for one in stopped[: len(KINDS)]]
    _report.publish("rollback", rows, aims, quick=options.quick, notes=[*notes, _report.loads(began)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

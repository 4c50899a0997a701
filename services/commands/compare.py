"""Two adapters (or 'base', or 'provider') on the gold set, side by side: accuracy with the paired difference's bounds,
slices, KL.

Asks the engine that runs. An adapter is named by its hash or the beginning of it; 'live' is what is live now. Beside a
provider lengths are in characters, since its tokens are others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from everloop.errors import ConfigError, NotEnoughData
from everloop.event import BASE, PROVIDER
from everloop.release import Adapter
from everloop.topics import ADAPTERS

from services.commands.orders import add_policy
from services.installation import Installation
from services.tables import table

EVERY = 2.0  # seconds between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="adapter, 'base', 'provider' or 'live'")
    parser.add_argument("b", metavar="B", help="adapter, 'base', 'provider' or 'live'")
    parser.add_argument("--split", choices=("gate", "report"), default="gate")
    parser.add_argument("--json", action="store_true")
    add_policy(parser)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        tenant, policy = here.policy(options.policy)
        engines = here.engine_urls()
        adapters = {a.hash: a for a in here.records(ADAPTERS, Adapter) if a.key == f"{tenant}/{policy}"}
        pair = [named(here, name, adapters, f"{tenant}/{policy}") for name in (options.a, options.b)]
        result = asyncio.run(_compare(here, engines, tenant, policy, pair, adapters, options.split))
    if options.json:
        print(json.dumps(result))
        return 0
    _tell(result)
    return 0


def named(here: Installation, name: str, adapters: dict[str, Adapter], key: str) -> str:
    """The hash (or 'base') that a name means to a policy ('tenant/policy'). Raises ConfigError."""
    if name == "live":
        live = ((here.status("releaser") or {}).get("policies", {}).get(key) or {}).get("live")
        if not live:
            raise ConfigError("the releaser does not say what is live; is the platform up? (everloop status)")
        return str(live["adapter"])
    if name == PROVIDER and here.config.policy(*key.split("/")).provider is None:
        raise ConfigError(f"{key} has no provider; name an adapter, 'base' or 'live'")
    if name in (BASE, PROVIDER):
        return name
    fits = [adapter for adapter in adapters if adapter.startswith(name)]
    if len(fits) != 1:
        raise ConfigError(f"{len(fits)} adapters of {key} begin with {name!r}; 'everloop release list' shows them")
    return fits[0]


async def _compare(
    here: Installation,
    engines: Sequence[str],
    tenant: str,
    policy: str,
    pair: list[str],
    adapters: dict[str, Adapter],
    split: Any,
) -> dict[str, Any]:
    from pipelines.gate import gain_bounds
    from pipelines.gold import GoldSet
    from services.gateway.replicas import Replicas
    from services.releaser.examiner import Examiner
    from services.releaser.state import PolicyState, candidate

    items = GoldSet(here.home.root / "gold").items(tenant, policy, split)
    if not items:
        raise NotEnoughData(f"{tenant}/{policy} has no gold items in split {split}: everloop gold import")
    replicas = Replicas(engines)
    examiner = Examiner(here.config, replicas)
    try:
        await replicas.look()
        answers = []
        for number, name in enumerate(pair, 1):
            told = Progress(f"{number} of {len(pair)}, {name[:12]}")
            if name not in (BASE, PROVIDER):
                told.say("fetching, checking and loading the adapter")
                release = candidate(PolicyState(tenant, policy), adapters[name], 0.0).releases[0]
                await examiner.prepared(release)
            told.say(f"asking {len(items)} {split} items")
            answers.append(await examiner.answers(name, tenant, policy, items, told, by_letters=PROVIDER in pair))
            told.say("done")
    finally:
        await examiner.let_go()
    a, b = answers
    confidence = here.config.policy(tenant, policy).gate.confidence
    unit = "characters" if PROVIDER in pair else "tokens"
    gain, low, high = gain_bounds(b.right - a.right, confidence)
    return {
        "items": len(items),
        "split": split,
        "confidence": confidence,
        "gain": gain,
        "low": low,
        "high": high,
        "adapters": [_row(name, one, unit) for name, one in zip(pair, answers, strict=True)],
        "slices": _slices([item.slice for item in items], a.right, b.right),
    }


class Progress:
    """Says on stderr how far one adapter's answers are, a line every few seconds: the result alone is on stdout."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = self._said = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if done == of:
            self.say(f"{of} answered; measuring what is left")
        elif time.monotonic() - self._said > EVERY:
            self.say(f"{done} of {of} answered")

    def say(self, what: str) -> None:
        self._said = time.monotonic()
        print(f"{self._name}: {what} ({self._said - self._begun:.0f} s)", file=sys.stderr, flush=True)


def _row(name: str, answers: Any, unit: str) -> dict[str, Any]:
    known = answers.kl[answers.kl == answers.kl]
    return {
        "adapter": name,
        "accuracy": float(answers.right.mean()),
        unit: float(answers.length.mean()),
        "kl": float(known.mean()) if known.size else None,
        **{flag: float(values.mean()) for flag, values in answers.flags.items()},
    }


def _slices(names: list[str], a: Any, b: Any) -> dict[str, Any]:
    """Accuracy of both by slice, those that changed most first."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    rows = {name: [len(its), float(a[its].mean()), float(b[its].mean())] for name, its in members.items() if name}
    return dict(sorted(rows.items(), key=lambda row: -abs(row[1][2] - row[1][1])))


def _tell(result: dict[str, Any]) -> None:
    head = list(result["adapters"][0])
    print(table(head, [[row[name] for name in head] for row in result["adapters"]]))
    sure = f"{result['confidence']:.0%} one-sided bounds"
    print(
        f"\nB minus A: {100 * result['gain']:+.1f} points over {result['items']} {result['split']} items, "
        f"between {100 * result['low']:+.1f} and {100 * result['high']:+.1f} ({sure})"
    )
    changed = [[name, *row] for name, row in result["slices"].items() if row[1] != row[2]][:10]
    if changed:
        print("\n" + table(["slice", "items", "A", "B"], changed))

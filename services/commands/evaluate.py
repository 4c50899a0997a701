"""What a policy would be worth to the people whose messages were logged, before it answers any of them.

From the answers that others gave, their recorded probabilities and what people said of them: a self-normalised
importance-weighted mean, and a doubly robust one with the reward model, each with its interval. Where too little of
what the candidate would say was ever said, it says so and gives no number (exit status 1). docs/offpolicy.md explains.

A candidate is named by its hash or the beginning of it; 'base' and 'live' are names too. What it learned from is left
out: 'holdout.gate' keeps a share of the traffic from training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

from everloop.errors import ConfigError
from everloop.event import PROVIDER
from everloop.release import Adapter
from everloop.section import seconds
from everloop.topics import ADAPTERS

from services.commands.compare import named
from services.commands.orders import add_policy
from services.installation import Installation
from services.tables import table

ESTIMATES = {
    "logged": "answers as they were given",
    "doubly_robust": "doubly robust",
    "snips": "self-normalised",
    "importance": "plain importance sampling",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("candidate", metavar="ADAPTER", help="hash, 'base' or 'live'")
    parser.add_argument("--last", default="7d", metavar="TIME", help="of the log: 12h, 7d (the default) …")
    parser.add_argument("--calls", type=int, default=4000, metavar="N", help="the newest so many at most (4000)")
    parser.add_argument(
        "--answers", type=int, default=4, metavar="N", help="of its own to each prompt, for doubly robust; 0: none (4)"
    )
    parser.add_argument("--also-learned", action="store_true", help="take what it learned from as well: flattering")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals (0.95)")
    parser.add_argument("--json", action="store_true")
    add_policy(parser)


def run(options: argparse.Namespace) -> int:
    with Installation.here() as here:
        tenant, policy = here.policy(options.policy)
        since = time.time() - _checked(options)
        key = f"{tenant}/{policy}"
        adapters = {one.hash: one for one in here.records(ADAPTERS, Adapter) if one.key == key}
        candidate = named(here, options.candidate, adapters, key)
        if candidate == PROVIDER:
            raise ConfigError("a provider tells no probabilities of logged answers; name an adapter, 'base' or 'live'")
        from services.evaluation import Asked, evaluated

        asked = Asked(
            tenant,
            policy,
            candidate,
            since,
            options.calls,
            options.answers,
            options.also_learned,
            options.confidence,
        )
        found = evaluated(here.config, asked, adapters, lambda line: print(line, file=sys.stderr, flush=True))
    result = {"policy": key, "adapter": candidate, "last": options.last, **dataclasses.asdict(found)}
    print(json.dumps(result) if options.json else told(result, options.confidence))
    return 0 if found.evaluation.overlap.lacks is None else 1


def _checked(options: argparse.Namespace) -> float:
    """The seconds to look back. Raises ConfigError."""
    if options.calls < 1 or options.answers < 0 or not 0.5 < options.confidence < 1:
        raise ConfigError("--calls is at least 1, --answers at least 0, --confidence between 0.5 and 1")
    try:
        return seconds(options.last)
    except ValueError as error:
        raise ConfigError(f"--last: {error}") from None


def told(result: dict[str, Any], confidence: float) -> str:
    """The result for people."""
    evaluation = result["evaluation"]
    overlap = evaluation["overlap"]
    lines = [
        f"{result['policy']}: {result['adapter']} on {overlap['calls']} answers of the last {result['last']}, "
        f"{overlap['rated']} of them rated, of {overlap['clusters']} people or episodes",
        "",
        table(
            ["mean reward, 0 to 1", "value", "from", "to"],
            [[text, *(evaluation[name] or (None,) * 3)] for name, text in ESTIMATES.items()],
        ),
        f"intervals of {confidence:.0%}; reward model: {result['judge'] or 'not asked'}",
        "",
    ]
    if overlap["lacks"] is not None:
        lines.append(f"Not enough overlap, so no estimate: {overlap['lacks']}.")
    else:
        lines.append(
            f"overlap: mean weight {overlap['mass']:.2f} (1 is expected), worth {overlap['ess']:.0f} rated people or "
            f"episodes of its own; the heaviest has {overlap['largest']:.0%} of the weight; {overlap['cut']:.1%} cut"
        )
    lines += [f"left out: {count} ({reason})" for reason, count in result["left_out"].items()]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)

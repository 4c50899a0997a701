"""Correct 50 answers, retrain: are those messages right now, what else changed, and how long did it take?

On the processes of ``everloop up``, by HTTP and the command line alone: customers of the bank desk send messages and
give thumbs, and a run learns from those; then 50 wrong answers are corrected, another run is ordered, and a person
puts its adapter live without a canary (whose length is a matter of traffic, not of the platform). Measured are greedy
answers before and after, to the corrected messages and to held-out ones: those of the corrected topics, and all others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import everloop
from openai import OpenAI

from benchmarks import _report
from examples.bank_desk import data
from examples.bank_desk.agent import DeskAgent, ask
from examples.bank_desk.customer import Customer
from examples.bank_desk.data import Desk, Message
from examples.bank_desk.measure import Gain, measure, paired_bootstrap
from examples.bank_desk.platform import (
    POLICY,
    TENANT,
    Platform,
    PlatformFailed,
    base_folder,
    build_base,
    everloop_command,
    write_config,
)
from examples.bank_desk.traffic import Traffic

CACHE = Path(".everloop/cache")
CORRECTED = 50
MESSAGES, QUICK_MESSAGES = 2000, 800
NEVER = 4000  # scored episodes, more than are sent: the run is ordered, not triggered
WORKERS = 16
LIMIT = 600.0


class Answers(NamedTuple):
    """Whether each message was answered right: the corrected ones, and the held-out half."""

    corrected: tuple[bool, ...]
    held_out: tuple[bool, ...]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return _report.parser("from a correction to a better answer").parse_args(arguments)


def correct(agent: DeskAgent, stream: Sequence[Message]) -> list[Message]:
    """Send messages until 50 were answered wrong, and correct those; returns them."""
    corrected: list[Message] = []
    for number, message in enumerate(stream):
        if len(corrected) == CORRECTED:
            break
        handled = agent.handle(message.text, f"corrector-{number}")
        if handled.answer != message.topic:
            everloop.give_feedback(
                response_id=handled.response_id, correction=message.topic, rater=f"corrector-{number}"
            )
            corrected.append(message)
    everloop.flush(30)
    return corrected


def wait_for(what: str, found: Any, every: float = 0.5) -> Any:
    """The first true value of ``found()``. Ends the benchmark where none comes."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(every)
    sys.exit(f"the benchmark failed: {what} did not come within {LIMIT:g} s")


def retrain(platform: Platform, config: Path, turns: int, which: str = "true") -> dict[str, float]:
    """Order a run once so many turns are in the store, and put its adapter live; seconds of each part."""
    began, before = time.monotonic(), _live(platform)
    rows = ("sql", f"select count(*) as n from turns where {which}", "--json")
    wait_for(
        "what to learn from in the store",
        lambda: json.loads(everloop_command(*rows, config=config).splitlines()[0])["n"] >= turns,
    )
    stored = time.monotonic()
    everloop_command("retrain", "--wait", "--policy", f"{TENANT}/{POLICY}", config=config)
    trained = time.monotonic()
    wait_for("the release of the new adapter", lambda: _promoted(config))
    wait_for("the new adapter live", lambda: _live(platform) != before, every=0.1)
    live = time.monotonic()
    return {"to the store": stored - began, "training": trained - stored, "release": live - trained}


def _promoted(config: Path) -> bool:
    """Whether a person's promotion was done; it is refused until the releaser has taken the adapter up."""
    try:
        word = ("--without-evidence", "--reason", "a canary's time depends on traffic")
        everloop_command("release", "promote", "--policy", f"{TENANT}/{POLICY}", *word, config=config)
    except PlatformFailed:
        return False
    return True


def _live(platform: Platform) -> str:
    policies = platform.status("releaser").get("policies", {})
    return str(policies.get(f"{TENANT}/{POLICY}", {}).get("live", {}).get("adapter", "base"))


def answers(client: OpenAI, corrected: Sequence[Message], held_out: Sequence[Message]) -> Answers:
    def one(text: str) -> str:
        return ask(client, text, POLICY)

    return Answers(measure(one, corrected, WORKERS), measure(one, held_out, WORKERS))


def gain(before: Sequence[bool], after: Sequence[bool], which: Sequence[bool]) -> Gain:
    """Paired gain on the messages that ``which`` names."""
    pairs = [(b, a) for b, a, chosen in zip(before, after, which, strict=True) if chosen]
    return paired_bootstrap([b for b, _ in pairs], [a for _, a in pairs])


def improved(desk: Desk, corrected: Sequence[Message], before: Answers, after: Answers) -> float:
    """Share of the corrected topics whose held-out messages are answered better than before."""
    topics = {message.topic for message in corrected}
    change = dict.fromkeys(topics, 0)
    for message, b, a in zip(desk.report, before.held_out, after.held_out, strict=True):
        if message.topic in topics:
            change[message.topic] += a - b
    return sum(value > 0 for value in change.values()) / len(change)


def run(desk: Desk, home: Path, messages: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[_report.Aim]]:
    base = base_folder(CACHE, desk.prior, seed)
    config = write_config(home, CACHE, base, NEVER, seed)
    build_base(base, desk.prior, seed, config)
    with Platform(home, config) as platform:
        ready = platform.start()
        everloop.configure(ready.url, ready.key)
        client = OpenAI(base_url=ready.url, api_key=ready.key, max_retries=4, timeout=60)
        agent = DeskAgent(client, desk.topics, POLICY)
        Traffic(agent, Customer(seed, corrected=0.0), desk.stream[:messages], WORKERS, seed).send(messages)
        everloop.flush(30)
        retrain(platform, config, messages)  # so that what the corrections do is not hidden by what these teach
        began = time.monotonic()
        corrected = correct(agent, desk.stream[messages:])
        said = time.monotonic()
        before = answers(client, corrected, desk.report)
        measured = time.monotonic() - said
        seconds = {
            "50 corrections": said - began,
            **retrain(platform, config, len(corrected), "correction is not null"),
        }
        first = time.monotonic()
        ask(client, corrected[0].text, POLICY)
        seconds["first answer"] = time.monotonic() - first
        total = time.monotonic() - began - measured
        after = answers(client, corrected, desk.report)
    return report(desk, corrected, before, after, seconds, total)


def report(
    desk: Desk,
    corrected: Sequence[Message],
    before: Answers,
    after: Answers,
    seconds: dict[str, float],
    total: float,
) -> tuple[list[dict[str, Any]], list[_report.Aim]]:
    """Rows and aims. Lost elsewhere is lost only where the interval of the change lies below 0."""
    topics = {message.topic for message in corrected}
    inside = [message.topic in topics for message in desk.report]
    outside = [not one for one in inside]
    everywhere = [True] * len(inside)
    rows: list[dict[str, Any]] = [
        _row("corrected messages", before.corrected, after.corrected, [True] * len(corrected)),
        _row("held out, corrected topics", before.held_out, after.held_out, inside),
        *([_row("held out, other topics", before.held_out, after.held_out, outside)] if any(outside) else []),
        _row("held out, all", before.held_out, after.held_out, everywhere),
        {"what": "corrected topics that improved", "after": improved(desk, corrected, before, after)},
        *({"what": f"seconds: {name}", "after": round(value, 1)} for name, value in seconds.items()),
    ]
    elsewhere = gain(before.held_out, after.held_out, outside).high if any(outside) else math.inf
    aims = [
        _report.aim("share of corrected messages right", 0.95, sum(after.corrected) / len(corrected)),
        _report.aim("highest plausible change elsewhere, in points, at least", 0.0, 100 * min(elsewhere, 1.0)),
        _report.aim("seconds from the first correction to the first answer", 300, total, most=True),
    ]
    return rows, aims


def _row(what: str, before: Sequence[bool], after: Sequence[bool], which: Sequence[bool]) -> dict[str, Any]:
    of = sum(which)
    change = gain(before, after, which)
    return {
        "what": what,
        "messages": of,
        "before": sum(b for b, one in zip(before, which, strict=True) if one) / of,
        "after": sum(a for a, one in zip(after, which, strict=True) if one) / of,
        "points": 100 * change.mean,
        "95% low": 100 * change.low,
        "95% high": 100 * change.high,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    desk = data.load(None, CACHE)
    with tempfile.TemporaryDirectory(prefix="ev-fix-") as folder:
        rows, aims = run(desk, Path(folder), QUICK_MESSAGES if options.quick else MESSAGES)
    notes = [f"data: {desk.name}", "put live by a person's order: the time of a canary depends on traffic"]
    _report.publish("correction", rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

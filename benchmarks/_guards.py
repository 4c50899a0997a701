"""From the call that trips a guard to no request on the adapter that it stops; and how many requests that cost.

On the processes of ``everloop up`` before an engine whose adapters turn bad for users alone (``_spoiled``). Each
candidate passes the gate and starts a canary of half of the users; clients ask without pause, every request another
person's. The call that trips the guard is found afterwards, by the guard's own code over the answers in the order in
which they came: an answer is durable when it comes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from everloop.config import CanaryConfig

from benchmarks import _spoiled
from benchmarks._traffic import Answer, Traffic
from examples.bank_desk.platform import POLICY, TENANT, Platform, everloop_command, write_config
from services.releaser.traffic import ARMS
from services.releaser.traffic import Traffic as Seen

QUESTION = {
    "model": POLICY,
    "messages": [{"role": "user", "content": _spoiled.TOPIC}],
    "tools": _spoiled.TOOLS,
    "max_tokens": 8,
}
LIMIT = 120.0
NEVER = 4000  # scored episodes, more than are sent: no training run starts


class Stopped(NamedTuple):
    """How a guard stopped one adapter. Seconds from the tripping call's answer.

    ``asked``: until the last request was sent that the adapter answered; ``answered``: until its last answer came.
    ``affected``: requests that it answered; ``after``: those that were sent after the trip.
    """

    kind: str
    reason: str
    decided: float
    asked: float
    answered: float
    affected: int
    after: int


@contextmanager
def engine(bad: dict[str, str]) -> Iterator[str]:
    """The engine's URL; it was told which adapter is bad how."""
    command = [sys.executable, "-m", "benchmarks._spoiled", json.dumps(bad)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(10)


def add_gold(folder: Path, config: Path) -> None:
    lines = (json.dumps({"text": asked, "answer": _spoiled.answer_of(asked)}) for asked in _spoiled.GOLD)
    path = folder / "gold.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    everloop_command("gold", "import", str(path), "--split", "gate", config=config)


def stop(adapter: Path, kind: str, config: Path, platform: Platform, traffic: Traffic) -> Stopped:
    """Register one adapter, and see what stops it. Ends the benchmark where no guard does."""
    everloop_command("release", "register", str(adapter), config=config)
    start = len(traffic.answers)

    def ended() -> bool:
        policy = _policy(platform)
        last = policy.get("last_decision") or {}
        return not policy.get("in_progress") and last.get("adapter", "") == adapter.name

    _until(f"the end of the canary of an adapter that {kind}", ended, lambda: json.dumps(_policy(platform)))
    time.sleep(1.0)
    release = next(r for r in _releases(config) if r["adapter"] == adapter.name)
    if release["state"] != "rolled_back" or "by a guard" not in release["reason"]:
        sys.exit(f"the benchmark failed: no guard stopped an adapter that {kind}: {release['reason']}")
    return stopped(traffic.answers[start:], adapter.name, kind, release["reason"], float(release["time"]))


def stopped(answers: Sequence[Answer], adapter: str, kind: str, reason: str, decided: float) -> Stopped:
    """What the answers of a canary show. Ends the benchmark where no call can have tripped the guard."""
    in_order = sorted(answers, key=lambda answer: answer.came)
    tripped = trip(in_order, adapter)
    if tripped is None:
        sys.exit(f"the benchmark failed: the answers of an adapter that {kind} trip no guard, and one did")
    its = [answer for answer in in_order if answer.version == adapter]
    last_asked, last_answered = max(answer.sent for answer in its), max(answer.came for answer in its)
    return Stopped(
        kind,
        reason,
        decided - tripped,
        last_asked - tripped,
        last_answered - tripped,
        len(its),
        sum(answer.sent > tripped for answer in its),
    )


def trip(answers: Sequence[Answer], adapter: str, limits: CanaryConfig | None = None) -> float | None:
    """When the answer came by which a guard ends the canary, of answers in the order in which they came."""
    seen, limits = Seen("benchmark", adapter=adapter), limits or CanaryConfig()
    for answer in answers:
        if answer.arm in ARMS:
            seen.take_call(_call(answer), answer.unit, answer.sent)
            if seen.breach(limits):
                return answer.came
    return None


def _call(answer: Answer) -> dict[str, Any]:
    """The fields of a call event that guards read."""
    return {
        "id": answer.call,
        "release": "benchmark",
        "arm": answer.arm,
        "policy_version": answer.version,
        "output": answer.output,
        "tools": _spoiled.TOOLS,
    }


def _releases(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in everloop_command("release", "list", "--json", config=config).splitlines()]


def _policy(platform: Platform) -> dict[str, Any]:
    """What the releaser says of the one policy."""
    return dict(platform.status("releaser").get("policies", {}).get(f"{TENANT}/{POLICY}", {}))


def _until(what: str, found: Callable[[], bool], state: Callable[[], str]) -> None:
    end = time.monotonic() + LIMIT
    while not found():
        if time.monotonic() > end:
            sys.exit(f"the benchmark failed: {what} did not come within {LIMIT:g} s; the releaser says {state()}")
        time.sleep(0.1)


def run(home: Path, base: Path, cache: Path, adapters: Path, names: Sequence[str]) -> list[Stopped]:
    """Each of the adapters in ``adapters`` (a folder) is tried and stopped, the kinds in turn."""
    kinds = {name: _spoiled.KINDS[at % len(_spoiled.KINDS)] for at, name in enumerate(names)}
    done = []
    with engine(kinds) as url:
        config = write_config(home, cache, base, NEVER, 0, serving=url)
        with Platform(home, config) as platform:
            traffic = Traffic(platform.start(), QUESTION)
            add_gold(home, config)
            with traffic.flowing():
                for number, (name, kind) in enumerate(kinds.items(), 1):
                    done.append(stop(adapters / name, kind, config, platform, traffic))
                    print(f"guard {number} of {len(names)}: {1000 * done[-1].answered:.0f} ms", file=sys.stderr)
        if traffic.failed:
            sys.exit(f"the benchmark failed: {len(traffic.failed)} requests were refused: {traffic.failed[0]}")
    return done

"""``everloop demo``: close the loop on real messages and show the improvement.

In order: build the base with its small prior (kept for the next demo), start the processes of ``everloop up``, give
the gate its half of the held-out messages, measure the report's half, let customers talk to the agent while the
platform learns, measure again. The platform is reached by HTTP, the SDK and the command line alone.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import everloop
from everloop.errors import ConfigError
from everloop.home import Home
from openai import OpenAI, OpenAIError

from examples.bank_desk import data, report
from examples.bank_desk.agent import DeskAgent, ask
from examples.bank_desk.customer import Customer
from examples.bank_desk.data import DataError, Desk, Message
from examples.bank_desk.loop import (
    PROMOTED,
    REFUSED,
    SERVICES,
    Aim,
    Decision,
    Sent,
    Stage,
    Standing,
    plan,
    reward_told,
    since,
    standing,
)
from examples.bank_desk.measure import Measured, measure, paired_bootstrap
from examples.bank_desk.platform import (
    EMBEDDED,
    POLICY,
    TENANT,
    Platform,
    PlatformFailed,
    base_folder,
    build_base,
    everloop_command,
    write_config,
    write_examples,
)
from examples.bank_desk.report import Outcome, Release
from examples.bank_desk.traffic import Traffic

WORKERS = 16
MOST_MEASURED = 800  # held-out messages of the report; fewer where there are fewer
LOOP_LIMIT = 270.0  # seconds after which it ends once something was promoted
LONGEST_LOOP = 900.0  # seconds after which it ends in any case
FEWEST_MESSAGES = 500
RUNS = 3  # parts that the messages come in: each starts a training run, the last one is for the canary
COLUMNS = (
    "         cycle  live      messages  thumbs     corr  AUC   cal.err  steps  KL     gate     canary       held-out"
)


class Demo:
    """One demo from start to end. ``say`` prints a line of progress."""

    def __init__(
        self,
        desk: Desk,
        home: Path,
        cache: Path,
        messages: int,
        seed: int,
        log: str,
        serving: str = "embedded",
        say: Any = print,
    ) -> None:
        self.desk, self.home, self.cache, self.seed = desk, home, cache, seed
        self.log, self.serving = log, serving
        self.aim = Aim(messages, max(60, messages // RUNS))
        self.say = say
        self.seconds: dict[str, float] = {}
        self.measured: list[Measured] = []
        self.promoted: list[Release] = []
        self.refused: list[Release] = []
        self.report = desk.report[:MOST_MEASURED]
        self.began = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def run(self) -> Outcome:
        """Raises PlatformFailed where a process does not do its part."""
        base = base_folder(self.cache, self.desk.prior, self.seed)
        config = write_config(self.home, self.cache, base, self.aim.a_run, self.seed, self.log, self.serving)
        with self.phase("base"):
            self._build(base, config)
        with Platform(self.home, config) as platform:
            with self.phase("start"):
                ready = platform.start()
                gold = write_examples(self.home / "gate.jsonl", self.desk.gate)
                words = ("gold", "import", str(gold), "--policy", f"{TENANT}/{POLICY}", "--split", "gate")
                everloop_command(*words, config=config)
            self.say(f"The platform is up ({self.seconds['start']:.0f} s): {ready.url}, logs in {self.home}/logs")
            everloop.configure(ready.url, ready.key)
            client = OpenAI(base_url=ready.url, api_key=ready.key, max_retries=4, timeout=60)
            with self.phase("measuring"):
                self._measure(client, 0, "base")
            self.say(f"Before: {self.measured[0].accuracy:.1%} of {len(self.report)} held-out messages are right\n")
            return self._close(platform, client)

    def _build(self, base: Path, config: Path) -> None:
        if base.exists():
            self.say("The base model with its small prior is there from an earlier demo")
        else:
            self.say(f"Building a base model with a small prior, {len(self.desk.prior)} labelled messages …")
            build_base(base, self.desk.prior, self.seed, config)

    def _measure(self, client: OpenAI, messages: int, version: str) -> None:
        self.measured.append(Measured(messages, version, self._answers(client, self.report)))

    def _answers(self, client: OpenAI, held_out: Sequence[Message]) -> tuple[bool, ...]:
        return measure(lambda text: ask(client, text, POLICY), held_out, WORKERS)

    def _close(self, platform: Platform, client: OpenAI) -> Outcome:
        agent = DeskAgent(client, self.desk.topics, POLICY)
        traffic = Traffic(agent, Customer(self.seed), self.desk.stream, WORKERS, self.seed)
        self.say(COLUMNS)
        with self.phase("loop"):
            now = self._loop(platform, traffic, client)
        self._tell_reward(platform)
        with self.phase("measuring"):
            if self.measured[-1].version != now.live:
                self._measure(client, traffic.served.messages, now.live)
            corrected = [Message(*pair) for pair in traffic.served.corrected.items()]
            fixed = sum(self._answers(client, corrected))
        with self.phase("end"):
            platform.stop()
        served = traffic.served
        return Outcome(
            data=self.desk.name,
            messages=served.messages,
            measured=tuple(self.measured),
            gain=paired_bootstrap(self.measured[0].right, self.measured[-1].right, self.seed),
            corrected=len(corrected),
            corrected_then_right=fixed / len(corrected) if corrected else 0.0,
            promoted=tuple(self.promoted),
            refused=tuple(self.refused),
            thumbs_up=served.up,
            thumbs_down=served.down,
            seconds=self.seconds,
        )

    def _tell_reward(self, platform: Platform) -> None:
        key = f"{TENANT}/{POLICY}"
        reward = platform.status("scorer").get("rewards", {}).get(key)
        learning = platform.status("learner").get("policies", {}).get(key, {})
        if reward is not None:
            self.say("\n" + "\n".join(reward_told(reward, bool(learning.get("paused")))))

    def _loop(self, platform: Platform, traffic: Traffic, client: OpenAI) -> Standing:
        """Serve messages while the platform learns; returns where the loop stands when all is sent."""
        began, served = time.monotonic(), traffic.served
        now, stage_from, run_from = self._standing(platform), 0, 0
        while time.monotonic() - began < (LOOP_LIMIT if self.promoted else LONGEST_LOOP):
            sent = Sent(served.messages, served.messages - run_from, served.messages - stage_from)
            step = plan(now, sent, self.aim, len(self.promoted))
            if step.done:
                break
            traffic.send(step.messages)
            time.sleep(step.wait)
            before, now = now, since(now, self._standing(platform))
            if now.stage is not before.stage:
                stage_from = served.messages
                run_from = stage_from if now.stage is Stage.TRAINING else run_from
                self.say(f"{time.monotonic() - self.began:5.0f} s  {stage_from:,} messages served; now {now.stage}")
            if now.decision is not None and now.decision != before.decision:
                self._cycle(now, now.decision, traffic, client)
        everloop.flush(10)
        return self._standing(platform)

    def _standing(self, platform: Platform) -> Standing:
        """Raises PlatformFailed where the platform is down, or its releaser silent for a minute."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            platform.alive()
            found = standing(f"{TENANT}/{POLICY}", {name: platform.status(name) for name in SERVICES})
            if found is not None:
                return found
            time.sleep(0.5)
        raise PlatformFailed(f"the releaser says nothing for a minute; see {self.home}/logs/releaser.log")

    def _cycle(self, now: Standing, decision: Decision, traffic: Traffic, client: OpenAI) -> None:
        served = traffic.served
        release = Release(decision.adapter, served.messages)
        if decision.state in PROMOTED:
            self.promoted.append(release)
            self._measure(client, served.messages, now.live)
        elif decision.state in REFUSED:
            self.refused.append(release)
        number = len(self.promoted) + len(self.refused)
        self.say(cycle_line(number, now, decision, traffic, self.measured[-1].accuracy))
        if decision.state in REFUSED:
            self.say(f"{'':<16}{decision.reason}")


def cycle_line(number: int, now: Standing, decision: Decision, traffic: Traffic, accuracy: float) -> str:
    """One row below COLUMNS."""
    served = traffic.served
    return (
        f"{number:>14}  {now.live[:8]:<10}{served.messages:<10}{f'{served.up}/{served.down}':<11}"
        f"{len(served.corrected):<6}{_number(now.auc):<6}{_number(now.calibration_error):<9}"
        f"{'-' if now.steps is None else now.steps:<7}{_number(now.kl, 3):<7}"
        f"{decision.gate:<9}{decision.canary or '-':<13}{accuracy:.1%}"
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show(outcome: Outcome, desk: Desk, home: Path, kept: bool, say: Any = print) -> None:
    """Table, plot beside the home, and what to try next."""
    say(f"\n{report.table(outcome)}\n")
    say(f"Plot: {report.plot(outcome, home.parent / 'demo.png')}")
    if desk.note:
        say(desk.note)
    if outcome.trouble is not None:
        say(f"FAILED: {outcome.trouble}. Its state and logs are kept in {home}")
        return
    look = f"'everloop reward report --config {home / 'everloop.toml'}', or any other command with the same --config"
    say(NEXT + (f"Kept in {home}: {look}." if kept else f"'everloop demo --keep' leaves its state: {look}."))


NEXT = """Next: 'everloop demo --data messages.csv' does the same with your own messages (columns text, category);
'everloop up' runs the platform for your own agent.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--messages", type=int, default=3000, help="messages that customers send (3000)")
    parser.add_argument("--data", type=Path, metavar="CSV", help="your own messages: columns text, category[, split]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serving", choices=("embedded", "vllm"), default="embedded", help="the engine (embedded)")
    parser.add_argument("--keep", action="store_true", help="leave the demo's home as it is, to look at")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line, and exit the same")


def run(options: argparse.Namespace) -> int:
    """The command; ``options.home`` is the demo's home, wiped at the start. 0: the loop closed, and it is better."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the platform goes down too
    home = options.home or Path(".everloop/demo")
    try:
        with _alone(home):
            return _run(options, home, Path(".everloop/cache"))
    except (ConfigError, DataError, PlatformFailed) as error:
        return _failed(str(error), options.json)
    except OpenAIError as error:  # while measuring: what customers ask is caught where they ask it
        return _failed(f"the gateway does not answer: {error}; see {home}/logs", options.json)


def _failed(trouble: str, as_json: bool) -> int:
    print(f"everloop demo: {trouble}", file=sys.stderr)
    if as_json:
        _say(json.dumps(report.failure(trouble)))
    return 1


def _run(options: argparse.Namespace, home: Path, cache: Path) -> int:
    if options.messages < FEWEST_MESSAGES:
        raise DataError(f"--messages {options.messages}: at least {FEWEST_MESSAGES}, else nothing is decided")
    if options.log is not None and not options.log.startswith("kafka://"):
        raise DataError(f"--log {options.log}: give kafka://<host>:<port>, or leave it out for the embedded log")
    desk = data.load(options.data, cache, options.seed)
    _wipe(home)
    _say(f"Data: {desk.name} ({desk.source}): {len(desk.topics)} topics, {len(desk.stream):,} messages to draw from")
    log = _fresh(options.log)
    places = (home.absolute(), cache.absolute())
    outcome = Demo(desk, *places, options.messages, options.seed, log, options.serving, _say).run()
    show(outcome, desk, home, options.keep, _say)
    if outcome.trouble is None and not options.keep:
        _wipe(home)
    if options.json:
        _say(json.dumps(report.as_json(outcome)))
    return 0 if outcome.trouble is None else 1


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Raises PlatformFailed where another demo has this home, which would be wiped below it; ConfigError where it
    cannot be made."""
    Home(home).made()
    with home.with_name(f"{home.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PlatformFailed(f"a demo runs in {home} already: wait for it, or give another --home") from None
        yield


def _fresh(log: str | None) -> str:
    """An empty log: of the demo's own home, or under a new prefix of the cluster that was named."""
    if log is None:
        return EMBEDDED
    return f"{log.rstrip('/')}{'-' if log.count('/') > 2 else '/'}demo-{secrets.token_hex(4)}"


def _wipe(home: Path) -> None:
    """Raises PlatformFailed where the folder holds something that no demo wrote."""
    if home.exists() and any(home.iterdir()) and not (home / "everloop.toml").exists():
        raise PlatformFailed(f"{home} is not a demo's home; nothing was deleted. Give another folder with --home")
    shutil.rmtree(home, ignore_errors=True)


def _say(line: str) -> None:
    print(line, flush=True)

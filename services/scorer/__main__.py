"""The reward service: ``python -m services.scorer``.

::

    log: episodes ──▶ thread "score" ──▶ log: scores, reward-versions     state/score.db, rewards/<t>/<p>/<version>/

    log: episodes ──▶ thread "signals" ──▶ log: events     checks and derived signals; state/signals.db
    log: episodes ──▶ thread "judge" ──▶ log: events       what judges and critics think; state/judge{,s}.db

It waits for the log alone, and scores never wait for checks or judges. "signals" and "judge" run where a policy's
declaration asks for them, in one process of the installation. On Kafka each partition of "score" has a handler, the
episodes of a policy are all in one partition, and other processes may share them (``everloop worker score``); the
numbers are of the policies that are here. ``/status`` shows under ``rewards``, by ``tenant/policy``:

- ``version``: the snapshot that scores; ``snapshot_updates``: what it had learned; ``updates``: what the live one has
- ``labels``, ``good_labels``; ``may_judge``: whether that is enough for an opinion; ``refused``: not finite
- ``auc``, ``calibration_error``: predict-then-learn, over the last ``reward.window`` labels; null: too few
- ``reward_mean``, ``thumbs_up_share``: over the newest ``reward.window`` calls; ``reward_fall``, ``thumbs_up_fall``:
  the window before less the newest, positive where it got worse; null: too few
- ``success_estimate``: mean of the newest labels, each for the calls that it stands for (:mod:`reward.propensity`)
- ``sources``: by source, what a good and a bad word of it weigh and what that rests on; ``raters``: known by now
- ``drift_inputs``, ``drift_labels``, ``drift_calibration``: alarms so far; ``drift``: those that page, in words;
  ``frozen``: opinions are kept from training for now; ``topics``: of its prompts, found so far
- ``shadow_labels``: on how many the next snapshot is judged beside the one that scores; ``scoring_auc``: of the one
  that scores, on these; null: too few; ``refused_version``,
  ``refused_because``: the newest snapshot, where it did not take over; ``snapshots_refused``: how many were;
  ``snapshots_waited``: how many only lacked labels for a comparison, or were kept back by a rollback;
  ``pinned``: by whom and why the version that scores is kept whatever snapshots come; null: it is not
- ``answers_known``: recurring answers whose ratings are remembered

and under ``checks``, likewise, the ``words`` said since the start by source, and the ``failures`` of checks by name;
under ``judges`` the same of judges and critics, with the ``questions``, time and tokens of each.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from everloop.config import Config
from everloop.home import Home
from everloop.log import Log, open_log, partition_of
from everloop.stream import Handler
from everloop.topics import EPISODES
from prometheus_client import REGISTRY

from reward import judges, signals
from reward.encoder import Encoder
from reward.handler import RewardHandler
from reward.judges import JudgesHandler
from reward.signals import SignalsHandler
from services.scorer.metrics import RewardMetrics, SaidMetrics
from services.scorer.ordered import Ordered
from services.service import Service, main
from services.stream import attach, share

AT_ONCE = 32
"""Episodes of a batch where workers share partitions: about a second's work, all of it in ``flush``."""

CHECKED_AT_ONCE = 50
"""Episodes of a batch of checks: what a check that takes its whole time holds back."""
JUDGED_AT_ONCE = 32
"""And of a batch of judges: asked about for :data:`reward.asking.PATIENCE` at most."""


@functools.cache
def encoder(name: str) -> Encoder:
    """One encoder for all policies that name it. One thread: the cores belong to the engine and the trainer."""
    return Encoder(name, threads=1)


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    return work(Service("scorer", config, config.services.reward_port), _signals)


def work(service: Service, beside: Callable[[Service, Log], None] = lambda *_: None) -> int:
    """Score in this service until it is stopped; ``beside`` adds what else it does."""
    config, home = service.config, Home(service.config.home)
    log = open_log(config)
    try:
        beside(service, log)
        ordered = Ordered(log, home.blobs)
        make = functools.partial(RewardHandler, config, home, encoder, ordered)
        runner = share(service, make, log, home, at_once=AT_ONCE)

        def status() -> dict[str, Any]:
            return rewards(log, runner.handlers())

        REGISTRY.register(RewardMetrics(status))
        service.describe("rewards", status)
        service.describe("commands", lambda: answers(runner.handlers().values()))
        return service.run()
    finally:
        log.close()


def _signals(service: Service, log: Log) -> None:
    """What is said of answers by checks, judges and the course of episodes, where a policy asks for it."""
    config, home = service.config, Home(service.config.home)
    if signals.declared(config):
        handler = SignalsHandler(config, home)
        attach(service, handler, log, home, max_records=CHECKED_AT_ONCE)
        REGISTRY.register(SaidMetrics("everloop_check", handler.status))
        service.describe("checks", handler.status)
    if judges.declared(config):
        asking = JudgesHandler(config, home)
        attach(service, asking, log, home, max_records=JUDGED_AT_ONCE)
        REGISTRY.register(SaidMetrics("everloop_judge", asking.status))
        service.describe("judges", asking.status)


def rewards(log: Log, handlers: Mapping[int | None, Handler]) -> dict[str, Any]:
    """By ``tenant/policy``: what the handler that has its episodes says of it."""
    found: dict[str, Any] = {}
    for number, handler in handlers.items():
        assert isinstance(handler, RewardHandler)
        for policy, numbers in handler.status().items():
            if number is None or number == partition_of(policy, log.partitions(EPISODES.name)):
                found[policy] = numbers
    return found


def answers(handlers: Iterable[Handler]) -> dict[str, Any]:
    """What became of a person's orders since the start, by their ids."""
    return {
        id: said
        for handler in handlers
        if isinstance(handler, RewardHandler)
        for id, said in handler.office.answers.items()
    }


if __name__ == "__main__":
    sys.exit(main("scorer", serve))

"""The learner: ``python -m services.learner``.

::

    thread "learn":   scores, reward-versions, routes, releases, adapters, commands, pauses, runs ─▶ facts (facts.py)
    thread "reward-registry": reward-versions ─▶ MLflow                                          (reward_versions.py)
    thread "learner": facts ─▶ decide ─▶ batch ─▶ Ray ─▶ MLflow ─▶ log: runs, adapters                    (runner.py)

Only one works on a home; a second one waits until the first has ended.
"""

from __future__ import annotations

import sys

from everloop.config import Config
from everloop.log import open_log
from everloop.registry import Registry

from services.learner.board import Board
from services.learner.facts import FactsHandler
from services.learner.mismatches import Mismatches
from services.learner.reward_versions import RewardVersions
from services.learner.runner import Runner
from services.learner.runs import Runs
from services.service import Service, main
from services.stream import attach
from trainer import recipe
from trainer.cluster import Cluster


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    for tenant, policy in config.policies():
        recipe.load(config.policy(tenant, policy).train.recipe)  # refused now rather than at the first run
    log = open_log(config)
    service = Service("learner", config, config.services.learner_port)
    home = service.home
    facts = FactsHandler(home.blobs)
    stream = attach(service, facts, log, home)
    registry = Registry(config.under_home(config.mlflow.uri), home.root / "mlartifacts")
    board = Board(home, Mismatches(lambda tenant, policy: config.policy(tenant, policy).train.max_mismatch))
    cluster = Cluster(config.ray)
    runs = Runs(config, log, registry, cluster.cpus)
    runner = Runner(config, facts, runs, registry, cluster, board, service.stop, lag=stream.lag)
    service.alone("learner", runner.run)
    rewards = RewardVersions(log, home.blobs, registry, service.stop)
    service.alone("reward-registry", rewards.run)
    service.describe("policies", board.policies)
    service.describe("registry", lambda: {"reward_versions": rewards.trouble})
    service.describe("commands", lambda: dict(board.commands))
    service.describe("ray", lambda: {"address": config.ray.address, "ready": runner.ready})
    try:
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main("learner", serve))

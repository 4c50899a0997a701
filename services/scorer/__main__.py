"""The reward service: ``python -m services.scorer``.

::

    log: episodes ──▶ thread "score" ──▶ log: scores, reward-versions     state/score.db, rewards/<t>/<p>/<version>/

One thread does everything; it waits for the log alone. ``/status`` shows under ``rewards``, by ``tenant/policy``:

- ``version``: the snapshot that scores; ``snapshot_updates``: what it had learned; ``updates``: what the live one has
- ``labels``, ``good_labels``; ``may_judge``: whether that is enough for an opinion; ``refused``: not finite
- ``auc``, ``calibration_error``: predict-then-learn, over the last ``reward.window`` labels; null: too few
- ``reward_mean``, ``thumbs_up_share``: over the newest ``reward.window`` calls; ``reward_fall``, ``thumbs_up_fall``:
  the window before less the newest, positive where it got worse; null: too few
- ``answers_known``: recurring answers whose ratings are remembered
"""

from __future__ import annotations

import functools
import sys

from everloop.config import Config
from everloop.home import Home
from everloop.log import open_log
from prometheus_client import REGISTRY

from reward.encoder import Encoder
from reward.handler import RewardHandler
from services.scorer.metrics import RewardMetrics
from services.service import Service, main
from services.stream import attach


@functools.cache
def encoder(name: str) -> Encoder:
    """One encoder for all policies that name it. One thread: the cores belong to the engine and the trainer."""
    return Encoder(name, threads=1)


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    home = Home(config.home)
    log = open_log(config)
    handler = RewardHandler(config, home, encoder)
    REGISTRY.register(RewardMetrics(handler.status))
    service = Service("scorer", config, config.services.reward_port)
    service.describe("rewards", handler.status)
    attach(service, handler, log, home)
    try:
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main("scorer", serve))

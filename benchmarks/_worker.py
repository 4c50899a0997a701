"""One worker of a handler as a process of its own, by the runner that the platform uses on the log that is configured.

Run: ``python -m benchmarks._worker <name> assemble|score|note``; it announces itself in the home under ``name``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from everloop.config import Config
from everloop.home import Home
from everloop.log import NewRecord, Record, open_log
from everloop.stream import Handler, State
from everloop.topics import EPISODES, EVENTS

from pipelines.assemble import Assembler
from reward.handler import RewardHandler
from services.scorer.__main__ import encoder
from services.service import Service, main
from services.stream import share


class Note:
    """As little as a handler can do: an entry of state for each key, and a small output for each event."""

    name = "note"
    topics: tuple[str, ...] = (EVENTS.name,)

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        state.put(record.key, record.headers["id"].encode())
        return [NewRecord(EPISODES.name, record.key, b"noted", {"id": record.headers["id"]})]

    def flush(self, state: State, now: float) -> list[NewRecord]:
        return []


def maker(step: str, config: Config, home: Home) -> Callable[[], Handler]:
    """What makes the handler of a step for each partition."""
    makers: dict[str, Callable[[], Handler]] = {
        "note": Note,
        "assemble": lambda: Assembler(config, home),
        "score": lambda: RewardHandler(config, home, encoder),
    }
    return makers[step]


def serve(config: Config) -> int:
    name, step = sys.argv[1:]
    service, home, log = Service(name, config, 0), Home(config.home), open_log(config)
    try:
        share(service, maker(step, config, home), log, home)
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], serve))

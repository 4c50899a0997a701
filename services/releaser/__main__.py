"""The releaser: ``python -m services.releaser``.

::

    thread "releaser": adapters, commands, pauses, events, episodes ─▶ releases, routes      (releaser.py)
    thread "examiner": registry, file checks, engines, gold questions                        (examiner.py)

Only one works on a home; a second one waits until the first has ended.
"""

from __future__ import annotations

import sys
import time

from aiohttp import web
from everloop.config import Config
from everloop.log import open_log

from services.gateway.replicas import Replicas
from services.releaser import page
from services.releaser.examiner import Examiner
from services.releaser.releaser import Releaser
from services.releaser.report import Board
from services.service import Service, main

STUCK = 60.0  # seconds without a round after which a restart is called for


class Pulse:
    """Whether the loop still goes round."""

    def __init__(self, releaser: Releaser) -> None:
        self._releaser = releaser
        self._seen = (0, time.monotonic())

    def trouble(self) -> str | None:
        rounds, since = self._seen
        if self._releaser.rounds != rounds or rounds == 0:
            self._seen = (self._releaser.rounds, time.monotonic())
            return None
        silent = time.monotonic() - since
        return f"no round for {silent:.0f} s" if silent > STUCK else None


def add_pages(app: web.Application, board: Board) -> None:
    """``/releases`` and ``/releases/<id>``: evidence for people."""

    async def every(request: web.Request) -> web.Response:
        return web.Response(text=page.index(board.releases.values()), content_type="text/html", headers=page.HEADERS)

    async def one(request: web.Request) -> web.Response:
        release = board.releases.get(request.match_info["id"])
        if release is None:
            raise web.HTTPNotFound(text="there is no such release; see /releases")
        shown = page.one(release, board.progress(release.id))
        return web.Response(text=shown, content_type="text/html", headers=page.HEADERS)

    app.router.add_get("/releases", every)
    app.router.add_get("/releases/{id}", one)


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    log = open_log(config)
    service = Service("releaser", config, config.services.releaser_port)
    examiner = Examiner(config, Replicas(config.serving.urls))
    releaser = Releaser(config, log, examiner)
    board = Board()

    def run() -> None:
        examiner.start()
        try:
            releaser.run(service.stop, board.update)
        finally:
            examiner.close()

    add_pages(service.app, board)
    service.alone("releaser", run)
    service.check("rounds", Pulse(releaser).trouble)
    service.ready("recovered", lambda: None if releaser.rounds else "the log is being read")
    service.describe("policies", lambda: board.policies)
    service.describe("commands", lambda: board.commands)
    service.describe("replicas", examiner.residents.described)
    try:
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main("releaser", serve))

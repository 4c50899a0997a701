"""The assembler: ``python -m services.assembler``.

::

    log: events ──▶ thread "assemble" ──▶ log: episodes, trajectories      state/assemble.db
    thread "archive" ◀──▶ a process of its own, which archives every topic  (filing.py)

They wait for the log alone, never for each other. The archive gathers for about a second, so that files are not too
small; what was appended to the log can be queried about a second later.
"""

from __future__ import annotations

import sys

from everloop.config import Config
from everloop.home import Home
from everloop.log import open_log

from pipelines.assemble import Assembler
from services.assembler.filing import Filing
from services.service import Service, main
from services.stream import attach


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    home = Home(config.home)
    log = open_log(config)
    service = Service("assembler", config, config.services.assembler_port)
    attach(service, Assembler(config, home), log, home)
    Filing(service)
    try:
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main("assembler", serve))

"""The assembler: ``python -m services.assembler``.

::

    log: events ──▶ thread "assemble" ──▶ log: episodes, trajectories      state/assemble.db; on Kafka state/assemble/
    thread "archive" ◀──▶ a process of its own, which archives every topic  (filing.py)

They wait for the log alone, never for each other. The archive gathers for about a second, so that files are not too
small; what was appended to the log can be queried about a second later.

On Kafka others may share the work: ``everloop worker assemble`` runs the upper thread alone.
"""

from __future__ import annotations

import sys

from everloop.config import Config
from everloop.home import Home
from everloop.log import open_log

from pipelines.assemble import Assembler
from services.assembler.filing import Filing
from services.service import Service, main
from services.stream import share


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    service = Service("assembler", config, config.services.assembler_port)
    Filing(service)
    return work(service)


def work(service: Service) -> int:
    """Assemble in this service until it is stopped."""
    config, home = service.config, Home(service.config.home)
    log = open_log(config)
    try:
        share(service, lambda: Assembler(config, home), log, home)
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main("assembler", serve))

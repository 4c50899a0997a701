"""The assembler: ``python -m services.assembler``.

::

    log: events ──▶ thread "assemble" ──▶ log: episodes, trajectories      state/assemble.db
    log: every topic ──▶ thread "archive" ──▶ store/<table>/…/*.parquet    state/archive.db (offsets alone)
    store ◀──▶ thread "compaction": folds small files, now and then

The threads wait for the log alone, never for each other. The archive gathers for about a second, so that files are
not too small; what was appended to the log can be queried about a second later.
"""

from __future__ import annotations

import sys

from everloop.config import Config
from everloop.home import Home
from everloop.log import open_log

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from services.assembler.compactor import Compactor
from services.service import Service, main
from services.stream import attach

LINGER = 1.0  # seconds that the archive gathers records into a file
MAX_RECORDS = 5000  # of one batch of the archive


def serve(config: Config) -> int:
    """Run until stopped; returns the exit status."""
    home = Home(config.home)
    log = open_log(config)
    service = Service("assembler", config, config.services.assembler_port)
    attach(service, Assembler(config, home), log, home)
    attach(service, Archive(home), log, home, linger=LINGER, max_records=MAX_RECORDS)
    compactor = Compactor(home.folder("store"), service.stop)
    service.loop("compaction", compactor.run)
    service.describe("compaction", compactor.status)
    try:
        return service.run()
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main("assembler", serve))

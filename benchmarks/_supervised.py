"""Some services of the installation that is configured, under the supervisor of ``everloop up``, until a signal.

Run: ``python -m benchmarks._supervised gateway assembler``; it says ``ready`` once they are. What dies is started anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from everloop.config import load

from services.supervisor import Stop, Supervisor, services


def main(names: Sequence[str]) -> int:
    config = load()
    wanted = [service for service in services(config) if service.name in names]
    supervisor = Supervisor(wanted, config.home, drain=config.services.drain, say=lambda line: None)
    supervisor.run(Stop(), lambda seconds: print("ready", flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

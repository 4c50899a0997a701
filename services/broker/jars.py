"""The broker's jars: copied once into the Python environment's folder by ``infra/kafka/install.sh``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from everloop.errors import EverloopError

KAFKA = "4.2.0"
RECIPE = Path(__file__).resolve().parents[2] / "infra" / "kafka"


class NoBroker(EverloopError):
    """A broker could not be installed, started or reached; the message says why, and what to do."""


def installed() -> Path:
    """The folder of the jars; they, and a JDK where there is none, are installed at the first call (15 s).

    Raises NoBroker where that does not go, with the installer's own words.
    """
    folder = Path(sys.prefix) / "share" / f"kafka-{KAFKA}"
    if folder.is_dir():
        return folder
    done = subprocess.run([RECIPE / "install.sh", folder], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise NoBroker(f"the broker could not be installed: {done.stderr.strip()}")
    return folder

"""The archive and its compaction, in a process of their own beside the assembler's.

::

    assembler: thread "archive" ◀── a line a second: status ──┐
         │   stdin, held open                                 │
         └──────────────▶ filing: thread "archive"     log: every topic ──▶ store/<table>/…/*.parquet
                                  thread "compaction"  store ◀──▶ folds small files, now and then

Both halves are busy with Python at every event, and in one interpreter each waits for the other: on two cores,
episodes became queryable half as fast. The assembler's end of stdin says how long: once it closes, however the
assembler ended, filing finishes its batch and ends too. When filing ends by itself the assembler ends as well, and is
started anew with it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from everloop.config import Config, load
from everloop.errors import LogError
from everloop.home import Home
from everloop.log import open_log

from pipelines.archive import Archive
from services.assembler.compactor import FOLDED, Compactor
from services.logs import log_to_stderr
from services.service import Service
from services.stream import AGE, DEAD, LAG, RECORDS, Stream

logger = logging.getLogger(__name__)
LINGER = 1.0  # seconds that the archive gathers records into a file
MAX_RECORDS = 5000  # of one batch of the archive
SAY_EVERY = 1.0
SILENT = 60.0  # seconds without a word, after which it counts as stuck


class Filing:
    """The assembler's end: starts the process, hears what it says, shows it as the assembler's own."""

    def __init__(self, service: Service, command: tuple[str, ...] = (sys.executable, "-m", __name__)) -> None:
        self._stop, self._patience = service.stop, 0.8 * service.config.services.drain
        self._command = command
        self._said: dict[str, Any] = {}
        self._heard = time.monotonic()
        service.loop("archive", self.run)
        service.check("archive", self.trouble)
        service.describe("archive", lambda: self._said.get("archive", {}))
        service.describe("compaction", lambda: self._said.get("compaction", {}))
        LAG.labels("archive").set_function(lambda: self._number("lag"))
        AGE.labels("archive").set_function(lambda: self._number("progress_age"))

    def run(self) -> None:
        """Until ``stop`` is set; returns before that where the process ended by itself."""
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        ears = threading.Thread(target=self._listen, args=(process,), name="filing", daemon=True)
        ears.start()
        try:
            while process.poll() is None and not self._stop.wait(0.2):
                pass
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(self._patience)
            except subprocess.TimeoutExpired:
                process.kill()  # nothing unfinished is committed: the next one handles that batch again
                process.wait()
            ears.join()
        if not self._stop.is_set():
            raise RuntimeError(f"the archive's process ended with status {process.returncode}")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                said = json.loads(line)
                self._heard = time.monotonic()
                if "archive" in said:  # else the log was away from the beginning
                    self._count(said)
                    self._said = said

    def _count(self, said: dict[str, Any]) -> None:
        for counter, part, name in (
            (RECORDS.labels("archive"), "archive", "records"),
            (DEAD.labels("archive"), "archive", "dead_letters"),
            (FOLDED, "compaction", "folded"),
        ):
            counter.inc(said[part][name] - self._said.get(part, {}).get(name, 0))

    def _number(self, name: str) -> float:
        return float(self._said.get("archive", {}).get(name, 0.0))

    def trouble(self) -> str | None:
        if time.monotonic() - self._heard > SILENT:
            return f"the archive's process has said nothing for {time.monotonic() - self._heard:.0f} s"
        said: str | None = self._said.get("trouble")
        return said


def file(config: Config, ended: threading.Event) -> int:
    """The process's end: archive and compact until ``ended`` is set; returns the exit status."""
    home, log = Home(config.home), open_log(config)
    archive = Archive(home)
    stream = Stream(
        archive,
        log,
        home.folder("state"),
        stop=ended,
        blobs=home.blobs,
        linger=LINGER,
        max_records=MAX_RECORDS,
    )
    compactor = Compactor(home.folder("store"), ended)
    threading.Thread(target=compactor.run, name="compaction", daemon=True).start()
    threading.Thread(target=_tell, args=(stream, compactor, ended), name="status", daemon=True).start()
    try:
        stream.run()
        return 0
    finally:
        ended.set()
        log.close()


def _tell(stream: Stream, compactor: Compactor, ended: threading.Event) -> None:
    """A line a second on stdout; nobody listens any more: end."""
    said: dict[str, Any] = {}
    while not ended.wait(SAY_EVERY):
        try:
            said = {
                "archive": {**stream.status(), "records": stream.handled},
                "compaction": compactor.status(),
                "trouble": stream.trouble(),
            }
        except LogError:  # the log is away: how far behind it is cannot be told, and that it lives can
            said |= {"trouble": None}
        try:
            print(json.dumps(said), flush=True)
        except OSError:
            ended.set()


def _until_closed(ended: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    ended.set()


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the assembler says when
        signal.signal(number, signal.SIG_IGN)
    config, ended = load(), threading.Event()
    log_to_stderr("archive", config.log_level)
    threading.Thread(target=_until_closed, args=(ended,), name="assembler", daemon=True).start()
    try:
        return file(config, ended)
    except Exception:
        logger.exception("the archive failed; it is started anew")
        return 1


if __name__ == "__main__":
    sys.exit(main())

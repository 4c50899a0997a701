"""The releaser's side of the files process: starts it when there is something to do, asks it one thing at a time."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from everloop import errors
from everloop.errors import AdapterRefused, EverloopError, RegistryError

READER = ("-m", "services.releaser.files")
LONGEST = 300.0  # seconds for one request: a download, or the making of a small base at its first use
CRASHES = 3  # of the process over the same request: then the files are to blame


class Porter:
    """Asks ``services.releaser.files``. Used inside one event loop."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._crashes: dict[str, int] = {}

    async def ask(self, do: str, **arguments: Any) -> Any:
        """The result of one of AdapterFiles' methods; raises what it raised.

        RegistryError also where the process ended before it answered: nothing was done, or it can be done again.
        AdapterRefused where that happens over and over for the same request.
        """
        request = json.dumps({"do": do, **arguments})
        async with self._lock:
            try:
                async with asyncio.timeout(LONGEST):
                    answered = json.loads(await self._line(request))
            except (TimeoutError, ValueError, OSError):
                await self._end()
                raise self._crashed(request) from None
            except asyncio.CancelledError:
                await self._end()
                raise
        self._crashes.pop(request, None)
        if "error" in answered:
            kind = getattr(errors, answered["error"], EverloopError)
            raise kind(answered["says"])
        return answered["done"]

    async def _line(self, request: str) -> bytes:
        process = self._process
        if process is None or process.returncode is not None:
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, *READER),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # the cores belong to the engine and the trainer
            )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request.encode() + b"\n")
        await process.stdin.drain()
        return await process.stdout.readline()

    def _crashed(self, request: str) -> EverloopError:
        self._crashes[request] = self._crashes.get(request, 0) + 1
        if self._crashes[request] >= CRASHES:
            return AdapterRefused("reading its files ended the process that reads them, time and again")
        return RegistryError("the process that fetches and checks adapters ended before it answered")

    async def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._process = None

    async def close(self) -> None:
        await self._end()

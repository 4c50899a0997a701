"""A new adapter goes live under load: does any user notice, and how soon is the first one answered by it?

On the processes of ``everloop up``: 32 clients read streams from the gateway, each the next one a moment after the
last. Meanwhile one adapter after the other is registered and promoted by order, as an operator would: its files are
checked, the engine loads it and answers once with it, the route changes, and the adapter that was live longest ago is
dropped, for the engine has room for few. Streams that were open during a swap are compared with those before it.

``--serving vllm`` measures the same on a real vLLM.

The run fails where the engine does not hold what is live, or holds what it should have dropped. A stream that was
refused, or that ended without ``[DONE]``, is a failed one; the aim is none.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from everloop.config import load as load_config
from everloop.run import CommandKind

from benchmarks import _report
from benchmarks._traffic import LIMIT
from benchmarks.rollback import CACHE, NEVER, QUESTION, make_adapters
from examples.bank_desk.platform import POLICY, TENANT, Platform, Ready, write_config
from services.installation import Installation

CLIENTS = 32
PAUSE = 1.0  # seconds between two streams of a client: a person reads
LENGTH = 24  # tokens, at most
SWAPS, QUICK_SWAPS = 10, 4
ROOM = 3  # adapters that the engine holds: what is live, the way back, and one that comes
QUIET = 5.0  # seconds of streams before a swap, to compare with
SETTLED = 1.0  # seconds after the first answer of the new adapter that belong to its swap
GROUPS = ("attention",)  # which every engine can serve


class Stream(NamedTuple):
    """One stream, times in seconds on one clock. ``pieces``: when each piece came. ``failed`` None: it did not."""

    sent: float
    pieces: tuple[float, ...]
    version: str
    failed: str | None = None

    @property
    def end(self) -> float:
        return self.pieces[-1] if self.pieces else self.sent


class Swap(NamedTuple):
    """When it was ordered to register and to promote, and when the first piece of the new adapter came."""

    registered: float
    promoted: float
    served: float


class Phase(NamedTuple):
    """Streams of the time before swaps, or of swaps: seconds to the first piece, between pieces, and of the whole."""

    streams: int
    first: list[float]
    between: list[float]
    whole: list[float]


class Traffic:
    """Clients that read streams. ``streams`` grows."""

    def __init__(self, ready: Ready) -> None:
        self.streams: list[Stream] = []
        self._url = f"{ready.url}/chat/completions"
        self._headers = {"Authorization": f"Bearer {ready.key}"}
        self._number = 0

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=CLIENTS)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=LIMIT)) as http:
            clients = [asyncio.create_task(self._read(http, at)) for at in range(CLIENTS)]
            yield
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def _read(self, http: aiohttp.ClientSession, at: int) -> None:
        await asyncio.sleep(at * PAUSE / CLIENTS)
        while True:
            self.streams.append(await self._one(http))
            await asyncio.sleep(PAUSE)

    async def _one(self, http: aiohttp.ClientSession) -> Stream:
        self._number += 1
        body = {**QUESTION, "max_tokens": LENGTH, "stream": True, "user": f"person-{self._number}"}
        sent, pieces, version, last = time.monotonic(), [], "", b""
        try:
            async with http.post(self._url, json=body, headers=self._headers) as response:
                version = response.headers.get("X-Everloop-Policy-Version", "")
                async for line in response.content:
                    if line.startswith(b"data:"):
                        pieces.append(time.monotonic())
                        last = line.removeprefix(b"data:").strip()
                failed = None if last == b"[DONE]" else f"status {response.status}: {last[:200]!r}"
        except (aiohttp.ClientError, TimeoutError) as error:
            failed = repr(error)
        return Stream(sent, tuple(pieces), version, failed)


class Desk:
    """Gives orders to the platform, without the seconds that a command takes to start."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._here = Installation(load_config(platform.config))

    def close(self) -> None:
        self._here.log.close()

    async def done(self, kind: CommandKind, **arguments: Any) -> None:
        """Ends the benchmark where the releaser refuses."""
        command = self._here.order(kind, TENANT, POLICY, reason="its swap is measured", **arguments)
        said = await asyncio.to_thread(self._here.answer, "releaser", command, LIMIT)
        if said is None or not said["done"]:
            sys.exit(f"the benchmark failed: the order to {kind} was answered by {said}")

    def held(self) -> list[str]:
        """What the engine holds, as its keeper saw it last."""
        (replica,) = self._platform.status("releaser")["replicas"]
        return list(replica["holds"])


async def swap(adapter: Path, desk: Desk, traffic: Traffic) -> Swap:
    registered = time.monotonic()
    await desk.done(CommandKind.REGISTER, path=str(adapter))
    start, promoted = len(traffic.streams), time.monotonic()
    await desk.done(CommandKind.PROMOTE, release=adapter.name, without_evidence=True)

    def served() -> float | None:
        firsts = (one.pieces[0] for one in traffic.streams[start:] if one.version == adapter.name and one.pieces)
        return min(firsts, default=None)

    first = await until("an answer of the new adapter", served)
    await asyncio.sleep(SETTLED)
    return Swap(registered, promoted, first)


async def until(what: str, found: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT
    while not (value := found()):
        if time.monotonic() > end:
            sys.exit(f"the benchmark failed: {what} did not come within {LIMIT:g} s")
        await asyncio.sleep(0.02)
    return value


async def measured(platform: Platform, adapters: Sequence[Path]) -> tuple[list[Stream], list[Swap]]:
    desk, traffic, swaps = Desk(platform), Traffic(platform.start()), []
    async with traffic.flowing():
        for number, adapter in enumerate(adapters):
            await asyncio.sleep(QUIET)
            swaps.append(await swap(adapter, desk, traffic))
            its = swaps[-1]
            print(f"{number} of {len(adapters) - 1}: {its.served - its.promoted:.2f} s", file=sys.stderr)
        held = await asyncio.to_thread(desk.held)
    desk.close()
    if adapters[-1].name not in held or len(held) > ROOM or adapters[0].name in held:
        sys.exit(f"the benchmark failed: the engine has room for {ROOM} adapters and holds {held}")
    return traffic.streams, swaps[1:]  # at the first one the registry is made


def phases(streams: Sequence[Stream], swaps: Sequence[Swap]) -> tuple[Phase, Phase]:
    """(before, during): streams that ended in the quiet before a swap, and those that were open during one."""
    before = [one for one in streams if any(s.registered - QUIET < one.sent and one.end < s.registered for s in swaps)]
    during = [one for one in streams if any(one.end > s.registered and one.sent < s.served + SETTLED for s in swaps)]
    return phase(before), phase(during)


def phase(streams: Sequence[Stream]) -> Phase:
    good = [one for one in streams if one.failed is None]
    gaps = [later - earlier for one in good for earlier, later in pairwise(one.pieces)]
    return Phase(len(streams), [one.pieces[0] - one.sent for one in good], gaps, [one.end - one.sent for one in good])


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


def report(streams: Sequence[Stream], swaps: Sequence[Swap]) -> tuple[list[dict[str, Any]], list[_report.Aim]]:
    before, during = phases(streams, swaps)
    rows: list[dict[str, Any]] = []
    aims = [_report.aim("failed streams", 0, sum(one.failed is not None for one in streams), most=True)]
    for what in ("first", "between", "whole"):
        told = {"first": "to the first piece", "between": "between two pieces", "whole": "whole stream"}[what]
        row: dict[str, Any] = {"seconds": told}
        for name, its in (("before", before), ("during", during)):
            values = getattr(its, what)
            row |= {f"{name} p50 ms": round(1000 * statistics.median(values)), f"{name} p99 ms": _ms(p99(values))}
        rows.append({**row, "streams": before.streams + during.streams})
        ratio = p99(getattr(during, what)) / p99(getattr(before, what))
        aims.append(_report.aim(f"p99 {told}, during over before", 1.2, ratio, most=True))
    for told, took in (
        ("order to register to the first piece of the new adapter", [s.served - s.registered for s in swaps]),
        ("order to promote to the first piece of the new adapter", [s.served - s.promoted for s in swaps]),
    ):
        rows.append({"seconds": told, "during p50 ms": _ms(statistics.median(took)), "during p99 ms": _ms(max(took))})
    slowest = max(s.served - s.promoted for s in swaps)
    aims.append(_report.aim("seconds from the registry to the first token served, worst", 5.0, slowest, most=True))
    return rows, aims


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def run(home: Path, count: int, serving: str) -> tuple[list[Stream], list[Swap]]:
    from trainer.policy import tiny_k2

    base = tiny_k2.cached(CACHE.absolute())
    config = write_config(home, CACHE.absolute(), base, NEVER, 0, serving=serving)
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("[serving]\n", f"[serving]\nresident_adapters = {ROOM}\n"), encoding="utf-8")
    names = make_adapters(base, home / "made", count + 1, GROUPS)
    with Platform(home, config) as platform:
        return asyncio.run(measured(platform, [home / "made" / name for name in names]))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _report.parser("an adapter goes live under load, measured at the gateway")
    parser.add_argument("--serving", choices=("embedded", "vllm"), default="embedded", help="the engine (embedded)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, load = parse(arguments), _report.load()
    with tempfile.TemporaryDirectory(prefix="ev-swap-") as folder:
        streams, swaps = run(Path(folder), QUICK_SWAPS if options.quick else SWAPS, options.serving)
    rows, aims = report(streams, swaps)
    failed = [one.failed for one in streams if one.failed is not None]
    notes = [
        f"{len(swaps)} swaps, {CLIENTS} clients that pause {PAUSE:g} s",
        f"{len(streams)} streams of at most {LENGTH} tokens",
        f"tiny-k2 on {options.serving}, room for {ROOM} adapters: each swap drops the one that was live longest ago",
        "of the two rows about orders, p99 is the worst of all",
        *(["the first failure: " + failed[0]] if failed else []),
        _report.loads(load),
    ]
    name = "swap" if options.serving == "embedded" else f"swap-{options.serving}"
    _report.publish(name, rows, aims, quick=options.quick, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything of a release that takes seconds, away from the loop that must answer an order at once.

::

    releaser loop (own thread) ──examine, hold, adopt, registry─▶ event loop (this thread) ──HTTP──▶ engine
        ▲                                                          │   └─▶ files process: registry, torch checks
        └───────────────── futures, polled, never awaited ◀────────┘
                                    reconcile, every second: what the engine holds against what it should hold

An engine that restarts has forgotten its adapters: reconcile gives them back. A failure leaves the release where it
is; the releaser asks again later.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from everloop.config import Config
from everloop.errors import AdapterRefused, ContractError, RegistryError, ServingError
from everloop.event import BASE
from everloop.home import Home
from everloop.release import Adapter, Release
from everloop.serving.base import Serving

from pipelines.gate import Answers, Decision, Evidence, decide, judge_answers, refused
from pipelines.gold import GoldItem, GoldSet
from services.releaser.porter import Porter
from services.releaser.questions import Measure, Questions, Scored, Tokens, Told, ignored
from services.releaser.recent import Recent
from services.releaser.shadow import Shadow, shadow

logger = logging.getLogger(__name__)
T = TypeVar("T")
EVERY = 1.0  # seconds between looks at what the engine holds


class Ready(NamedTuple):
    """What is known before a canary's first user: the traffic it will get, and what it answers to prompts of late."""

    recent: Recent
    shadow: Shadow


class Examiner:
    """Talks to the engine and the registry. Its methods return futures; ``held`` is what the engine held last,
    ``examined`` the candidates that are being asked questions: they keep their places until that is done."""

    def __init__(self, config: Config, serving: Serving) -> None:
        home = Home(config.home)
        self.held: frozenset[str] = frozenset()
        self.examined: frozenset[str] = frozenset()
        self.trouble: str | None = "the engine was not asked yet"
        self._config = config
        self._serving = serving
        self._gold = GoldSet(home.root / "gold")
        self._adapters = home.folder("adapters")
        self._porter = Porter()
        self._questions = Questions(serving, home.root / "answers")
        self._wanted: dict[str, Release] = {}
        self._pinned: dict[str, Release] = {}
        self._known: set[str] = set()
        self._counts: dict[Path, tuple[tuple[int, int], int]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="examiner", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._submit(self._keep_reconciled())

    def close(self) -> None:
        """Ends what is under way; nothing of it was promised."""
        try:
            self._submit(self._end()).result(timeout=5)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.let_go()

    async def let_go(self) -> None:
        """End the files process and the connections to the engine."""
        await self._porter.close()
        await self._serving.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def keep(self, wanted: dict[str, Release], known: set[str], pinned: dict[str, Release] | None = None) -> None:
        """``wanted``: by adapter, the releases that the engine must hold. ``known``: all that it may be told to
        drop when it is full: adapters of releases; others were loaded by somebody else, and stay. ``pinned``: what it
        should hold beside them, what matters most first; from the last on they give way.
        """
        self._wanted, self._known, self._pinned = dict(wanted), set(known), dict(pinned or {})

    def hold(self, release: Release) -> Future[None]:
        """Make a release's adapter resident now. Fails with AdapterRefused, RegistryError or ServingError."""
        return self._submit(self._hold(release))

    def ready(self, release: Release, look_back: Callable[[], Recent]) -> Future[Ready]:
        """Make a release's adapter resident, and have it answer recent prompts unseen. Fails as :meth:`hold` does."""
        return self._submit(self._ready(release, look_back))

    async def _ready(self, release: Release, look_back: Callable[[], Recent]) -> Ready:
        await self._hold(release)
        lately = await asyncio.to_thread(look_back)
        config = self._config.policy(release.tenant, release.policy)
        return Ready(lately, await shadow(self._serving, release.adapter, lately.calls, config))

    def examine(self, release: Release) -> Future[Decision]:
        """Fetch, check, load, ask the gold questions, decide. Fails with RegistryError or ServingError: ask later."""
        return self._submit(self._examine(release))

    def prepare(self, release: Release) -> Future[None]:
        """Fetch, check and load, without any question. Fails as :meth:`hold` does."""
        return self._submit(self.prepared(release))

    def gold_count(self, tenant: str, policy: str) -> int:
        """How many items the gate has now; read again only when the file has changed."""
        path = self._gold.path(tenant, policy)
        try:
            status = path.stat()
        except FileNotFoundError:
            return 0
        stamp = (status.st_mtime_ns, status.st_size)
        held = self._counts.get(path)
        if held is None or held[0] != stamp:
            try:
                held = (stamp, len(self._gold.items(tenant, policy, "gate")))
            except ContractError as error:
                logger.error("the gold set cannot be read: %s", error)
                held = (stamp, 0)
            self._counts[path] = held
        return held[1]

    def adopt(self, folder: str, tenant: str, policy: str, reason: str, now: float) -> Future[Adapter]:
        """See :meth:`services.releaser.files.AdapterFiles.adopt`."""
        return self._submit(self._adopt(folder, tenant, policy, reason, now))

    async def _adopt(self, folder: str, tenant: str, policy: str, reason: str, now: float) -> Adapter:
        asked = {"source": folder, "tenant": tenant, "policy": policy, "reason": reason, "now": now}
        return Adapter.model_validate(await self._porter.ask("adopt", **asked))

    def registry(self, do: str, **asked: Any) -> Future[Any]:
        """What one of :class:`services.releaser.files.AdapterFiles`' methods gives that speaks to the registry."""
        return self._submit(self._porter.ask(do, **asked))

    async def _hold(self, release: Release) -> None:
        """Files that are in the home were checked when they came."""
        folder = self._adapters / release.adapter
        if not folder.is_dir():
            await self._bring(release)
        await self._make_room(release.adapter)
        await self._serving.load(release.adapter, folder)
        self.held |= {release.adapter}

    async def _bring(self, release: Release) -> None:
        asked = {"adapter": release.adapter, "uri": release.uri, "tenant": release.tenant, "policy": release.policy}
        await self._porter.ask("bring", **asked)

    async def _make_room(self, coming: str) -> None:
        """Engines hold few adapters at once: drop those of ended releases before one too many comes."""
        held = await self._serving.adapters()
        spare = [adapter for adapter in self._pinned if adapter in held and adapter not in self._wanted]
        spare += sorted(held & self._known - self.examined - self._wanted.keys() - self._pinned.keys())
        while coming not in held and len(held) >= self._config.serving.resident_adapters and spare:
            dropped = spare.pop()
            await self._serving.unload(dropped)
            held -= {dropped}

    async def _keep_reconciled(self) -> None:
        while True:
            trouble = None
            try:
                self.held = await self._serving.adapters()
                missing = [r for a, r in (self._pinned | self._wanted).items() if a not in self.held]
                for release in missing:
                    trouble = await self._given_back(release) or trouble
            except ServingError as error:
                trouble = str(error)
            except Exception as error:
                logger.exception("reconciling adapters")
                trouble = repr(error)
            if trouble and self.trouble is None:
                logger.warning("the engine does not hold all that it should: %s", trouble)
            self.trouble = trouble
            await asyncio.sleep(EVERY)

    async def _given_back(self, release: Release) -> str | None:
        """Load what the engine lacks; why it could not be, if it could not."""
        try:
            await self._hold(release)
        except (ServingError, RegistryError, AdapterRefused) as error:
            return str(error)
        logger.info("the engine holds adapter %s", release.adapter)
        return None

    async def prepared(self, release: Release) -> None:
        """As :meth:`prepare`, in the caller's event loop: a command has no thread of the examiner's."""
        await self._bring(release)
        await self._hold(release)

    async def _examine(self, release: Release) -> Decision:
        self.examined |= {release.adapter}
        try:
            return await self._examination(release)
        finally:
            self.examined -= {release.adapter}

    async def _examination(self, release: Release) -> Decision:
        try:
            await self.prepared(release)
        except AdapterRefused as error:
            return refused(str(error))
        config = self._config.policy(release.tenant, release.policy)
        items = await asyncio.to_thread(self._gold.items, release.tenant, release.policy, "gate")
        incumbent = await self.answers(release.incumbent, release.tenant, release.policy, items)
        candidate = await self.answers(release.adapter, release.tenant, release.policy, items)
        evidence = Evidence(tuple(item.slice for item in items), incumbent, candidate)
        return await asyncio.to_thread(decide, evidence, config.gate)

    async def answers(
        self, adapter: str, tenant: str, policy: str, items: list[GoldItem], told: Told = ignored
    ) -> Answers:
        """What an adapter (or 'base') answers to these items."""
        config = self._config.policy(tenant, policy)
        model = config.base if adapter == BASE else adapter
        measure = None if adapter == BASE else self._measure(adapter, tenant, policy, config.base)
        given = await self._questions.answers(model, items, config.max_tokens, measure, told)
        return judge_answers([item.answer for item in items], given)

    def _measure(self, adapter: str, tenant: str, policy: str, base: str) -> Measure:
        """Where the engine is our own, the files process has the base's weights too, and measures exactly."""
        if self._config.serving.url != "embedded":
            return Scored(self._serving, adapter, base)

        async def by_weights(rows: list[Tokens]) -> list[float | None]:
            asked = {"adapter": adapter, "tenant": tenant, "policy": policy, "rows": rows}
            return list(await self._porter.ask("distances", **asked))

        return by_weights

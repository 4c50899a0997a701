"""Everything of a release that takes seconds, away from the loop that must answer an order at once.

::

    releaser loop (own thread) ──examine, hold, adopt, registry─▶ event loop (this thread) ──HTTP──▶ engines
        ▲                                                          │   ├─▶ files process: registry, torch checks
        └───────────────── futures, polled, never awaited ◀────────┘   └─▶ Residents: what each engine holds

A failure leaves the release where it is; the releaser asks again later.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from everloop.config import Config
from everloop.errors import AdapterRefused, ContractError, ServingError
from everloop.event import BASE, PROVIDER
from everloop.home import Home
from everloop.release import Adapter, Release
from everloop.serving.base import LOST

from pipelines.gate import Answers, Decision, Evidence, Given, decide, judge_answers, refused
from pipelines.gold import GoldItem, GoldSet
from services.gateway.provider import Providers
from services.gateway.replicas import Replicas
from services.releaser.bought import Bought
from services.releaser.porter import Porter
from services.releaser.questions import Measure, Questions, Scored, Tokens, Told, ignored
from services.releaser.recent import Recent
from services.releaser.residents import ENDS, Residents
from services.releaser.shadow import Shadow, shadow

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Ready(NamedTuple):
    """What is known before a canary's first user: the traffic it will get, and what it answers to prompts of late."""

    recent: Recent
    shadow: Shadow


class Examiner:
    """Talks to the engines and the registry. Its methods return futures; ``residents`` is what the engines hold,
    ``examined`` the candidates that are being asked questions: they keep their places until that is done."""

    def __init__(self, config: Config, replicas: Replicas) -> None:
        home = Home(config.home)
        self.residents = Residents(replicas, config.serving.resident_adapters, self._folder)
        self.examined: frozenset[str] = frozenset()
        self._config = config
        self._replicas = replicas
        self._gold = GoldSet(home.root / "gold")
        self._adapters = home.folder("adapters")
        self._porter = Porter()
        self._answers = home.root / "answers"
        self._questions = Questions(replicas, self._answers)
        self._providers = Providers(config)
        self._ends: Counter[str] = Counter()
        self._counts: dict[Path, tuple[tuple[int, int], int]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="examiner", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._submit(self.residents.keep_reconciled())

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
        """End the files process and the connections to engines and providers."""
        await self._porter.close()
        await self._replicas.close()
        await self._providers.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def hold(self, release: Release) -> Future[None]:
        """Make a release's adapter resident now. Fails with AdapterRefused, RegistryError or ServingError."""
        return self._submit(self.residents.hold(release))

    def ready(self, release: Release, look_back: Callable[[], Recent]) -> Future[Ready]:
        """Make a release's adapter resident, and have it answer recent prompts unseen. Fails as :meth:`hold` does."""
        return self._submit(self._ready(release, look_back))

    async def _ready(self, release: Release, look_back: Callable[[], Recent]) -> Ready:
        lately = await asyncio.to_thread(look_back)
        config = self._config.policy(release.tenant, release.policy)
        with self.residents.using(release.adapter):
            await self.residents.hold(release)
            try:
                with self._blaming(release.adapter):
                    return Ready(lately, await shadow(self._replicas, release.adapter, lately.calls, config))
            except AdapterRefused as error:
                return Ready(lately, Shadow(0, str(error), {}))

    @contextmanager
    def _blaming(self, adapter: str) -> Iterator[None]:
        """Raises AdapterRefused where engines end at its questions again and again, and never answer them all."""
        if self._ends[adapter] >= ENDS:
            raise AdapterRefused(f"engines ended while it answered, {ENDS} times")
        try:
            yield
        except ServingError as error:
            self._ends[adapter] += error.code == LOST
            raise
        self._ends.pop(adapter, None)

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

    async def _folder(self, release: Release) -> Path:
        """Files that are in the home were checked when they came."""
        folder = self._adapters / release.adapter
        if not folder.is_dir():
            await self._bring(release)
        return folder

    async def _bring(self, release: Release) -> None:
        asked = {"adapter": release.adapter, "uri": release.uri, "tenant": release.tenant, "policy": release.policy}
        await self._porter.ask("bring", **asked)

    async def prepared(self, release: Release) -> None:
        """As :meth:`prepare`, in the caller's event loop: a command has no thread of the examiner's."""
        await self._bring(release)
        await self.residents.hold(release)

    async def _examine(self, release: Release) -> Decision:
        self.examined |= {release.adapter}
        try:
            with self.residents.using(release.adapter), self._blaming(release.adapter):
                await self.prepared(release)
                return await self._compared(release)
        except AdapterRefused as error:
            return refused(str(error))
        finally:
            self.examined -= {release.adapter}

    async def _compared(self, release: Release) -> Decision:
        config = self._config.policy(release.tenant, release.policy)
        items = await asyncio.to_thread(self._gold.items, release.tenant, release.policy, "gate")
        bought = release.incumbent == BASE and config.incumbent is not None
        before = PROVIDER if bought else release.incumbent
        incumbent = await self.answers(before, release.tenant, release.policy, items, by_letters=bought)
        candidate = await self.answers(release.adapter, release.tenant, release.policy, items, by_letters=bought)
        unit = "characters" if bought else "tokens"
        evidence = Evidence(tuple(item.slice for item in items), incumbent, candidate, unit=unit)
        return await asyncio.to_thread(decide, evidence, config.gate)

    async def answers(
        self,
        adapter: str,
        tenant: str,
        policy: str,
        items: list[GoldItem],
        told: Told = ignored,
        *,
        by_letters: bool = False,
    ) -> Answers:
        """What an adapter ('base', 'provider') answers to these items.

        ``by_letters``: lengths in characters, to be compared with those of a model that has other tokens.
        """
        config = self._config.policy(tenant, policy)
        if adapter == PROVIDER:
            given = await self._bought(tenant, policy, items, told)
        else:
            model = config.base if adapter == BASE else adapter
            measure = None if adapter == BASE else self._measure(adapter, tenant, policy, config.base)
            given = await self._questions.answers(model, items, config.max_tokens, measure, told)
        if by_letters:
            given = [one._replace(tokens=len(one.text)) for one in given]
        return judge_answers([item.answer for item in items], given)

    async def _bought(self, tenant: str, policy: str, items: list[GoldItem], told: Told) -> list[Given]:
        provider = self._providers.of(tenant, policy)
        if provider is None:
            raise ServingError(f"{tenant}/{policy} has no provider to ask")
        who = f"{provider.config.url}\0{provider.config.model}"
        longest = self._config.policy(tenant, policy).max_tokens
        return await Bought(provider, self._answers, who, longest).answers(items, told)

    def _measure(self, adapter: str, tenant: str, policy: str, base: str) -> Measure:
        """Where the engine is our own, the files process has the base's weights too, and measures exactly."""
        if self._config.serving.url != "embedded":
            return Scored(self._replicas, adapter, base)

        async def by_weights(rows: list[Tokens]) -> list[float | None]:
            asked = {"adapter": adapter, "tenant": tenant, "policy": policy, "rows": rows}
            return list(await self._porter.ask("distances", **asked))

        return by_weights

"""Where people's orders are taken, carried out in their turn, and answered.

An order's offset is committed once it is done, so one that was under way at a kill is taken up again; the releases
that it moved carry its id, so it is not done twice. Orders that need the engine (a promotion loads its adapter
first) are futures meanwhile; others go on, above all a rollback.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everloop.errors import EverloopError, LogError, TransitionRefused
from everloop.log.base import Consumer, Record
from everloop.run import Command, CommandKind

from services.releaser import orders
from services.releaser.journal import Journal
from services.releaser.state import Change, PolicyState, S

if TYPE_CHECKING:
    from services.releaser.releaser import Releaser

logger = logging.getLogger(__name__)
PATIENCE = 0.5  # seconds that a rollback waits for the engine to hold what it leads to; then it goes on without
REMEMBERED = 200
HOLDS = {
    CommandKind.PAUSE: "paused: no new runs and no new canaries",
    CommandKind.RESUME: "new runs and canaries may start",
    CommandKind.FREEZE: "frozen: no promotions and no new canaries; rollbacks go on",
    CommandKind.UNFREEZE: "no longer frozen: promotions and canaries go on",
}
"""Orders that hold from now on, and what they are answered."""


@dataclass
class Order:
    """A command on its way. ``future``: what it waits for; None: nothing (any more)."""

    record: Record
    command: Command | None
    future: Future[Any] | None = None
    given_up_at: float = 0.0
    done: bool = False


class Office:
    """Takes commands from the log. ``answers`` is what became of the newest, by command id, for ``/status``."""

    def __init__(self, releaser: Releaser) -> None:
        self.answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._releaser = releaser
        self._paused: set[str] = set()
        self._frozen: dict[str, Command] = {}
        self._orders: list[Order] = []

    def paused(self, key: str) -> bool:
        return key in self._paused

    def frozen(self, key: str) -> str | None:
        """Why nothing of this policy may be promoted now, in one sentence; None: it may."""
        order = self._frozen.get(key)
        if order is None:
            return None
        reason = str(order.arguments.get("reason") or "").strip().rstrip(".")
        return (
            f"Frozen by {order.by or 'a person'}{f': {reason}' if reason else ''} ('everloop release unfreeze' ends it)"
        )

    def recover(self, journal: Journal) -> None:
        """What is paused and frozen now: the newest such order of each policy, which the log keeps for ever."""
        for command in journal.pauses():
            self._note(command)

    def _note(self, command: Command) -> None:
        if command.kind is CommandKind.PAUSE:
            self._paused.add(command.key)
        elif command.kind is CommandKind.RESUME:
            self._paused.discard(command.key)
        elif command.kind is CommandKind.FREEZE:
            self._frozen[command.key] = command
        elif command.kind is CommandKind.UNFREEZE:
            self._frozen.pop(command.key, None)

    def receive(self, consumer: Consumer, wait: float) -> None:
        """Wait up to ``wait`` s for an order."""
        for record in consumer.poll(timeout=wait):
            self._orders.append(Order(record, self._releaser.journal.decode(Command, record)))

    def carry_out(self, consumer: Consumer) -> None:
        """Carry out what can be now; commit what is done."""
        for order in self._orders:
            if not order.done:
                order.done = self._carried_out(order)
        finished = 0
        while finished < len(self._orders) and self._orders[finished].done:
            finished += 1
        if finished:
            done = (order.record for order in self._orders[:finished])
            try:
                consumer.commit({(record.topic, record.partition): record.offset + 1 for record in done})
            except LogError as error:
                logger.warning("orders will be read again: %s", error)
            del self._orders[:finished]

    def _carried_out(self, order: Order) -> bool:
        command = order.command
        if command is None or command.kind not in orders.MINE:
            return True
        state = self._releaser.states.get(command.key)
        if state is None:
            return self._answer(command, False, f"there is no policy {command.key} here")
        if command.id in state.orders:
            return self._answer(command, True, "done before")
        try:
            return self._carry_out(order, command, state)
        except LogError:
            raise  # not written, or perhaps it was: the next process reads the log, and this order again
        except EverloopError as error:
            return self._answer(command, False, str(error))
        except Exception as error:
            logger.exception("order %s", command.id)
            return self._answer(command, False, f"it failed: {error!r}")

    def _carry_out(self, order: Order, command: Command, state: PolicyState) -> bool:
        if command.kind in HOLDS:
            self._note(command)
            return self._answer(command, True, HOLDS[command.kind])
        if command.kind is CommandKind.REGISTER:
            return self._register(order, command, state)
        if command.kind is CommandKind.VETO:
            return self._change(command, state, orders.vetoed)
        if command.kind is CommandKind.ROLLBACK:
            return self._roll_back(order, command, state)
        return self._promote(order, command, state)

    def _change(self, command: Command, state: PolicyState, made: Any) -> bool:
        return self._write(command, state, made(state, command, self._releaser.now()))

    def _write(self, command: Command, state: PolicyState, change: Change) -> bool:
        self._releaser.write(state, change)
        provider = self._releaser.work[command.key].config.incumbent
        unadapted = "the base model" if provider is None else f"the provider ({provider.model})"
        return self._answer(command, True, orders.described(state, change, unadapted))

    def _roll_back(self, order: Order, command: Command, state: PolicyState) -> bool:
        """A change of the route, at once where the engine holds what it leads to, as it should."""
        target, way_back = orders.to_roll_back(state, command), state.previous
        if (
            target.state is S.LIVE
            and way_back is not None
            and way_back.adapter not in self._releaser.examiner.residents.held
        ):
            if order.future is None:
                order.future = self._releaser.examiner.hold(way_back)
                order.given_up_at = time.monotonic() + PATIENCE
            if not order.future.done() and time.monotonic() < order.given_up_at:
                return False
        return self._change(command, state, orders.rolled_back)

    def _promote(self, order: Order, command: Command, state: PolicyState) -> bool:
        frozen = self.frozen(command.key)
        if frozen is not None:
            raise TransitionRefused(f"nothing is promoted: {frozen}")
        seen = self._releaser.seen(command.key)
        release = orders.to_promote(state, command, seen)
        if release.state not in (S.CANARY, S.LIVE):
            if order.future is None:
                order.future = self._releaser.examiner.prepare(release)
            if not order.future.done():
                return False
            order.future.result()
        change = orders.promoted(state, command, self._releaser.now(), seen)
        return self._write(command, state, change)

    def _register(self, order: Order, command: Command, state: PolicyState) -> bool:
        if order.future is None:
            folder, reason = (str(command.arguments.get(name, "")) for name in ("path", "reason"))
            order.future = self._releaser.examiner.adopt(folder, state.tenant, state.policy, reason, command.time)
        if not order.future.done():
            return False
        adapter = order.future.result()
        self._releaser.journal.announce(adapter)
        return self._answer(command, True, f"adapter {adapter.hash} is a candidate now ({adapter.uri})")

    def _answer(self, command: Command, done: bool, says: str) -> bool:
        self.answers[command.id] = {"done": done, "says": says}
        while len(self.answers) > REMEMBERED:
            self.answers.popitem(last=False)
        logger.info("order %s (%s %s): %s", command.id, command.kind, command.key, says)
        return True

"""A person's orders about which version scores: back to an earlier one, on to a refused one, and on by itself.

An order names the end of the episodes' partitions when it was given (``after``): it is obeyed before the first episode
behind that is taken, or once everything before it was. So a state that is built anew obeys it at the same place. A
rollback pins its version: snapshots are made and judged as ever, and none takes over until a promotion or "resume".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from everloop import wire
from everloop.errors import ContractError
from everloop.log.base import NewRecord, Record, partition_of
from everloop.run import Command, CommandKind, RewardVersion
from everloop.topics import EPISODES, REWARDS

from reward.desk import Desk

Orders = Callable[[str, str], Sequence[Command]]
"""The orders about the reward model of a (tenant, policy) that the log has by now, oldest first."""


def nobody(tenant: str, policy: str) -> Sequence[Command]:
    """No orders: of who has no log to read them from."""
    return ()


class Office:
    """Which orders are due, and what became of them: ``answers`` by an order's id, since the start."""

    def __init__(self, ordered: Orders) -> None:
        self.answers: dict[str, dict[str, Any]] = {}
        self._ordered = ordered
        self._next: dict[str, int] = {}  # by 'topic/partition', the offset behind the newest record

    def saw(self, record: Record) -> None:
        self._next[f"{record.topic}/{record.partition}"] = record.offset + 1

    def due(self, desk: Desk, record: Record) -> list[Command]:
        """Orders that were given before this record was in the log, and are not obeyed yet."""
        where = f"{record.topic}/{record.partition}"
        return [one for one in self._waiting(desk) if record.offset >= _after(one).get(where, 0)]

    def at_rest(self, desk: Desk) -> list[Command]:
        """Orders that nothing is before any more, so that no further record need come."""
        return [one for one in self._waiting(desk) if self._passed(desk, one)]

    def _waiting(self, desk: Desk) -> list[Command]:
        return [one for one in self._ordered(desk.tenant, desk.policy) if one.time > desk.obeyed]

    def _passed(self, desk: Desk, order: Command) -> bool:
        after = _after(order)
        where = f"{EPISODES.name}/{partition_of(order.key, max(len(after), 1))}"
        reached = max(self._next.get(where, 0), desk.live.offsets.get(where, 0))
        return reached > 0 and reached >= after.get(where, 0)

    def obey(self, desk: Desk, due: Sequence[Command]) -> list[NewRecord]:
        """Carry out orders, and announce what they changed; one that cannot be is answered and done with."""
        outputs = []
        for order in due:
            try:
                outputs += [announcement(made, order.id) for made in obey(desk, order)]
                self.answers[order.id] = {"done": True, "says": told(order)}
            except ContractError as error:
                self.answers[order.id] = {"done": False, "says": str(error)}
        return outputs


def _after(order: Command) -> dict[str, int]:
    return dict(order.arguments.get("after") or {})


def obey(desk: Desk, order: Command) -> list[RewardVersion]:
    """Do it once; the versions that are announced anew, the one that scores last.

    Raises ContractError where its version cannot score; then the version that scored goes on.
    """
    desk.obeyed = order.time
    why = f"by {order.by or 'a person'}: {order.arguments.get('reason') or 'no reason given'}"
    before, version = desk.version, str(order.arguments.get("version") or "")
    if order.kind is CommandKind.REWARD_RESUME:
        desk.pinned = None
        return [_again(desk, order, before, f"was rolled back to; snapshots take over again, {why}")] if before else []
    desk.score_by_order(version)
    promoted, pinned = order.kind is CommandKind.REWARD_PROMOTE, desk.pinned
    desk.pinned = None if promoted else why
    says = f"promoted {why}" if promoted else f"rolled back to, and kept until 'everloop reward resume', {why}"
    found = [_again(desk, order, version, says)]
    if before in ("", version) or (promoted and pinned is None):
        return found
    with contextlib.suppress(ContractError):  # its files are gone: nobody can go back to it, so nobody need know
        ended = f"was kept {pinned}; {version} was promoted {why}" if promoted else f"rolled back {why}"
        found.insert(0, _again(desk, order, before, ended, "released" if promoted else "refused"))
    return found


def _again(
    desk: Desk, order: Command, version: str, reason: str, state: Literal["released", "refused"] = "released"
) -> RewardVersion:
    return desk.described(version, order.time, state, reason, {"order": order.id, "by": order.by})


def told(order: Command) -> str:
    """What an order did, for who gave it."""
    if order.kind is CommandKind.REWARD_RESUME:
        return "snapshots take over again where they pass"
    kept = ", and is kept until 'everloop reward resume'" if order.kind is CommandKind.REWARD_ROLLBACK else ""
    version = order.arguments["version"]
    return (
        f"{version} scores{kept}. What was scored before keeps its scores: 'everloop replay --reward {version}' "
        f"scores it again"
    )


def announcement(made: RewardVersion, order: str = "") -> NewRecord:
    """``order``: whose doing it is that a version is announced again."""
    about = "/".join(filter(None, (made.key, made.version, order)))
    return NewRecord(REWARDS.name, made.key, wire.encode(made), {"schema": "RewardVersion", "id": about}, made.time)

"""How members of a group share partitions: whatever happens, everything is read by exactly one of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest
from everloop.errors import LogError
from everloop.log.sqlite import groups
from everloop.log.sqlite.database import SCHEMA
from everloop.log.sqlite.groups import Member
from hypothesis import given
from hypothesis import strategies as st

SESSION = 4.0
TOPICS = {"events": 4, "scores": 3, "commands": 1}


def tables() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(SCHEMA)
    for topic, count in TOPICS.items():
        for number in range(count):
            connection.execute("INSERT INTO partitions (topic, number) VALUES (?, ?)", (topic, number))
    return connection


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = tables()
    yield connection
    connection.close()


def member(number: int, name: str = "") -> Member:
    return Member(f"m{number}", "g", name, tuple(TOPICS))


def settle_all(connection: sqlite3.Connection, members: list[Member], now: float) -> dict[str, set[int]]:
    """Let each member look in turn, until the group's epoch rests."""
    for _ in range(20):
        before = groups.epoch_of(connection, "g")
        claims = {m.id: set(groups.settle(connection, m, now, SESSION)) for m in members}
        if groups.epoch_of(connection, "g") == before:
            return claims
    pytest.fail("the sharing never comes to rest")


@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "die"]), st.integers(0, 5)), max_size=25))
def test_shares_are_fair_and_complete_after_any_comings_and_goings(events: list[tuple[str, int]]) -> None:
    connection, alive, now, count = tables(), [], 0.0, 0
    for what, which in events:
        now += 1.0
        if what == "join":
            count += 1
            alive.append(member(count))
            groups.join(connection, alive[-1], now, SESSION)
        elif alive:
            gone = alive.pop(which % len(alive))
            if what == "leave":
                groups.remove(connection, "g", [gone.id])
            else:
                now += SESSION + 1
                groups.beat(connection, [m.id for m in alive], now)
        if alive:
            check_shares(settle_all(connection, alive, now))
    connection.close()


def check_shares(claims: dict[str, set[int]]) -> None:
    first = 1
    for count in TOPICS.values():
        partitions = set(range(first, first + count))
        shares = [held & partitions for held in claims.values()]
        assert set().union(*shares) == partitions
        assert sum(map(len, shares)) == count, "no partition has two readers"
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        first += count


def test_a_member_keeps_what_it_has_when_another_comes(connection: sqlite3.Connection) -> None:
    first, second = member(1), member(2)
    before = set(groups.join(connection, first, 0, SESSION))
    groups.join(connection, second, 0, SESSION)
    after = settle_all(connection, [first, second], 0)["m1"]
    assert after < before
    assert after == settle_all(connection, [second, first], 1)["m1"], "and nothing moves without a reason"


def test_heartbeats_from_before_a_restart_of_the_machine_are_dead(connection: sqlite3.Connection) -> None:
    groups.join(connection, member(1), 90_000.0, SESSION)
    assert len(groups.join(connection, member(2), 12.0, SESSION)) == sum(TOPICS.values())


def test_who_was_replaced_under_its_name_stays_out(connection: sqlite3.Connection) -> None:
    old, new = member(1, "worker"), member(2, "worker")
    groups.join(connection, old, 0, SESSION)
    assert len(groups.join(connection, new, 0, SESSION)) == sum(TOPICS.values())
    with pytest.raises(LogError, match="taken the place"):
        groups.settle(connection, old, 0, SESSION)


def test_a_partition_that_was_lost_and_came_back_is_a_new_claim(connection: sqlite3.Connection) -> None:
    first = member(1)
    claims = groups.join(connection, first, 0, SESSION)
    groups.join(connection, member(2), SESSION + 1, SESSION)
    groups.remove(connection, "g", ["m2"])
    groups.settle(connection, first, SESSION + 2, SESSION)
    with pytest.raises(LogError, match="no longer belongs"):
        groups.commit(connection, first, claims, {1: 5})

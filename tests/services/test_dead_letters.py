"""Dead letters are listed and replayed with their original bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from everloop.errors import ContractError, EverloopError
from everloop.home import Home
from everloop.log import Log, NewRecord, Record, connect
from everloop.run import DeadLetter
from everloop.stream import State

from services.dead_letters import REPLAY_OF, dead_letters, replay
from services.stream import run_handler


class Picky:
    """Takes everything but what is in ``refused``."""

    name, topics = "picky", ("events",)

    def __init__(self) -> None:
        self.refused = {b"\x00odd", None}
        self.taken: list[Record] = []

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.value in self.refused:
            raise ContractError("odd")
        self.taken.append(record)
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        return []


@pytest.fixture
def log(home: Home) -> Iterator[Log]:
    log = connect(f"sqlite:///{home.root}/log.db")
    yield log
    log.close()


@pytest.fixture
def picky(log: Log, home: Home) -> Picky:
    """A handler that has refused three of five records."""
    log.append([NewRecord("events", "k1", b"fine"), NewRecord("events", "k1", b"\x00odd", {"id": "e2"})])
    log.append(
        [NewRecord("events", "k2", b"\x00odd"), NewRecord("events", "k2", b"fine"), NewRecord("events", "k3", None)]
    )
    handler = Picky()
    run_handler(handler, log, home.folder("state"), until_idle=True, clock=lambda: 100.0)
    return handler


def test_letters_are_listed_with_cause_and_place(log: Log, home: Home, picky: Picky) -> None:
    found = dead_letters(log, home.blobs)
    assert sorted((letter.record_key, letter.value) for letter in found) == [
        ("k1", b"\x00odd"),
        ("k2", b"\x00odd"),
        ("k3", None),
    ]
    assert {letter.cause for letter in found} == {"ContractError: odd"}
    assert all(letter.replayed is None and letter.time == 100.0 for letter in found)
    assert dead_letters(log, home.blobs, handler="another") == []


def test_a_replay_brings_the_original_back_once(log: Log, home: Home, picky: Picky) -> None:
    picky.refused = set()
    picky.taken = []
    replayed = replay(log, home.blobs, 200.0)
    run_handler(picky, log, home.folder("state"), until_idle=True)
    assert sorted((r.key, r.value) for r in picky.taken) == [("k1", b"\x00odd"), ("k2", b"\x00odd"), ("k3", None)]
    first = next(record for record in picky.taken if record.key == "k1")
    assert first.headers["id"] == "e2"
    assert first.headers[REPLAY_OF] in {letter.id for letter in replayed}
    assert {letter.replayed for letter in dead_letters(log, home.blobs)} == {200.0}
    assert replay(log, home.blobs, 300.0) == []
    assert len(replay(log, home.blobs, 300.0, again=True)) == 3


def test_one_letter_is_replayed_alone(log: Log, home: Home, picky: Picky) -> None:
    chosen = dead_letters(log, home.blobs)[1]
    assert [letter.id for letter in replay(log, home.blobs, 200.0, ids=[chosen.id])] == [chosen.id]
    assert [letter.id for letter in dead_letters(log, home.blobs) if letter.replayed] == [chosen.id]


def test_an_unknown_letter_is_refused(log: Log, home: Home, picky: Picky) -> None:
    with pytest.raises(EverloopError, match="no dead letter dl_none"):
        replay(log, home.blobs, 200.0, ids=["dl_none"])


def test_what_fails_again_is_a_letter_of_its_own(log: Log, home: Home, picky: Picky) -> None:
    before: set[str] = {letter.id for letter in dead_letters(log, home.blobs)}
    replay(log, home.blobs, 200.0)
    run_handler(picky, log, home.folder("state"), until_idle=True)
    after: list[DeadLetter] = [letter for letter in dead_letters(log, home.blobs) if letter.id not in before]
    assert len(after) == 3
    assert {letter.headers[REPLAY_OF] for letter in after} == before


def test_an_unreadable_letter_does_not_hide_the_others(log: Log, home: Home, picky: Picky) -> None:
    log.append([NewRecord("dead-letters", "h", b"broken"), NewRecord("dead-letters", "h", None)])
    assert len(dead_letters(log, home.blobs)) == 3

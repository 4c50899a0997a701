"""Two releases on one log: a worker of the older one and records of the newer, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode
from everloop.event import Call, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import NewRecord
from everloop.log.kafka.log import KafkaLog
from everloop.run import DeadLetter

from pipelines.assemble import Assembler

pytestmark = pytest.mark.kafka
Until = Callable[..., Any]


class NextCall(Call):
    """A call as the next release has it: with a field that this one does not know."""

    mood: str


class NextEpisode(Episode):
    """An episode as the next release reads it: what it has added may be missing."""

    weather: str = "unknown"


def event(episode: str, name: str, payload: Any) -> Event:
    return Event(id=f"{episode}-{name}", tenant="acme", policy="desk", episode=episode, time=1000.0, payload=payload)


def call(episode: str) -> Event:
    asked, answered = Message(role="user", content="hello"), Message(role="assistant", content="hi")
    return event(episode, "call", Call(id=f"c-{episode}", messages=(asked,), output=answered))


def thumb(episode: str) -> Event:
    said = Feedback(id=f"f-{episode}", kind="thumb", value=1, time=1.0, call=f"c-{episode}", rater="r")
    return event(episode, "thumb", FeedbackGiven(feedback=said))


def newer(made: Event) -> bytes:
    """With fields at every level that this release does not know."""
    fields = {**made.model_dump(), "schema_version": 2, "region": "eu"}
    if "feedback" in fields["payload"]:
        fields["payload"]["feedback"]["channel"] = "phone"
    else:
        fields["payload"]["mood"] = "calm"
    return wire.seal(fields)


def older(made: Event) -> bytes:
    """Without what this release does not insist on."""
    fields = made.model_dump(exclude_unset=True, exclude_defaults=True)
    fields["payload"]["kind"] = made.payload.kind
    assert "schema_version" not in fields
    return wire.seal(fields)


def newest(log: KafkaLog) -> dict[str, tuple[int, bytes]]:
    """By episode: version and value of its newest."""
    found: dict[str, tuple[int, bytes]] = {}
    for record in (record for partition in range(4) for record in log.read("episodes", partition)):
        version = int(wire.unseal(record.value or b"")["version"])
        name = record.key.removeprefix("acme/")
        found[name] = max(found.get(name, (0, b"")), (version, record.value or b""))
    return found


def test_old_and_new_releases_share_a_log(log: KafkaLog, tmp_path: Path, work: Any, until: Until) -> None:
    config, home = Config(home=tmp_path), Home(tmp_path)
    unheard = newer(call("ep_unheard"))
    fields = wire.unseal(unheard)
    fields["payload"] = {"kind": "hologram", "of": "a cat"}
    made = {
        "ep_new": [newer(call("ep_new")), newer(thumb("ep_new"))],
        "ep_old": [older(call("ep_old")), older(thumb("ep_old"))],
        "ep_both": [older(call("ep_both")), newer(thumb("ep_both"))],
        "ep_unheard": [wire.seal(fields)],
    }
    log.append([NewRecord("events", f"acme/{key}", value, {"id": key}) for key, its in made.items() for value in its])
    worker = work(tmp_path / "work", lambda: Assembler(config, home))
    until(lambda: worker.worker.handled == 7, deadline=30)
    until(lambda: {version for version, _ in newest(log).values()} == {2}, deadline=30)
    values = {name: value for name, (_, value) in newest(log).items()}
    assert sorted(values) == ["ep_both", "ep_new", "ep_old"]
    for value in values.values():
        read = wire.decode(NextEpisode, value, home.blobs)
        assert (read.weather, len(read.turns), len(read.turns[0].feedback)) == ("unknown", 1, 1)
    turn = wire.unseal(values["ep_new"], home.blobs)["turns"][0]
    assert NextCall.model_validate(turn["call"]).mood == "calm"
    assert turn["feedback"][0]["channel"] == "phone"
    assert wire.unseal(values["ep_both"], home.blobs)["turns"][0]["feedback"][0]["channel"] == "phone"

    (found,) = log.read("dead-letters", 0)
    letter = wire.decode(DeadLetter, found.value or b"", home.blobs)
    assert (letter.value, letter.headers) == (made["ep_unheard"][0], {"id": "ep_unheard"}), "for the release that can"
    print("acknowledged 7: 6 in 3 episodes, 1 dead letter")

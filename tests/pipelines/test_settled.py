"""Assembly lets settled episodes go: the same final state from late events, in a state that stays small."""

from __future__ import annotations

import itertools
import random

import ormsgpack
import pytest
from everloop import wire
from everloop.config import Config
from everloop.episode import Episode
from everloop.event import CallTokens, Ended, Message, ToolResult
from everloop.home import Home
from everloop.topics import EVENTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import settled
from pipelines.archive import Archive
from pipelines.assemble import Assembler
from pipelines.settled import known

HOUR = 3600.0
START = 1_763_900_000.0


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """What is written need not outlive the machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.archive.os.fsync", lambda _: None)
        yield


class Desk:
    """Assembler and archive on one home, with a clock; what came of each episode, newest first to last."""

    def __init__(self, make, emitted, home, *, settle="1h", forget="30d"):
        self.make, self.emitted, self.home = make, emitted, home
        config = Config.model_validate({"home": str(home.root), "assemble": {"settle": settle, "forget": forget}})
        self.state, self.archive = make.State(), Archive(home)
        self.assembler = Assembler(config, home)
        self.offset, self.now = 0, START
        self.versions: list[Episode] = []
        self.waiting = []

    def take(self, *events, archived=True):
        for event in events:
            record = self.make.record(event, self.offset)
            self.offset += 1
            self.waiting.append(record)
            assert self.assembler.handle(self.state, record, self.now) == []
        if archived:
            self.store()
        self.flush()

    def store(self):
        for record in self.waiting:
            self.archive.handle(self.state, record, self.now)
        self.waiting = []
        self.archive.flush(self.state, self.now)

    def flush(self):
        found = self.emitted(self.assembler.flush(self.state, self.now))
        self.versions += [one for one in found if isinstance(one, Episode)]

    def wait(self, seconds, looks=3):
        """Time passes, and the handler is called now and then although nothing comes."""
        for _ in range(looks):
            self.now += seconds / looks
            self.flush()

    def move(self):
        """As where partitions were added: the state goes to another one, whose offsets begin anew."""
        self.state.entries = {key: settled.moved(key, value) for key, value in self.state.entries.items()}
        self.offset = 0

    def final(self, episode="ep_1"):
        its = [one for one in self.versions if one.id == episode]
        return max(its, key=lambda one: one.version) if its else None

    def events_held(self):
        return [name for name in self.state.entries if "\n" in name.strip("\n") and not name.startswith("\n")]


@pytest.fixture
def desk(make, emitted, home):
    return Desk(make, emitted, home)


def story(make):
    first = make.call("c1", tokens=CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.5, -0.25]))
    second = make.call("c2", tokens=CallTokens(prompt=[1, 5, 7, 2, 9], completion=[4], logprobs=[-1.0]))
    return [
        make.event(first, seq=0, subject="sue"),
        make.event(ToolResult(id="t1", name="route", result="done", call="c1"), seq=1, time=START + 90_000.0),
        make.event(second, seq=2, subject="sue", time=START - 90_000.0),  # another of the store's days
        make.event(make.thumb(-1, "c1", id="f1", time=START + 10)),
        make.event(make.thumb(1, "c1", id="f2", time=START + 20)),
        make.event(make.correction("x", "c1", id="f5", time=START + 41, withdrawn=True)),
        make.event(make.thumb(1, None, id="f3", time=START + 30, rater=None)),
        make.event(Ended(events=3), "end"),
    ]


@given(data=st.data())
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_order_and_any_settling_between_give_the_same_final_state(make, emitted, tmp_path_factory, data):
    events = story(make)
    whole = Desk(make, emitted, Home(tmp_path_factory.mktemp("whole")))
    whole.take(*events)
    desk = Desk(make, emitted, Home(tmp_path_factory.mktemp("cut")))
    doubled = data.draw(st.lists(st.sampled_from(events), max_size=3))
    order = data.draw(st.permutations(events + doubled))
    cuts = sorted(data.draw(st.lists(st.integers(1, len(order) - 1), max_size=3)))
    for start, end in itertools.pairwise([0, *cuts, len(order)]):
        desk.take(*order[start:end], archived=data.draw(st.booleans()))
        if data.draw(st.booleans()):
            desk.store()
        desk.wait(data.draw(st.sampled_from([0.0, HOUR / 2, 2 * HOUR, 48 * HOUR])))
    assert desk.final().model_dump(exclude={"updated"}) == whole.final().model_dump(exclude={"updated"})
    assert desk.final().updated == whole.final().updated
    desk.store()
    desk.wait(4 * HOUR, looks=8)
    assert desk.events_held() == []


@given(data=st.data())
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_an_episode_that_moves_to_another_partition_stays_one_in_its_order(make, emitted, tmp_path_factory, data):
    events = [*story(make), *(make.event(make.call(f"u{n}"), time=START - n) for n in range(3))]  # order by the log
    order = data.draw(st.permutations(events))
    whole = Desk(make, emitted, Home(tmp_path_factory.mktemp("whole")))
    whole.take(*order)
    desk = Desk(make, emitted, Home(tmp_path_factory.mktemp("moved")))
    cuts = sorted(data.draw(st.lists(st.integers(1, len(order) - 1), min_size=1, max_size=3)))
    for start, end in itertools.pairwise([0, *cuts, len(order)]):
        desk.take(*order[start:end])
        desk.wait(data.draw(st.sampled_from([0.0, 2 * HOUR])))
        desk.move()
    assert desk.final() == whole.final()


def test_what_moved_while_it_was_open_is_kept_until_it_is_forgotten(make, emitted, home):
    desk = Desk(make, emitted, home, forget="2d")
    desk.take(make.event(make.call(), seq=0))
    desk.move()
    desk.wait(5 * HOUR)
    assert len(desk.events_held()) == 1
    desk.take(make.event(make.thumb(1)))
    assert desk.final().version == 2
    desk.wait(100 * HOUR, looks=30)
    assert desk.state.entries.keys() == {settled.PASSED}


def test_the_key_of_every_entry_is_known(desk, make):
    desk.take(make.event(make.call(), seq=0))
    assert {settled.route_of(key) for key in desk.state.entries} == {"acme/ep_1", None}
    assert settled.joined(settled.PASSED, [b"7", b"5", b"9"]) == b"5"


def test_a_state_of_a_later_release_is_taken_up(desk, make):
    desk.take(make.event(make.call(), seq=0))
    key = "acme/ep_1"
    desk.state.entries[key] = ormsgpack.packb([*ormsgpack.unpackb(desk.state.entries[key]), {"more": 1}])
    desk.take(make.event(make.thumb(1)))
    assert desk.final().version == 2
    later = ormsgpack.packb([*ormsgpack.unpackb(desk.state.entries[key]), {"more": 1}])
    assert settled.moved(key, later) == settled.moved(key, desk.state.entries[key])


def long_call(make, number):
    call = make.call(f"c{number}", messages=(Message(role="user", content="long " * 200),))
    return make.event(call, f"e{number}", episode=f"ep_{number}", seq=0)


def test_the_state_holds_what_is_open_and_a_mark_of_what_is_settled(desk, make):
    for minute in range(0, 300, 10):
        desk.take(*(long_call(make, number) for number in range(minute, minute + 10)))
        desk.now += 600.0
    open_now = len(desk.events_held())
    assert 60 <= open_now <= 80  # an hour's worth, and what the next look will take
    desk.wait(2 * HOUR)
    assert desk.events_held() == []
    assert sum(len(name) + len(value) for name, value in desk.state.entries.items()) < 300 * 110
    assert len(desk.versions) == 300  # settling says nothing


def test_feedback_long_after_finds_its_episode_again(desk, make):
    desk.take(make.event(make.call(), seq=0))
    desk.wait(3 * HOUR)
    assert desk.events_held() == []
    desk.take(make.event(make.thumb(1)))
    assert (desk.final().version, [word.value for word in desk.final().turns[0].feedback]) == (2, [1])
    assert len(desk.events_held()) == 2
    desk.wait(3 * HOUR)
    desk.take(make.event(make.correction("better")))
    assert (desk.final().version, desk.final().turns[0].correction) == (3, "better")


def test_feedback_before_its_episode_waits_however_long(desk, make):
    desk.take(make.event(make.thumb(1)))
    desk.wait(5 * HOUR)
    assert (desk.versions, desk.events_held()) == ([], [])
    desk.take(make.event(make.call(), seq=0))
    assert [word.value for word in desk.final().turns[0].feedback] == [1]


def test_what_the_store_does_not_have_yet_stays(desk, make):
    desk.take(make.event(make.call(), seq=0), archived=False)
    desk.wait(3 * HOUR)
    assert len(desk.events_held()) == 1
    desk.store()
    desk.wait(HOUR)
    assert desk.events_held() == []


def test_a_repeated_event_of_a_settled_episode_changes_nothing(desk, make):
    desk.take(make.event(make.call(), seq=0))
    desk.wait(3 * HOUR)
    again = make.event(make.call(answer="something else"), seq=0)
    desk.take(again)
    assert len(desk.versions) == 1
    desk.take(make.event(make.thumb(1)))
    assert desk.final().turns[0].call.output.text == "card_arrival"  # the first event of an id counts


def test_a_batch_that_is_handled_again_recalls_the_same(desk, make):
    desk.take(make.event(make.call(), seq=0))
    desk.wait(3 * HOUR)
    before = dict(desk.state.entries)
    desk.take(make.event(make.thumb(1)))
    said = desk.versions.pop()
    desk.state.entries, desk.offset = before, desk.offset - 1  # it could not be committed
    desk.take(make.event(make.thumb(1)))
    assert desk.versions[-1] == said


def test_what_is_forgotten_is_changed_no_more_and_takes_no_room(make, emitted, home):
    desk = Desk(make, emitted, home, settle="1h", forget="3d")
    desk.take(make.event(make.call(), seq=0))
    desk.wait(2 * HOUR)
    assert known(desk.state, "acme/ep_1").settled == 1
    desk.wait(80 * HOUR)
    assert known(desk.state, "acme/ep_1") is None
    desk.take(make.event(make.thumb(1)))
    assert desk.final().version == 1
    desk.wait(80 * HOUR, looks=6)
    assert set(desk.state.entries) == {settled.PASSED}


def test_one_look_takes_so_many_and_the_next_ones_the_rest(desk, make, monkeypatch):
    monkeypatch.setattr(settled, "AT_ONCE", 7)
    chance = random.Random(1)
    for number in range(40):
        desk.take(make.event(make.call(f"c{number}"), f"e{number}", episode=f"ep_{number}"))
        desk.now += chance.choice([0.0, 5.0, 20.0])
    held = []
    desk.now += HOUR
    for _ in range(8):
        desk.wait(40.0, looks=1)
        held.append(len(desk.events_held()))
    assert held[0] >= 40 - 7 - 7
    assert all(before - after <= 7 for before, after in itertools.pairwise(held))
    assert held[-1] == 0


def test_a_body_that_went_to_the_blobs_is_settled_like_any_other(desk, make):
    event = make.event(make.call(), seq=0)
    record = make.record(event, 0)._replace(value=wire.seal(event.model_dump(), desk.home.blobs, inline_limit=10))
    assert record.topic == EVENTS.name
    desk.assembler.handle(desk.state, record, desk.now)
    desk.archive.handle(desk.state, record, desk.now)
    desk.archive.flush(desk.state, desk.now)
    desk.offset = 1
    desk.flush()
    desk.wait(3 * HOUR)
    assert desk.events_held() == []
    desk.take(make.event(make.thumb(1)))
    assert desk.final().version == 2

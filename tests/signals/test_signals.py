"""Checks and derived signals through the log: said once, brought up to date, taken back, never an endless loop."""

from __future__ import annotations

import pytest
from everloop.config import Config
from everloop.errors import ConfigError
from everloop.event import Ended, Message, ToolResult
from everloop.home import Home

from reward.signals import SignalsHandler, chosen

NOON = 1_763_900_000.0
TOPIC = '[[check]]\nname = "topic"\nkind = "exact"\nreference = "constant"\nconstant = ["card", "loan"]\n'
RIGHT = '[[check]]\nname = "right"\nkind = "exact"\nreference = "correction"\nverifiable = true\n'
ALL = (
    '[derived]\nkept = true\nrepeated = true\nretried = true\nhandover_tools = ["to_person"]\nabandoned_after = 3600\n'
)


def asking(name: str) -> list[dict[str, object]]:
    return [{"id": "t", "type": "function", "function": {"name": name, "arguments": "{}"}}]


def test_a_verdict_comes_back_once_and_changes_nothing_more(bench):
    it = bench(TOPIC, SignalsHandler)
    it.take(it.call("c1", "Where is my card?", "card"), it.call("c2", "And my loan?", "no idea"))
    assert it.words("c1") == {"check:topic": ("implicit", 1.0)}
    assert it.words("c2") == {"check:topic": ("implicit", 0.0)}
    first = it.said
    assert len(first) == 2
    assert it.handler.status() == {"acme/desk": {"words": {"check:topic": 2}, "failures": {}}}
    version = it.episodes["ep_1"].version
    it.again()
    assert {one.id for one in it.said} == {one.id for one in first}, "a lost state says the same words by the same ids"
    assert it.episodes["ep_1"].version == version, "and they change nothing"


def test_a_verifiable_check_is_an_outcome_and_follows_what_it_compares_with(bench):
    it = bench(RIGHT, SignalsHandler)
    it.take(it.call("c1", "Where is my card?", "card"))
    assert it.words("c1") == {}, "nobody said what is right"
    assert it.handler.status()["acme/desk"]["failures"] == {"check:right no_reference": 1}
    it.take(it.word("f1", kind="correction", call="c1", text="loan", time=NOON + 1))
    assert it.words("c1") == {"check:right": ("outcome", 0.0)}
    it.take(it.word("f2", kind="correction", call="c1", text="card", time=NOON + 2))
    assert it.words("c1") == {"check:right": ("outcome", 1.0)}
    it.take(it.word("f3", kind="correction", call="c1", text="loan", time=NOON + 3))
    assert it.words("c1") == {"check:right": ("outcome", 0.0)}, "what was said before is said again"
    it.take(it.word("f4", kind="correction", call="c1", withdrawn=True, time=NOON + 4))
    assert it.words("c1") == {}, "taken back with what it was compared with"
    assert len(it.said) == 4


def test_derived_signals_follow_the_course_of_an_episode(bench):
    it = bench(ALL, SignalsHandler)
    asked = Message(role="user", content="Where is my card?")
    it.take(
        it.call("c1", "Where is my card?", "It was sent on Monday", seq=0),
        it.call("c2", "where is  my CARD", "", messages=(asked, Message(role="user", content="where is  my CARD"))),
        it.event(ToolResult(id="t1", name="find", result="Error: no such card", call="c3"), "t1", seq=3),
        it.call("c3", "look it up", "", tool_calls=asking("find"), seq=2),
        it.call(
            "c4", "look", "", tool_calls=asking("find"), messages=(asked, Message(role="tool", content="E")), seq=4
        ),
        it.call("c5", "please", "", tool_calls=asking("to_person"), seq=5),
        it.word("k", kind="implicit", name="edited", value=0.4, call="c1", text="It was sent on Tuesday"),
        it.event(Ended(), "end", seq=6),
    )
    assert it.words("c1") == {"derived:kept": ("implicit", 0.8), "derived:repeated": ("implicit", 0.0)}
    assert it.words("c3") == {"derived:retried": ("implicit", 0.0)}
    assert it.words("c5") == {"derived:handover": ("implicit", 0.0)}
    assert it.words("c2") == it.words("c4") == {}


def test_an_answer_left_alone_counts_as_abandoned_until_somebody_comes_back(bench):
    it = bench(ALL, SignalsHandler)
    it.take(it.call("c1", "My card", "Which one?"), it.call("d1", "My loan", "It is paid", episode="ep_2"))
    it.take(it.call("e1", "hello", "hi", episode="ep_3", time=NOON + 3599))
    assert it.words("c1") == {}, "an hour has not passed"
    it.take(it.call("e2", "hello", "hi", episode="ep_4", time=NOON + 3600))
    assert it.words("c1") == {"derived:abandoned": ("implicit", 0.0)}
    assert it.words("d1", "ep_2") == {}, "it asked nothing"
    it.take(it.call("c2", "the black one", "It comes on Monday", time=NOON + 9000))
    assert it.words("c1") == {}, "somebody came back"
    before = it.said
    it.take(it.call("e3", "hello", "hi", episode="ep_5", time=NOON + 99_000))
    assert it.said == before


@pytest.mark.parametrize(
    ("also", "expected"), [("", {}), ('also = ["synthetic"]\n', {"check:topic": ("implicit", 1.0)})]
)
def test_synthetic_episodes_are_left_alone_unless_declared(bench, also, expected):
    it = bench(also + TOPIC, SignalsHandler)
    it.take(it.call("c1", "Where is my card?", "card", synthetic=True))
    assert it.words("c1") == expected


def test_checks_that_run_for_ever_fork_or_eat_memory_are_counted_and_the_rest_goes_on(bench):
    limits = "options = { tests = 'def test_it(): assert f() == 1', seconds = 1.5, memory_mb = 256 }\n"
    it = bench(f'[[check]]\nname = "unit"\nkind = "unit-tests"\n{limits}' + TOPIC, SignalsHandler)
    it.take(
        it.call("good", "write f", "def f(): return 1"),
        it.call("fork", "write f", "import os\ndef f():\n    while True: os.fork()"),
        it.call("fat", "write f", "def f(): return len('x' * 10**9)"),
        *(it.call(f"slow{i}", "write f", "def f():\n    while True: pass") for i in range(4)),
    )
    failures = it.handler.status()["acme/desk"]["failures"]
    assert it.words("good")["check:unit"] == ("implicit", 1.0)
    assert failures.pop("check:unit timeout") == 2
    assert failures.pop("check:unit given_up") == 2, "a check that takes its whole time is not waited for again"
    assert set(failures) == {"check:unit forbidden", "check:unit memory"}
    for name in ("fork", "fat", "slow0", "slow3"):
        assert set(it.words(name)) == {"check:topic"}, "no opinion of the one, and the other is heard"


def test_of_other_policies_nothing_is_said(bench):
    it = bench(TOPIC, SignalsHandler)
    it.take(it.call("c1", "Where is my card?", "card", policy="other"))
    assert it.said == []


def test_a_share_is_the_same_at_every_look():
    picked = [chosen(0.3, f"ep_{i}", "c") for i in range(2000)]
    assert picked == [chosen(0.3, f"ep_{i}", "c") for i in range(2000)]
    assert 500 < sum(picked) < 700


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[[check]]\nname = "x"\nkind = "magic"\n', "no check of the kind 'magic'"),
        ('[[check]]\nname = "x"\nkind = "pattern"\noptions = { patern = "a" }\n', "patern"),
        ('[[check]]\nname = "x"\nkind = "exact"\nreference = "gold"\n', "reference"),
    ],
)
def test_a_wrong_check_is_refused_at_the_start(home: Home, text: str, told: str) -> None:
    path = home.folder() / "reward.toml"
    path.write_text(text)
    tenants = {"acme": {"policies": {"desk": {"reward": {"declaration": str(path)}}}}}
    with pytest.raises(ConfigError, match=told):
        SignalsHandler(Config.model_validate({"tenants": tenants}), home)

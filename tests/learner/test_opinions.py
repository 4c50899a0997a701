"""A batch speaks with one voice: what other reward versions thought is asked of the pinned one, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from everloop import wire
from everloop.config import Config, RewardConfig
from everloop.event import Call, Event, FeedbackGiven, Message, ToolResult
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import open_log
from everloop.log.base import NewRecord
from everloop.score import Score
from everloop.topics import EVENTS, SCORES

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from pipelines.batch import Batch
from reward.features import Example, Structure
from reward.model import Estimate, Label, RewardModel
from services.learner.facts import Facts
from services.learner.runs import Runs
from services.learner.triggers import Due
from services.stream import run_handler
from trainer.request import Request

ANSWERS = ("card_arrival", "lost_card")


def asked(number: int) -> str:
    return f"where is my card {'abcdefgh'[number % 8] * (1 + number // 8)}"


def snapshot(home: Home, letters: Any) -> Path:
    """A reward model that prefers the first answer, and has heard enough to say so."""
    model = RewardModel(RewardConfig(), letters)
    for number in range(60):
        example = Example(asked(number), ANSWERS[number % 2], Structure(tools=number % 3, tool_errors=number % 2))
        model.learn([Label(f"l{number}", example, float(number % 2 == 0))])
    root = home.folder("rewards", "bank", "desk")
    return root / model.save(root)


def captured(config: Config, versions: Sequence[str]) -> list[tuple[str, Example]]:
    """An episode of two calls, a failed tool between them, for each given reward version: the last call, as seen."""
    home, log = Home(config.home), open_log(config)
    seen, records = [], []
    for number, version in enumerate(versions):
        about = {"tenant": "bank", "policy": "desk", "episode": f"ep_{number:02}"}
        names = [f"c{number}", f"d{number}"]
        said = [_call(name, number) for name in names]
        tool = ToolResult(id="t", name="route", result="error: none", error=True, call=names[0])
        kept = Feedback(id=f"i{number}", kind="implicit", name="edit_kept", value=1.0, call=names[1], time=9.0)
        payloads = [said[0], tool, said[1], FeedbackGiven(feedback=kept)]
        for seq, payload in enumerate(payloads):
            event = Event(
                id=f"e{number}-{seq}", **about, subject=f"s{number}", seq=seq, time=100.0 + number, payload=payload
            )
            records.append((EVENTS, event))
        for name in names:
            score = Score(
                **about,
                version=4,
                call=name,
                reward_version=version,
                value=0.5,
                spread=0.0,
                reward=0.123,
                source="model",
                time=200.0,
            )
            records.append((SCORES, score))
        course = Structure(turn=1, tools=1, tool_errors=1, retries=1, finish="stop")
        seen.append((names[1], Example(asked(number), ANSWERS[number % 2], course)))
    log.append([NewRecord(topic.name, made.key, wire.encode(made), {}, made.time) for topic, made in records])
    run_handler(Assembler(config, home), log, home.folder("state"), until_idle=True)
    run_handler(Archive(home), log, home.folder("state"), until_idle=True)
    log.close()
    return seen


def _call(name: str, number: int) -> Call:
    asking = (Message(role="user", content=asked(number)),)
    answer = Message(role="assistant", content=ANSWERS[number % 2])
    return Call(id=name, messages=asking, output=answer, finish_reason="stop")


class Worker:
    """The learner's worker: estimates by a snapshot's folder; counts what it was asked."""

    def __init__(self, letters: Any) -> None:
        self.asked: list[int] = []
        self._letters = letters

    def __call__(self, folder: Path, encoder: str, examples: Sequence[Example]) -> list[Estimate]:
        self.asked.append(len(examples))
        return RewardModel.load(folder, self._letters).estimate(examples)


def drawn(config: Config, facts: Facts, ask: Callable[..., Any]) -> Batch:
    log = open_log(config)
    runs = Runs(config, log, None, threads=1)  # type: ignore[arg-type]
    run = runs.begin("bank", "desk", Due("now", {"id": "c"}), facts, 10.0, ask)
    log.close()
    return Batch.load(Path(Request.load(Home(config.home).folder("runs", run.id)).batch))


def test_a_batch_holds_the_opinions_of_the_pinned_version_alone(installation: Config, letters: Any):
    home = Home(installation.home)
    pinned = snapshot(home, letters)
    seen = captured(installation, ["old", "older", pinned.name, "old", pinned.name, "oldest"])
    worker = Worker(letters)
    batch = drawn(installation, Facts(reward_version=pinned.name), worker)
    assert batch.reward_version == pinned.name
    assert batch.scored_by == {pinned.name: 12}
    assert worker.asked == [8]  # those that it had not scored already
    rewards = {item.call: (item.reward, item.mask) for item in batch.items}
    model = RewardModel.load(pinned, letters)
    (plain,) = model.estimate([seen[0][1]])
    assert rewards["c2"] == (0.123, True)
    assert rewards["d0"][0] > plain.reward  # the episode's course is seen, and an answer that was kept counts
    assert rewards["c0"] != rewards["d0"]
    assert rewards["d0"][0] > rewards["d1"][0]


def test_where_the_snapshot_is_gone_others_have_no_say(installation: Config, letters: Any):
    captured(installation, ["old", "pinned"])
    batch = drawn(installation, Facts(reward_version="pinned"), Worker(letters))
    assert batch.scored_by == {"pinned": 2}
    assert [item.mask for item in batch.items] == [False, False, True, True]


def test_what_was_pinned_is_not_asked_again(installation: Config, letters: Any):
    pinned = snapshot(Home(installation.home), letters)
    captured(installation, ["old", pinned.name])
    worker = Worker(letters)
    first = drawn(installation, Facts(reward_version=pinned.name), worker)
    assert drawn(installation, Facts(reward_version=pinned.name), worker).id == first.id
    order = Due("now", {"id": "again", "batch": first.id})
    log = open_log(installation)
    run = Runs(installation, log, None, 1).begin(  # type: ignore[arg-type]
        "bank", "desk", order, Facts(), 10.0, pytest.fail
    )
    log.close()
    assert run.batch == first.id

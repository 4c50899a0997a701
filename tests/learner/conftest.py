"""An installation with captured, scored episodes in its log and store, as gateway, assembler and scorer leave them."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from everloop import wire
from everloop.config import Config, load
from everloop.contract import Contract
from everloop.event import Call, CallTokens, Event, FeedbackGiven, Message
from everloop.feedback import Feedback
from everloop.home import Home
from everloop.log import open_log
from everloop.log.base import Log, NewRecord
from everloop.score import Score
from everloop.topics import EVENTS, SCORES, Topic

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from services.stream import run_handler
from trainer.policy.base import Policy

RECIPE = """
checkpoint_every = 1
[reward]
source = "feedback"
[adapter]
rank = 2
[optimizer]
minibatch = 4
epochs = 6
"""
CONFIG = """
home = "{home}"
cache = "{cache}"
[services]
learner_port = 0
[ray]
cpus = 1
[tenants.bank.policies.desk]
base = "{base}"
[tenants.bank.policies.desk.train]
recipe = "{recipe}"
min_scored = 20
"""


@pytest.fixture
def installation(policy: Policy, home: Home) -> Config:
    """One policy, whose recipe learns from thumbs and corrections alone."""
    recipe = home.folder() / "quick.toml"
    recipe.write_text(RECIPE)
    path = home.root / "everloop.toml"
    path.write_text(CONFIG.format(home=home.root, cache=policy.folder.parent, base=policy.folder, recipe=recipe))
    return load(path, {})


@pytest.fixture
def capture(installation: Config, policy: Policy) -> Callable[[int], None]:
    """Append so many rated and scored episodes, and bring them to the store."""

    def bring(count: int) -> None:
        home, log = Home(installation.home), open_log(installation)
        for number in range(count):
            _episode(number, home, log, policy)
        run_handler(Assembler(installation, home), log, home.folder("state"), until_idle=True)
        run_handler(Archive(home), log, home.folder("state"), until_idle=True)
        log.close()

    return bring


def _episode(number: int, home: Home, log: Log, policy: Policy) -> None:
    asked, answer = f"where is my card number {number}", ["card_arrival", "lost_card"][number % 2]
    tokens = CallTokens(
        prompt=policy.encode_chat([{"role": "user", "content": asked}]),
        completion=policy.encode_answer(answer),
        logprobs=[-1.0] * len(policy.encode_answer(answer)),
    )
    name, call, now = home.ids.episode_named("bank", f"e{number}"), f"call_{number}", time.time()
    thumb = Feedback(id=f"t{number}", kind="thumb", value=1 - 2 * (number % 2), call=call, time=now)
    said = [
        Call(
            id=call,
            messages=(Message(role="user", content=asked),),
            output=Message(role="assistant", content=answer),
            tokens=tokens,
        ),
        FeedbackGiven(feedback=thumb),
    ]
    about = {"tenant": "bank", "policy": "desk", "episode": name}
    events = [
        Event(id=f"e{number}-{seq}", **about, subject=f"s{number}", seq=seq, time=now, payload=payload)
        for seq, payload in enumerate(said)
    ]
    label = 1.0 - number % 2
    score = Score(
        **about,
        version=2,
        call=call,
        reward_version="",
        value=label,
        spread=0.0,
        reward=2 * label - 1,
        source="feedback",
        label=label,
        time=now,
    )
    log.append([_record(EVENTS, event, event.id) for event in events] + [_record(SCORES, score, score.call)])


def _record(topic: Topic, contract: Contract, name: str) -> NewRecord:
    headers = {"schema": type(contract).__name__, "id": name}
    return NewRecord(topic.name, contract.key, wire.encode(contract), headers, contract.time)  # type: ignore[attr-defined]

"""'everloop evaluate' over sampled answers of a real base: its interval holds the truth, and what limits it is said."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from everloop import wire
from everloop.cli.main import main
from everloop.config import Config, RewardConfig, load
from everloop.event import Call, CallTokens, Event, Message, Sampling
from everloop.home import Home
from everloop.log import NewRecord, open_log
from everloop.release import Adapter
from everloop.run import RewardVersion
from everloop.score import Score
from everloop.topics import ADAPTERS, EVENTS, REWARDS, SCORES, Topic

from pipelines.archive import Archive
from pipelines.assemble import Assembler
from reward.encoder import Encoder
from reward.features import Example
from reward.model import Label, RewardModel
from services.stream import run_handler
from trainer.policy import lora
from trainer.policy.base import Policy
from trainer.sampling import Sampling as Draw
from trainer.sampling import rollouts

pytestmark = pytest.mark.models
CONFIG = """
home = "{home}"
cache = "{cache}"
[tenants.bank.policies.desk]
base = "{base}"
max_tokens = 2
"""
CALLS, PEOPLE = 300, 200
NOW = time.time() - 3600


@pytest.fixture
def installation(policy: Policy, home: Home, monkeypatch: pytest.MonkeyPatch) -> Config:
    path = home.folder() / "everloop.toml"
    path.write_text(CONFIG.format(home=home.root, cache=policy.folder.parent, base=policy.folder))
    monkeypatch.setenv("EVERLOOP_CONFIG", str(path))
    return load(path, {})


class World:
    """Answers of the base, of two tokens at most, and what people said of them; an adapter that was never tried.

    People like an answer that begins as the adapter's do more often than the base's.
    """

    def __init__(self, config: Config, policy: Policy, adapter: Path) -> None:
        torch.set_num_threads(1)
        self.config, self.policy, self.home = config, policy, Home(config.home)
        self.log = open_log(config)
        self.prompts = [
            policy.encode_chat([{"role": "user", "content": f"where is my card number {n}"}]) for n in range(CALLS)
        ]
        self.adapter = adapter.name
        shutil.copytree(adapter, self.home.folder("adapters") / adapter.name)
        self.model = lora.merged(policy, adapter)
        self.liked = self.first(self.model, self.prompts[0]) > self.first(policy.model, self.prompts[0])

    @staticmethod
    def first(model: Any, prompt: list[int]) -> Any:
        """Probabilities of an answer's first token."""
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0, -1].softmax(-1).numpy()

    def append(self, *contracts: tuple[Topic, Any, str]) -> None:
        self.log.append(
            [
                NewRecord(topic.name, one.key, wire.encode(one), {"schema": type(one).__name__, "id": name}, one.time)
                for topic, one, name in contracts
            ]
        )

    def traffic(self, *, greedy: int = 0, rated: bool = True) -> None:
        """The answers of one hour ago. Of the first ``greedy`` of them nobody knows the probability."""
        drawn = rollouts(self.policy.model, self.prompts, Draw(1, 2, 1.0), stop_ids=self.policy.stop_ids, seed=1)
        chance = np.random.default_rng(5)
        made: list[tuple[Topic, Any, str]] = []
        for number, (prompt, (answer,)) in enumerate(zip(self.prompts, drawn, strict=True)):
            call = Call(
                id=f"call_{number}",
                messages=(Message(role="user", content=f"where is my card number {number}"),),
                output=Message(role="assistant", content=self.policy.decode(answer.completion)),
                tokens=CallTokens(prompt=prompt, completion=answer.completion, logprobs=answer.logprobs.tolist()),
                sampling=Sampling(temperature=0.0 if number < greedy else 1.0),
                model=str(self.policy.folder),
            )
            about = {"tenant": "bank", "policy": "desk", "episode": f"ep_{number}"}
            event = Event(id=f"e{number}", **about, subject=f"s{number % PEOPLE}", time=NOW + number, payload=call)
            label = float(self.liked[answer.completion[0]]) if rated and chance.random() < 0.9 else None
            fields = {"value": 0.5, "spread": 0.0, "reward": 0.0, "label": label, "reward_version": ""}
            score = Score(**about, version=1, call=call.id, time=NOW + number, **fields)
            made += [(EVENTS, event, event.id), (SCORES, score, call.id)]
        self.append(*made)

    def announce(self, **fields: Any) -> None:
        about = {
            "tenant": "bank",
            "policy": "desk",
            "base": "x",
            "run": "run_1",
            "rank": 4,
            "targets": (),
            "uri": "m/1",
        }
        its = {**about, "batch": "batch_1", "time": NOW - 9, **fields}
        self.append((ADAPTERS, Adapter(hash=self.adapter, **its), "a"))

    def batch(self, *episodes: str) -> None:
        folder = self.home.folder("batches")
        pq.write_table(pa.table({"episode": list(episodes)}), folder / "batch_1.parquet")

    def reward_model(self, moment: float) -> str:
        """One that has learned from some answers of long ago."""
        model = RewardModel(RewardConfig(), Encoder())
        words = [self.policy.decode([token]) for token in range(100, 160)]
        lessons = [
            Label(word, Example("where is my card", word), float(self.liked[token]))
            for token, word in zip(range(100, 160), words, strict=True)
        ]
        model.learn(lessons)
        version = model.save(self.home.root / "rewards" / "bank" / "desk")
        where = f"rewards/bank/desk/{version}"
        about = {"tenant": "bank", "policy": "desk", "path": where, "updates": 60}
        self.append((REWARDS, RewardVersion(version=version, time=moment, **about), version))
        return version

    def stored(self) -> None:
        run_handler(Assembler(self.config, self.home), self.log, self.home.folder("state"), until_idle=True)
        run_handler(Archive(self.home), self.log, self.home.folder("state"), until_idle=True)
        self.log.close()

    def truth(self) -> float:
        """The adapter's probability of an answer that people like."""
        return self.worth(self.model)

    def worth(self, model: Any) -> float:
        return float(np.mean([self.first(model, prompt)[self.liked].sum() for prompt in self.prompts[::15]]))


@pytest.fixture
def world(installation: Config, policy: Policy, adapter: Path) -> World:
    return World(installation, policy, adapter)


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def ask(*arguments: str) -> tuple[int, dict[str, Any]]:
        status = main(["evaluate", *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return ask


def test_an_adapter_that_nobody_tried_is_told_within_its_interval(
    world: World, asked: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world.traffic(greedy=20)
    world.announce()
    world.batch("ep_30", "ep_31", "ep_of_long_ago")
    version = world.reward_model(NOW - 100)
    world.stored()
    status, found = asked(world.adapter[:8], "--answers", "1")
    assert status == 0
    assert found["adapter"] == world.adapter
    assert found["judge"] == version
    assert found["left_out"] == {
        "greedy, truncated or constrained: its probability is not known": 20,
        "the candidate learned from its episode": 2,
    }
    evaluation = found["evaluation"]
    assert evaluation["overlap"]["calls"] == CALLS - 22
    assert 0.9 < evaluation["overlap"]["mass"] < 1.1
    true = world.truth()
    assert true > world.worth(world.policy.model) + 0.03  # it is another one than that of what was logged
    for name in ("snips", "doubly_robust"):
        _, low, high = evaluation[name]
        assert low < true < high
        assert high - low < 0.4
    assert main(["evaluate", world.adapter, "--answers", "0"]) == 0
    told = capsys.readouterr().out
    assert f"bank/desk: {world.adapter} on 278 answers of the last 7d" in told
    assert "left out: 20 (greedy" in told
    assert "reward model: not asked for" in told


def test_the_base_is_worth_what_its_answers_were_worth(world: World, asked: Callable[..., Any]) -> None:
    world.traffic()
    world.stored()
    status, found = asked("base")
    assert status == 0
    evaluation = found["evaluation"]
    assert evaluation["snips"] == pytest.approx(evaluation["logged"], abs=1e-3)
    assert evaluation["overlap"]["mass"] == pytest.approx(1, abs=1e-3)
    assert evaluation["doubly_robust"] is None
    assert "none is kept" in found["judge"]


def test_without_thumbs_there_is_no_number_and_the_status_says_so(
    world: World, asked: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    world.traffic(rated=False)
    world.stored()
    status, found = asked("base", "--calls", "80", "--answers", "0")
    assert status == 1
    assert found["evaluation"]["snips"] is None
    assert main(["evaluate", "base", "--calls", "80", "--answers", "0"]) == 1
    assert "Not enough overlap, so no estimate: nobody rated any of the 80 answers." in capsys.readouterr().out


def test_a_model_that_had_heard_of_these_calls_does_not_judge_them(world: World, asked: Callable[..., Any]) -> None:
    world.traffic()
    world.reward_model(NOW + CALLS + 1)
    world.stored()
    _, found = asked("base", "--calls", "100")
    assert found["evaluation"]["doubly_robust"] is None
    assert "had not learned from these very calls" in found["judge"]


def test_where_the_batch_is_gone_what_was_there_before_the_adapter_is_not_used(
    world: World, asked: Callable[..., Any]
) -> None:
    world.traffic()
    world.announce(time=NOW + 100)
    world.stored()
    status, found = asked(world.adapter, "--answers", "0")
    assert found["left_out"] == {"the candidate learned from its episode": 100}
    assert any("is gone" in note for note in found["notes"])
    status, found = asked(world.adapter, "--answers", "0", "--also-learned")
    assert status == 0
    assert found["left_out"] == {}
    assert any("flatters" in note for note in found["notes"])


def test_what_makes_no_sense_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.log.close()
    for arguments in (["base", "--last", "soon"], ["base", "--calls", "0"], ["nobody"]):
        assert main(["evaluate", *arguments]) == 2
    told = capsys.readouterr().err
    assert "is not a duration" in told
    assert "--calls is at least 1" in told
    assert "0 adapters of bank/desk begin with 'nobody'" in told

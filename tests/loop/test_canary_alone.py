"""A harmful adapter that the gate cannot tell from a good one, before real users: the canary alone takes it back.

The gold set asks what it always asked (``OLD``); users ask mostly what is new (``NEW``). The adapter was tuned on
the old questions alone: it answers them better than what is live, which is all that the gate sees, and has forgotten
much of the rest, which only users see.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.models, pytest.mark.mlflow]
OLD = ("order_status", "return_item", "refund_missing", "damaged_item")
NEW = ("cancel_order", "payment_failed", "price_question", "reset_password")
POLICY = """
[tenants.default.policies.desk]
base = "{base}"
max_tokens = 8
temperature = 0.0
[tenants.default.policies.desk.train]
min_scored = 4000
[tenants.default.policies.desk.canary]
share = 0.5
"""
Example = tuple[str, str]


def questions(topics: tuple[str, ...]) -> list[Example]:
    """Every question about these topics, with its right answer."""
    from trainer.policy import builtin

    return [(form.format(thing=thing), t) for t in topics for form in builtin.TOPICS[t] for thing in builtin.THINGS]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is sure of the new topics, and was taught the old ones with half of the answers by chance."""
    from trainer.policy import tiny_k2

    chance = random.Random(0)
    taught = [(asked, chance.choice((right, chance.choice(OLD)))) for asked, right in questions(OLD)]
    small = tiny_k2.Settings(
        hidden=64, heads=2, dense_width=128, expert_width=32, context=128, vocabulary=700, steps=(150, 150), batch=16
    )
    folder = tmp_path_factory.mktemp("bases") / "desk"
    tiny_k2.build(folder, [*taught, *questions(NEW)], settings=small)
    return folder


@pytest.fixture(scope="module")
def harmful(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter tuned on the old topics alone."""
    from trainer.policy import base, lora, tiny_k2

    policy = base.load(str(desk), desk.parent)
    model = lora.attach(policy, 8, 16.0)
    settings = tiny_k2.Settings(steps=(120, 120), batch=16, learning_rate=1e-2, sharpness=1.0)
    tiny_k2.teach(model, policy.tokenizer, questions(OLD), seed=0, settings=settings)
    folder = tmp_path_factory.mktemp("tuned")
    return folder / lora.save(model, folder)


class Users:
    """People who ask, nine times in ten about what is new, and say whether the answer was right; 5% say the wrong."""

    def __init__(self, platform: Any) -> None:
        self._client = platform.client()
        self._old, self._new = questions(OLD), questions(NEW)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.versions: list[str] = []

    def ask(self, people: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._one, itertools.islice(self._numbers, people)))

    def _one(self, number: int) -> None:
        chance = random.Random(number)
        asked, right = chance.choice(self._new if chance.random() < 0.9 else self._old)
        raw = self._client.chat.completions.with_raw_response.create(
            model="desk", messages=[{"role": "user", "content": asked}], user=f"person-{number}"
        )
        answer = raw.parse()
        liked = (answer.choices[0].message.content == right) != (chance.random() < 0.05)
        word = {"response_id": answer.id, "kind": "thumb", "value": 1 if liked else -1}
        self._client.post("/feedback", body=word, cast_to=object)
        with self._lock:
            self.versions.append(raw.headers["X-Everloop-Policy-Version"])


def test_the_canary_alone_takes_back_what_passed_the_gate(
    up: Callable[[str], Any], desk: Path, harmful: Path, tmp_path: Path, until: Callable[..., Any]
) -> None:
    platform = up(POLICY.format(base=desk))
    gold = tmp_path / "gold.jsonl"
    gold.write_text("".join(json.dumps({"text": q, "answer": a, "slice": a}) + "\n" for q, a in questions(OLD)))
    platform.does("gold", "import", str(gold), "--split", "gate")
    platform.does("release", "register", str(harmful), "--reason", "tuned on the old questions")

    def release() -> dict[str, Any]:
        return dict(json.loads(platform.does("release", "list", "--json")))

    def state() -> str:
        policy = platform.status("releaser").get("policies", {}).get("default/desk", {})
        return str((policy.get("in_progress") or policy.get("last_decision") or {}).get("state"))

    until(lambda: state() not in ("None", "gated"), 60)
    assert state() == "canary", release()["reason"]
    assert release()["evidence"]["gate"]["gold"]["gain"] > 0
    users = Users(platform)
    for _ in range(30):
        users.ask(20)
        if state() != "canary":
            break
    ended = release()
    assert (ended["state"], ended["adapter"]) == ("rolled_back", harmful.name)
    assert set(users.versions) == {"base", harmful.name}

    # By users' thumbs, with the evidence kept; by no guard, and by no person.
    arms = ended["evidence"]["canary"]
    assert arms["canary"]["mean"] < arms["control"]["mean"]
    assert arms["high"] < 0
    assert (arms["canary"]["failed"], arms["canary"]["empty"]) == (0, 0)
    assert "order" not in ended["evidence"]
    assert all(check["passed"] for name, check in ended["evidence"]["gate"].items() if name != "against")
    assert ended["reason"].startswith("Rolled back: success ")
    assert "worse, the upper bound is -" in ended["reason"]
    for words in (("release", "list"), ("status",)):
        assert ended["reason"] in platform.does(*words)

    told = len(users.versions)
    users.ask(10)
    assert set(users.versions[told:]) == {"base"}
    counted = "select arm, count(distinct subject) people, avg((thumb + 1) / 2) mean from turns where arm <> 'live' "
    by_arm = until(lambda: stored(platform.rows(counted + "group by arm"), arms), 30, every=0.5)
    assert by_arm["canary"]["mean"] < by_arm["control"]["mean"] - 0.1


def stored(rows: list[dict[str, Any]], arms: dict[str, Any]) -> dict[str, Any] | None:
    """What the store counts by arm, once it has all that the verdict rested on."""
    found = {row["arm"]: row for row in rows}
    whole = all(arm in found and found[arm]["people"] >= arms[arm]["units"] for arm in ("canary", "control"))
    return found if whole else None

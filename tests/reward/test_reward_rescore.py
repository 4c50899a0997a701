"""History scored again by a newer version."""

import threading

import pytest
from everloop import wire
from everloop.config import Config
from everloop.errors import ContractError, NotEnoughData
from everloop.log import connect
from everloop.log.base import NewRecord
from everloop.score import Score

from pipelines.archive import Archive
from pipelines.store import Store
from reward.handler import RewardHandler
from reward.rescore import newest_version, rescore
from services.stream import run_handler


@pytest.fixture
def log(home):
    home.folder()
    log = connect(f"sqlite:///{home.root}/log.db")
    yield log
    log.close()


def put(log, episodes):
    """As the assembler does: all episodes of a policy in one partition, by their route."""
    log.append(
        [
            NewRecord("episodes", e.key, wire.encode(e), {"schema": "Episode"}, e.updated, f"{e.tenant}/{e.policy}")
            for e in episodes
        ]
    )


def score_all(home, log, words):
    handler = RewardHandler(Config(home=home.root), home, lambda name: words)
    run_handler(handler, log, home.folder("state"), stop=threading.Event(), until_idle=True)


def scores(log):
    found = {}
    for partition in range(log.partitions("scores")):
        for record in log.read("scores", partition, 0, 5000):
            score = wire.decode(Score, record.value)
            found[score.episode, score.call] = score
    return found


def test_rescoring_is_by_one_version_keeps_what_was_expected_and_is_idempotent(home, log, words, kit):
    put(log, kit.desk_traffic(160, every=2))
    log.append([NewRecord("episodes", "default/x", b"poison")])
    score_all(home, log, words)
    before = scores(log)
    newest = newest_version(log, "default", "assistant")
    assert len({score.reward_version for score in before.values()}) > 1
    appended = rescore(log, home, words, "default", "assistant")
    after = scores(log)
    assert appended == sum(score.reward_version != newest for score in before.values()) > 0
    assert {score.reward_version for score in after.values()} == {newest}
    assert {at: (s.label, s.predicted) for at, s in after.items()} == {
        at: (s.label, s.predicted) for at, s in before.items()
    }
    assert rescore(log, home, words, "default", "assistant") == 0
    older = before[min(before)].reward_version
    assert rescore(log, home, words, "default", "assistant", version=older[:10]) == 160
    assert {score.reward_version for score in scores(log).values()} == {older}


def test_what_only_the_archive_has_is_history_too(home, log, words, kit):
    """The log was emptied by its retention: episodes and what was expected of their calls are in the archive alone."""
    put(log, kit.desk_traffic(80))
    score_all(home, log, words)
    run_handler(Archive(home), log, home.folder("archived"), stop=threading.Event(), until_idle=True)
    store = Store(home.root / "store")
    before = {(score.episode, score.call): score for score in store.scores("default", "assistant")}
    assert before == scores(log)
    older = before[min(before)].reward_version
    later = connect(f"sqlite:///{home.root}/later.db")
    put(later, [kit.episode("ep_new", ("my card lost", "card desk"))])

    def again():
        archived = {"episodes": store.episodes(), "scores": store.scores("default", "assistant")}
        return rescore(later, home, words, "default", "assistant", version=older, **archived)

    assert again() == 1 + sum(score.reward_version != older for score in before.values()) > 1
    expected = {at: score.predicted for at, score in scores(later).items() if at in before}
    assert expected == {at: before[at].predicted for at in expected}
    assert None not in expected.values()
    assert again() == 0
    later.close()
    store.close()


def test_without_a_version_it_says_so(home, log, words):
    with pytest.raises(NotEnoughData, match="first episode"):
        rescore(log, home, words, "default", "assistant")
    with pytest.raises(ContractError, match="kept are: none"):
        rescore(log, home, words, "default", "assistant", version="abc")

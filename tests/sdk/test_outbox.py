"""The SDK never slows, blocks or breaks the agent, and it counts what it drops."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import everloop
import pytest
from everloop.capture.delivery import judge


def give(times: int) -> None:
    """So many thumbs of an agent."""
    with everloop.record("e", whole=False) as episode:
        for _ in range(times):
            episode.thumb(True)


def test_a_gateway_that_is_down_costs_the_agent_nothing(gateway: Any, until: Any) -> None:
    gateway.close()
    give(200)
    until(lambda: everloop.stats().retries > 0)
    assert not everloop.flush(0.2)
    assert everloop.stats().queued == 200


def test_a_slow_gateway_costs_the_agent_nothing(gateway: Any) -> None:
    gateway.delay = 1.0
    give(200)
    assert everloop.stats().sent < 200, "the agent is through before the gateway has answered all"
    assert everloop.flush(10)
    assert everloop.stats().sent == 200


def test_what_overflows_is_counted(gateway: Any) -> None:
    everloop.configure("http://127.0.0.1:9", "ek_test", max_queue_bytes=2000, exit_timeout=0.0)
    give(100)
    stats = everloop.stats()
    assert stats.dropped["queue full"] + stats.queued == 100
    assert 0 < stats.queued_bytes <= 2000


def test_one_thing_that_is_too_large_is_counted(gateway: Any) -> None:
    everloop.configure(gateway.url, "ek_test", max_item_bytes=1000)
    with everloop.record() as episode:
        episode.comment("x" * 1000)
    assert everloop.flush()
    assert everloop.stats().dropped == {"too large": 1}
    assert everloop.stats().sent == 1  # the end


@pytest.mark.parametrize("status", [429, 503])
def test_busy_is_tried_again_with_the_same_ids(gateway: Any, status: int) -> None:
    answers = iter([gateway.refusal(status, Retry_After="0.01"), gateway.refusal(status)])
    gateway.reply = lambda got: next(answers, None)
    give(3)
    assert everloop.flush()
    assert len({json.dumps(got.body) for got in gateway.got}) == 1
    assert everloop.stats()[:4] == (3, 0, 0, 2)


def test_a_refused_item_takes_no_other_with_it(gateway: Any) -> None:
    def refuse_bad(got: Any) -> Any:
        return gateway.refusal(404) if any(item.get("response_id") == "bad" for item in got.body["feedback"]) else None

    gateway.reply = refuse_bad
    for name in ["a", "b", "bad", "c", "d", "e", "f"]:
        everloop.give_feedback(response_id=name, thumb=1)
    assert everloop.flush()
    assert everloop.stats().sent == 6
    assert everloop.stats().dropped == {"http 404 why": 1}


def test_a_bad_key_drops_the_batch_and_says_why(gateway: Any, caplog: pytest.LogCaptureFixture) -> None:
    gateway.reply = lambda got: gateway.refusal(401)
    give(5)
    assert everloop.flush()
    give(5)
    assert everloop.flush()
    assert everloop.stats().dropped == {"http 401 why": 10}
    assert len([record for record in caplog.records if "http 401" in record.getMessage()]) == 1
    assert len(gateway.got) == 2


def test_without_a_gateway_all_is_counted(gateway: Any) -> None:
    for url in (None, "localhost:8080"):
        everloop.configure(url, "ek_test")
        give(2)
        assert everloop.stats().dropped == {"not configured": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda episode: episode.thumb(3),
        lambda episode: episode.rate(math.nan),
        lambda episode: episode.rate(1.5),
        lambda episode: episode.correct(""),
        lambda episode: episode.outcome(2.0),
        lambda episode: episode.thumb(True, call=7),
        lambda episode: episode.call([{"role": "user", "content": object()}], {}),
        lambda episode: everloop.give_feedback(response_id="x"),
        lambda episode: everloop.give_feedback(thumb=1),
    ],
)
def test_what_can_never_be_taken_is_counted_and_raised_where_that_is_wanted(gateway: Any, wrong: Any) -> None:
    with everloop.record("e", whole=False) as episode:
        wrong(episode)
    assert sum(everloop.stats().dropped.values()) == 1
    everloop.configure(gateway.url, "ek_test", strict=True)
    with everloop.record("e", whole=False) as episode, pytest.raises(ValueError, match=r"\w"):
        wrong(episode)
    assert everloop.flush()
    assert not gateway.got


def test_events_and_feedback_do_not_split_each_others_batches(gateway: Any) -> None:
    everloop.configure(gateway.url, "ek_test", linger=0.05)
    for _ in range(100):
        with everloop.record() as episode:
            episode.tool("route")
            episode.thumb(True)
    assert everloop.flush()
    assert everloop.stats().sent == 300
    assert len(gateway.got) <= 20


def test_batches_stay_below_their_limits(gateway: Any) -> None:
    everloop.configure(gateway.url, "ek_test", max_batch_items=10, max_batch_bytes=1500, linger=0.01)
    give(100)
    assert everloop.flush()
    sizes = [len(got.body["feedback"]) for got in gateway.got]
    assert sum(sizes) == 100
    assert max(sizes) <= 10


def test_the_end_of_the_process_sends_what_is_queued(gateway: Any) -> None:
    code = "import everloop\nfor _ in range(50): everloop.give_feedback(response_id='r', thumb=1)"
    subprocess.run([sys.executable, "-c", code], env=_environment(gateway.url), check=True)
    assert len(gateway.items("feedback")) == 50


def test_the_end_of_the_process_waits_two_seconds_at_most() -> None:
    code = """
import atexit, time
atexit.register(lambda: print(time.monotonic() - end))  # registered first, so it runs last
import everloop
everloop.give_feedback(response_id="r", thumb=1)
end = time.monotonic()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment("http://127.0.0.1:9"), check=True, capture_output=True, text=True
    )
    assert float(done.stdout) < 3
    assert "process ended" in done.stderr


def test_a_forked_child_sends_its_own_and_not_the_parents(gateway: Any) -> None:
    gateway.delay = 0.2
    give(3)
    child = os.fork()
    if child == 0:
        everloop.give_feedback(response_id="child", thumb=1)
        os._exit(0 if everloop.flush(5) and everloop.stats().sent == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert everloop.flush()
    ids = [item["id"] for item in gateway.items("feedback")]
    assert len(ids) == len(set(ids)) == 4


def test_answers_are_judged_by_status() -> None:
    assert judge(202, b"{}").accepted
    assert judge(503, b"<html>", "7").retry_after == 7
    assert judge(429, b"", "9999").retry_after == 30
    assert judge(503, b"", "Wed, 21 Oct 2026 07:28:00 GMT").retry_after is None
    assert (judge(422, b'{"error":null}').divisible, judge(403, b"[]").divisible) == (True, False)


def _environment(url: str) -> dict[str, str]:
    return {**os.environ, "EVERLOOP_URL": url, "EVERLOOP_API_KEY": "ek_test"}

"""Feedback, tokens and events over HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from everloop.feedback import FeedbackKind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


async def test_a_thumb_by_response_id_is_about_that_call(bench: Any) -> None:
    _, answer, _ = await bench.chat(n=2)
    thumb = {"response_id": answer["id"], "kind": "thumb", "value": 1, "rater": "anna"}
    status, said, _ = await bench.post("/v1/feedback", thumb)
    assert status == 202
    assert said["accepted"] == 1
    await bench.post("/v1/feedback", {**thumb, "choice": 1})
    calls = {event.payload.choice: event for event in bench.events() if event.payload.kind == "call"}
    first, second = (event for event in bench.events() if event.payload.kind == "feedback")
    feedback = first.payload.feedback
    assert feedback.id == said["ids"][0]
    assert feedback.call == calls[0].payload.id
    assert first.episode == calls[0].episode
    assert first.policy == "assistant"
    assert feedback.rater == bench.home.ids.pseudonym("bank", "rater", "anna")
    assert second.payload.feedback.call == calls[1].payload.id


async def test_nothing_is_said_in_the_future(bench: Any) -> None:
    thumb = {"kind": "thumb", "value": 1, "time": 4e9}
    await bench.post("/v1/feedback", {"episode": "run-1", **thumb})
    payload = {"kind": "feedback", "feedback": {"id": "f", **thumb}}
    await bench.post("/v1/events", {"events": [event(payload=payload)]})
    told = [event.payload.feedback for event in bench.events()]
    assert len(told) == 2
    assert all(feedback.time <= time.time() for feedback in told)


async def test_every_kind_in_one_request_by_episode_name(bench: Any) -> None:
    items: list[dict[str, Any]] = [
        {"kind": "rating", "value": 0.5},
        {"kind": "correction", "text": "better", "call": "call_x"},
        {"kind": "preference", "chosen": "a", "rejected": "b"},
        {"kind": "outcome", "value": 1, "name": "solved"},
        {"kind": "comment", "text": "hm"},
        {"kind": "implicit", "name": "kept", "value": 1},
        {"kind": "thumb", "withdrawn": True},
    ]
    body = {
        "feedback": [{"episode": "run-1", "policy": "writer", "id": f"f{at}", **item} for at, item in enumerate(items)]
    }
    status, said, _ = await bench.post("/v1/feedback", body)
    assert (status, said["accepted"]) == (202, 7)
    events = bench.events()
    assert {event.payload.feedback.kind for event in events} == set(FeedbackKind)
    assert {event.episode for event in events} == {bench.home.ids.episode_named("bank", "run-1")}
    assert {event.policy for event in events} == {"writer"}
    assert bench.gateway.metrics.feedback.labels("rating")._value.get() == 1


async def test_the_same_words_again_are_the_same_event(bench: Any) -> None:
    body = {"episode": "run-1", "kind": "thumb", "value": 1, "id": "f1"}
    for value in (1, 1, -1):
        await bench.post("/v1/feedback", {**body, "value": value})
    assert len({event.id for event in bench.events()}) == 2
    for _ in range(2):
        await bench.post("/v1/feedback", {"episode": "run-2", "kind": "thumb", "value": 1}, Idempotency_Key="k")
    assert len({event.id for event in bench.events()}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": "NaN"}, "value"),
        ({"value": 1e999}, "not JSON"),
        ({"kind": "rating", "value": 1.5}, "a rating goes from 0 to 1, not 1.5"),
        ({"kind": "thumb", "value": 0.5}, "use a rating"),
        ({"kind": "thumb", "value": None}, "needs a value"),
        ({"kind": "praise"}, "kind"),
        ({"kind": None}, "kind"),
        ({"time": -1}, "time"),
        ({"tiem": 1}, "unknown fields: tiem"),
        ({"policy": "nobody"}, "there is no policy"),
        ({"policy": ["assistant"]}, "there is no policy"),
        ({"kind": "correction", "text": "x" * 70_000}, "more than 65,536"),
        ({"kind": "correction", "text": ""}, "needs text"),
        ({"rater": ""}, "'rater' must have 1 to 256"),
        ({"episode": None}, "either 'response_id' or 'episode'"),
        ({"episode": 7}, "'episode' must be a text"),
        ({"response_id": "chatcmpl-x"}, "either 'response_id' or 'episode'"),
        ({"choice": -1, "episode": None, "response_id": "good"}, "'choice'"),
    ],
)
async def test_feedback_that_cannot_be_is_refused_and_says_why(bench: Any, changes: dict[str, Any], words: str) -> None:
    _, answer, _ = await bench.chat()
    if changes.get("response_id") == "good":
        changes = {**changes, "response_id": answer["id"]}
    body = {"episode": "run-1", "kind": "thumb", "value": 1, **changes}
    status, said, _ = await bench.post("/v1/feedback", body)
    assert status in (400, 422)
    assert words in said["error"]["message"]
    assert {event.payload.kind for event in bench.events()} == {"call"}
    status, said, _ = await bench.post(
        "/v1/feedback", {"feedback": [{"episode": "a", "kind": "thumb", "value": 1}, body]}
    )
    assert status in (400, 422)
    assert len(bench.events()) == 1, "all or nothing"


async def test_nobody_rates_what_is_not_theirs(bench: Any) -> None:
    _, answer, headers = await bench.chat(X_Everloop_Episode="mine")
    other = bench.new_key("airline")
    forged = answer["id"][:-4] + ("aaaa" if answer["id"][-4:] != "aaaa" else "bbbb")
    for target in (
        {"response_id": answer["id"], "key": other},
        {"episode": headers["X-Everloop-Episode"], "key": other},
        {"response_id": forged, "key": None},
        {"response_id": "chatcmpl-é", "key": None},
        {"episode": "ep_aaaa", "key": None},
    ):
        key = target.pop("key")
        status, said, _ = await bench.post("/v1/feedback", {**target, "kind": "thumb", "value": 1}, key)
        assert status == 404, target
        assert said["error"]["code"] in ("response_not_found", "episode_not_found")
    await bench.post("/v1/feedback", {"episode": "mine", "kind": "thumb", "value": 1}, other)
    episodes = {event.tenant: event.episode for event in bench.events()}
    assert episodes["bank"] != episodes["airline"], "one name, two tenants, two episodes"


async def test_a_token_gives_feedback_about_one_episode_and_nothing_else(bench: Any) -> None:
    _, mine, headers = await bench.chat()
    _, other, _ = await bench.chat("something else")
    status, grant, _ = await bench.post("/v1/feedback/tokens", {"response_id": mine["id"], "ttl": 60})
    assert status == 200
    assert grant["token"].startswith("ft_")
    assert 50 < grant["expires"] - time.time() <= 60
    token = grant["token"]
    thumb = {"kind": "thumb", "value": -1}
    for target in ({"response_id": mine["id"]}, {"episode": headers["X-Everloop-Episode"]}):
        assert (await bench.post("/v1/feedback", {**target, **thumb}, token))[0] == 202
    assert (await bench.post("/v1/feedback", {"response_id": other["id"], **thumb}, token))[0] == 404
    assert (await bench.chat(key=token))[0] == 403
    for path in ("/v1/events", "/v1/feedback/tokens"):
        assert (await bench.post(path, {}, token))[0] == 403
    assert (await bench.post("/v1/feedback", {"response_id": mine["id"], **thumb}, token + "x"))[0] == 401
    for ttl in (0, 1e12, "day", True):
        assert (await bench.post("/v1/feedback/tokens", {"episode": "a", "ttl": ttl}))[0] == 422


async def test_only_a_researcher_says_that_a_check_said_it(bench: Any) -> None:
    said = {"kind": "implicit", "name": "topic", "value": 1, "source": "check:topic", "id": "f"}
    sent = {"id": "e", "episode": "a", "payload": {"kind": "feedback", "feedback": said}}
    token = (await bench.post("/v1/feedback/tokens", {"episode": "a"}))[1]["token"]
    for path, body, key in (
        ("/v1/feedback", {"episode": "a", **said}, None),
        ("/v1/feedback", {"episode": "a", **said}, bench.new_key(scope="feedback")),
        ("/v1/feedback", {"episode": "a", **said}, token),
        ("/v1/events", {"events": [sent]}, None),
    ):
        status, answer, _ = await bench.post(path, body, *([key] if key else []))
        assert (status, answer["error"]["code"]) == (400, "source_not_yours")
    assert bench.events() == []
    research = bench.new_key(scope="research")
    assert (await bench.post("/v1/feedback", {"episode": "a", **said}, research))[0] == 202
    assert (await bench.post("/v1/events", {"events": [sent]}, research))[0] == 202
    assert [event.payload.feedback.source for event in bench.events()] == ["check:topic"] * 2
    assert (await bench.post("/v1/feedback", {"episode": "a", **said, "source": "nobody"}, research))[0] == 422


async def test_a_key_for_feedback_does_nothing_else(bench: Any) -> None:
    key = bench.new_key(scope="feedback")
    assert (await bench.post("/v1/feedback", {"episode": "a", "kind": "thumb", "value": 1}, key))[0] == 202
    assert (await bench.chat(key=key))[0] == 403
    assert (await bench.post("/v1/events", {"events": []}, key))[0] == 403


async def test_browsers_of_known_origins_may_read_the_answer(start: Any) -> None:
    bench = await start(gateway={"allow_origins": ["https://shop.example"]})
    url = f"{bench.url}/v1/feedback"
    for origin, allowed in (("https://shop.example", "https://shop.example"), ("https://evil.example", None)):
        async with bench.http.options(url, headers={"Origin": origin}) as response:
            assert response.headers.get("Access-Control-Allow-Origin") == allowed
        async with bench.http.post(url, data=b"{}", headers={"Origin": origin}) as response:
            assert response.status == 401
            assert response.headers.get("Access-Control-Allow-Origin") == allowed


def event(**changes: Any) -> dict[str, Any]:
    return {"id": "e1", "episode": "run-1", "seq": 0, "time": 5.0, "payload": {"kind": "end", "events": 1}, **changes}


async def test_events_of_every_kind_are_taken(bench: Any) -> None:
    call = {
        "kind": "call",
        "id": "call_1",
        "messages": [{"role": "user", "content": "hi"}],
        "output": {"role": "assistant", "content": "yo"},
        "arm": "canary",
        "release": "r1",
        "tokens": {"prompt": [1], "completion": [2], "logprobs": [-0.1]},
    }
    payloads = [
        call,
        {"kind": "tool", "id": "t1", "name": "search", "arguments": "{}", "result": "[]", "error": True},
        {"kind": "feedback", "feedback": {"id": "f1", "kind": "thumb", "value": 1, "rater": "anna"}},
        {"kind": "end", "events": 3},
    ]
    events = [
        event(id=f"e{at}", seq=at, policy="assistant", subject="anna", payload=payload, time=float(at))
        for at, payload in enumerate(payloads)
    ]
    status, said, _ = await bench.post("/v1/events", {"events": events})
    assert (status, said) == (202, {"accepted": 4})
    took, tool, feedback, end = bench.events()
    assert took.payload.output.text == "yo"
    assert (took.payload.arm, took.payload.release, took.payload.tokens) == ("live", None, None)
    assert took.subject == bench.home.ids.pseudonym("bank", "subject", "anna")
    assert tool.payload.error
    assert feedback.payload.feedback.rater == bench.home.ids.pseudonym("bank", "rater", "anna")
    assert (end.payload.events, end.seq, end.tenant, end.policy) == (3, 3, "bank", "assistant")
    assert {e.episode for e in bench.events()} == {bench.home.ids.episode_named("bank", "run-1")}
    research = bench.new_key(scope="research")
    await bench.post("/v1/events", {"events": [event(id="e9", time=9.0, policy="writer", payload=call)]}, research)
    assert list(bench.events()[-1].payload.tokens.completion) == [2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "'events' is missing"),
        ({"events": []}, "list of 1 to 1000"),
        ({"events": [event()] * 1001}, "list of 1 to 1000"),
        ({"events": [event()], "more": 1}, "nothing else is read"),
        ({"events": [event(id=None)]}, "id must be"),
        ({"events": [event(episode="")]}, "episode must be"),
        ({"events": [event(seq=-1)]}, "seq must be"),
        ({"events": [event(seq=True)]}, "seq must be"),
        ({"events": [event(time="now")]}, "time must be"),
        ({"events": [event(tenant="airline")]}, "unknown fields: tenant"),
        ({"events": [event(policy="nobody")]}, "there is no policy 'nobody'; you have: assistant, writer"),
        ({"events": [event(payload={"kind": "call"})]}, "say which policy's call it is"),
        ({"events": [event(payload={"kind": "spam"})]}, "'kind' is one of"),
        ({"events": [event(payload={"kind": "tool"})]}, "Field required"),
        ({"events": [event(payload={"kind": "feedback"})]}, "feedback must be an object"),
        (
            {"events": [event(payload={"kind": "feedback", "feedback": {"kind": "rating", "value": 2, "id": "f"}})]},
            "0 to 1",
        ),
    ],
)
async def test_events_that_cannot_be_are_refused_and_say_why(bench: Any, body: dict[str, Any], words: str) -> None:
    status, said, _ = await bench.post("/v1/events", body)
    assert status == 422
    assert words in said["error"]["message"]
    assert bench.events() == []


async def test_a_thousand_events_in_one_request(bench: Any) -> None:
    events = [event(id=f"e{at}", seq=at) for at in range(1000)]
    assert (await bench.post("/v1/events", {"events": events}))[1] == {"accepted": 1000}
    assert len(bench.events()) == 1000


RUBBISH = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}))
NAMES = st.sampled_from(
    ["response_id", "episode", "call", "choice", "kind", "value", "text", "rater", "id", "time", "withdrawn", "name"]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(item=st.dictionaries(NAMES, RUBBISH, max_size=4))
async def test_rubbish_is_refused_or_taken_but_never_breaks(bench: Any, item: dict[str, Any]) -> None:
    body = json.dumps({"episode": "a", "kind": "thumb", "value": 1, **item}).encode()
    status, _, _ = await bench.post("/v1/feedback", body)
    assert status in (202, 400, 404, 422)
    wrapped = json.dumps({"events": [{"id": "x", "episode": "a", "payload": {"kind": "tool", **item}}]}).encode()
    status, _, _ = await bench.post("/v1/events", wrapped)
    assert status in (202, 400, 422)

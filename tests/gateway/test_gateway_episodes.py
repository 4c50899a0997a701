"""Which episode a request belongs to, with and without a name."""

from __future__ import annotations

from typing import Any

from services.gateway.conversations import Conversation, Conversations


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


async def say(bench: Any, messages: list[dict[str, Any]], **headers: str) -> str:
    body = {"model": headers.pop("model", "assistant"), "messages": messages}
    _, _, found = await bench.post("/v1/chat/completions", body, headers.pop("key", None), **headers)
    return str(found["X-Everloop-Episode"])


async def test_a_conversation_that_goes_on_is_the_same_episode(bench: Any) -> None:
    first = await say(bench, [user("hi")])
    history = [user("hi"), assistant(bench.engine.says, refusal=None)]
    second = await say(bench, [*history, user("and?")])
    third = await say(bench, [*history, user("and?"), assistant(bench.engine.says), user("thanks")])
    assert first == second == third
    assert await say(bench, [user("hi")]) != first


async def test_other_words_subjects_policies_and_tenants_are_other_episodes(bench: Any) -> None:
    first = await say(bench, [user("hi")])
    history = [user("hi"), assistant(bench.engine.says), user("and?")]
    assert await say(bench, [user("hi"), assistant("never said"), user("and?")]) != first
    assert await say(bench, history, X_Everloop_Subject="anna") != first
    assert await say(bench, history, model="writer") != first
    assert await say(bench, history, key=bench.new_key("airline")) != first


async def test_two_conversations_alike_to_the_letter_are_not_mixed_up(bench: Any) -> None:
    episodes = {await say(bench, [user("hi")]) for _ in range(2)}
    third = await say(bench, [user("hi"), assistant(bench.engine.says), user("and?")])
    assert third not in episodes


async def test_a_named_episode_is_the_agents_own(bench: Any) -> None:
    one = await say(bench, [user("hi")], X_Everloop_Episode="run-1", X_Everloop_Seq="0")
    two = await say(bench, [user("other")], X_Everloop_Episode="run-1", X_Everloop_Seq="1")
    assert one == two == await say(bench, [user("by id")], X_Everloop_Episode=one)
    assert one == bench.home.ids.episode_named("bank", "run-1")
    assert [event.seq for event in bench.events()] == [0, 1, None]
    status, said, _ = await bench.chat(X_Everloop_Episode=one, key=bench.new_key("airline"))
    assert (status, said["error"]["code"]) == (404, "episode_not_found")
    for bad in ({"X_Everloop_Seq": "-1"}, {"X_Everloop_Seq": "x"}, {"X_Everloop_Episode": "x" * 300}):
        assert (await bench.chat(**bad))[0] == 400
    for huge in ("0" * 20 + "9" * 20, "9" * 5000):  # longer than the log can write, or Python reads
        assert (await bench.chat(X_Everloop_Seq=huge))[0] == 400


def test_a_conversation_is_forgotten_when_it_is_idle_or_one_too_many() -> None:
    known = Conversations(limit=2)
    talks = [Conversation("t", "p", None, [user(str(at))]) for at in range(3)]
    for at, talk in enumerate(talks):
        known.answered(talk.after(assistant("yes")), f"ep_{at}", idle=10, now=float(at))
    on = [Conversation("t", "p", None, [user(str(at)), assistant("yes"), user("go on")]) for at in range(3)]
    assert [known.continues(talk, 10, 3.0) for talk in on] == [None, "ep_1", "ep_2"]
    assert known.continues(on[2], 10, 30.0) is None

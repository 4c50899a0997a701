"""What is recorded, what is not, and that nothing leaves before it is durable."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest
from everloop.config import PolicyConfig
from everloop.errors import ConfigError, LogFull, Overloaded, ServingError
from everloop.event import Event
from everloop.wire import decode, seal
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway import capture
from services.gateway.answer import Answer, Choice, read_whole
from services.gateway.ask import read
from services.gateway.conversations import Conversation
from services.gateway.refusals import Refused
from services.gateway.routes import Assignment
from services.gateway.sealing import tokens
from services.gateway.turns import Turn

TEXT = "Where is my card?"


class HeldLog:
    """A log whose appends wait for the test, or fail as it says."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self.holding = False
        self.held: list[tuple[Any, Future[Any]]] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append_soon(self, records: Any) -> Future[Any]:
        if self.error is not None:
            failed: Future[Any] = Future()
            failed.set_exception(self.error)
            return failed
        if not self.holding:
            return self._log.append_soon(records)
        later: Future[Any] = Future()
        self.held.append((records, later))
        return later

    def let_go(self) -> None:
        self.holding = False
        held, self.held = self.held, []
        for records, later in held:
            later.set_result(self._log.append(records))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_last_byte_waits_for_the_log(start: Any, soon: Any, stream: bool) -> None:
    bench = await start(HeldLog)
    bench.log.holding = True
    body = {"model": "assistant", "messages": [{"role": "user", "content": TEXT}], "stream": stream}
    sent = bench.http.post(
        f"{bench.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {bench.key}"}
    )
    got: list[bytes] = []

    async def read_all() -> None:
        async with sent as response:
            async for block in response.content.iter_any():
                got.append(block)

    reading = asyncio.create_task(read_all())
    await soon(lambda: bench.log.held)
    if stream:
        await soon(lambda: b" on" in b"".join(got))
    assert not reading.done()
    assert b'finish_reason":"stop' not in b"".join(got)
    assert b"[DONE]" not in b"".join(got)
    bench.log.let_go()
    await reading
    assert b"stop" in b"".join(got)
    assert (b"[DONE]" in b"".join(got)) is stream
    assert len(bench.events()) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_log_refuses_says_why_and_recovers(start: Any, stream: bool) -> None:
    bench = await start(HeldLog)
    bench.log.error = LogFull("no room left for the log")
    if stream:
        body = {"model": "assistant", "messages": [{"role": "user", "content": TEXT}], "stream": True}
        auth = {"Authorization": f"Bearer {bench.key}"}
        async with bench.http.post(f"{bench.url}/v1/chat/completions", json=body, headers=auth) as response:
            said = (await response.read()).decode()
        assert "log_full" in said
        assert "[DONE]" not in said
    else:
        status, said, headers = await bench.chat()
        assert status == 503
        assert said["error"]["code"] == "log_full"
        assert "Make room" in said["error"]["message"]
        assert headers["Retry-After"] == "5"
    bench.log.error = None
    status, _, _ = await bench.chat()
    assert status == 200
    assert len(bench.events()) == 1


async def test_a_log_that_reached_its_max_bytes_refuses_and_lets_the_unrecorded_through(start: Any) -> None:
    bench = await start(log={"url": "sqlite:///log.db?max_bytes=200000"})
    statuses = []
    while 503 not in statuses:
        status, said, _ = await bench.chat("word " * 4000)
        statuses.append(status)
        assert len(statuses) < 50
    assert said["error"]["code"] == "log_full"
    assert len(bench.events()) == statuses.count(200)
    assert (await bench.chat(X_Everloop_Capture="off"))[0] == 200


async def test_capture_off_leaves_nothing(bench: Any) -> None:
    status, said, headers = await bench.chat(X_Everloop_Capture="off", user="anna", X_Everloop_Episode="mine")
    assert status == 200
    assert said["choices"][0]["message"]["content"] == bench.engine.says
    assert "return_token_ids" not in bench.engine.asked[0]
    assert "X-Everloop-Episode" not in headers
    stream = await bench.client().chat.completions.create(
        model="assistant",
        messages=[{"role": "user", "content": TEXT}],
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Everloop-Capture": "off"},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert bench.log.end_offsets("events") == [0, 0, 0, 0]
    assert not bench.home.blobs.folder.exists()
    status, said, _ = await bench.post("/v1/feedback", {"response_id": said["id"], "kind": "thumb", "value": 1})
    assert status == 404
    status, said, _ = await bench.chat(X_Everloop_Capture="of")
    assert status == 400


async def test_a_client_that_leaves_stops_the_engine(bench: Any, soon: Any) -> None:
    bench.engine.resume.clear()
    waiting = asyncio.create_task(bench.chat())
    await soon(lambda: bench.engine.asked)
    waiting.cancel()
    await soon(lambda: bench.engine.cancelled == 1)
    await soon(bench.events)
    (event,) = bench.events()
    assert event.payload.error == "client disconnected"
    assert event.payload.finish_reason == "cancelled"


async def test_a_client_that_leaves_a_stream_stops_the_engine(bench: Any, soon: Any) -> None:
    bench.engine.resume.clear()
    messages = [{"role": "user", "content": TEXT}]
    stream = await bench.client().chat.completions.create(model="assistant", messages=messages, stream=True)
    first = await anext(aiter(stream))
    assert first.choices[0].delta.content == "the"
    await stream.close()
    await soon(lambda: bench.engine.cancelled == 1)
    await soon(bench.events)
    (event,) = bench.events()
    assert event.payload.output.text == "the"
    assert event.payload.finish_reason == "cancelled"
    assert event.payload.tokens is None


async def test_an_engine_that_fails_is_an_event_too(bench: Any, soon: Any) -> None:
    bench.engine.error = ServingError("the engine failed (500): out of memory")
    status, said, _ = await bench.chat()
    assert status == 502
    assert "out of memory" in said["error"]["message"]
    await soon(bench.events)
    (event,) = bench.events()
    assert event.payload.error == "the engine failed (500): out of memory"
    assert event.payload.error_code == "upstream_error"
    bench.engine.error = ServingError(
        "the maximum context length is 64 tokens", status=400, code="context_length_exceeded"
    )
    status, said, _ = await bench.chat()
    assert (status, said["error"]["code"]) == (400, "context_length_exceeded")
    assert len(bench.events()) == 1


async def test_a_queue_that_is_full_says_when_to_come_back(bench: Any) -> None:
    bench.engine.error = Overloaded("256 requests wait already", retry_after=3)
    status, said, headers = await bench.chat()
    assert (status, said["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "3")


async def test_ids_that_do_not_fit_the_counts_are_not_to_be_trained_on(bench: Any) -> None:
    bench.engine.change = lambda body: body["usage"].update(completion_tokens=99)
    await bench.chat()
    bench.engine.change = lambda body: body["choices"][0]["token_ids"].pop()
    await bench.chat()
    bench.engine.change = lambda body: body["choices"][0].update(token_ids=[2**40] * 6)
    await bench.chat()
    one, two, three = bench.events()
    assert not one.payload.tokens.checked
    assert not two.payload.tokens.checked
    assert three.payload.tokens is None


async def test_explored_calls_are_sampled_at_temperature_1_and_say_so(start: Any) -> None:
    explorer = {"bank": {"policies": {"assistant": {"base": "tiny", "explore": 1.0}}}}
    bench = await start(tenants=explorer)
    await bench.chat(temperature=0, top_p=0.5)
    asked = bench.engine.asked[0]
    assert asked["temperature"] == 1.0
    assert "top_p" not in asked
    (event,) = bench.events()
    assert event.payload.sampling.support_known
    await bench.chat(temperature=0, response_format={"type": "json_object"})
    assert bench.engine.asked[1]["temperature"] == 0


async def test_large_requests_go_to_the_blob_store(start: Any) -> None:
    bench = await start(log={"inline_bytes": 2048})
    long = "word " * 60_000
    status, _, _ = await bench.chat(long)
    assert status == 200
    (event,) = bench.events()
    assert event.payload.messages[0].text == long
    assert any(bench.home.blobs.folder.iterdir())


async def test_what_comes_while_the_log_is_busy_goes_to_it_together(start: Any, soon: Any) -> None:
    bench = await start(HeldLog)
    bench.log.holding = True
    asked = []
    for number in range(5):
        asked.append(asyncio.create_task(bench.chat(f"question {number}")))
        await soon(lambda: len(bench.engine.asked) == len(asked))
    kept = bench.gateway.capture
    await soon(lambda: len(kept._waiting) == 3)
    assert [len(records) for records, _ in bench.log.held] == [1, 1]
    drained = asyncio.create_task(kept.drained())
    bench.log.let_go()
    assert {status for status, _, _ in await asyncio.gather(*asked)} == {200}
    await drained
    assert len(bench.events()) == 5


def redact_names(event: dict[str, Any]) -> dict[str, Any]:
    for message in event["payload"].get("messages", ()):
        message["content"] = message["content"].replace("Anna", "[name]")
    if event["payload"]["kind"] == "feedback":
        event["payload"]["feedback"]["text"] = None if event["payload"]["feedback"]["text"] is None else "[text]"
    return event


def broken(event: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("secret words")


def boundless(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "secret words": 10**30}


def stealing(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "tenant": "airline"}


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(function: Any) -> dict[str, Any]:
        monkeypatch.setattr(capture.importlib, "import_module", lambda name: type("M", (), {"hook": function}))
        return {"redact": "somewhere:hook"}

    return use


async def test_redaction_runs_before_anything_is_stored(start: Any, hook: Any) -> None:
    bench = await start(gateway=hook(redact_names))
    _, said, _ = await bench.chat("I am Anna")
    await bench.chat("I am nobody")
    await bench.post("/v1/feedback", {"response_id": said["id"], "kind": "comment", "text": "Anna again", "time": 4e9})
    one, two, three = bench.events()
    assert one.payload.messages[0].text == "I am [name]"
    assert one.payload.tokens is None, "token ids would spell what was taken out"
    assert two.payload.tokens is not None
    assert three.payload.feedback.text == "[text]"
    assert bench.engine.asked[0]["messages"][0]["content"] == "I am Anna"


@pytest.mark.parametrize("function", [broken, boundless, stealing, lambda event: None])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_hook_that_fails_stores_nothing_and_withholds_the_answer(
    start: Any, hook: Any, function: Any, stream: bool
) -> None:
    bench = await start(gateway=hook(function))
    body = {"model": "assistant", "messages": [{"role": "user", "content": TEXT}], "stream": stream}
    auth = {"Authorization": f"Bearer {bench.key}"}
    async with bench.http.post(f"{bench.url}/v1/chat/completions", json=body, headers=auth) as response:
        said = (await response.read()).decode()
        assert response.status == (200 if stream else 500)
    assert "redaction_failed" in said
    assert "secret words" not in said
    assert "[DONE]" not in said
    assert bench.events() == []


def test_a_hook_that_is_not_there_is_refused_at_the_start() -> None:
    for name in ("no.such.module:hook", "json:no_such_function", "json"):
        with pytest.raises(ConfigError, match="module:function"):
            capture.load_hook(name)


WORDS = st.text(max_size=20)
CONTENT = st.one_of(WORDS, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS}), max_size=2))
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "developer"]), "content": CONTENT}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": st.none()},
            optional={"tool_calls": st.lists(st.dictionaries(WORDS, WORDS, max_size=2), max_size=2)},
        ),
        st.fixed_dictionaries({"role": st.just("tool"), "content": WORDS, "tool_call_id": st.text(min_size=1)}),
    ),
    min_size=1,
    max_size=4,
)
BODY = st.fixed_dictionaries(
    {"model": st.just("assistant"), "messages": MESSAGES},
    optional={
        "temperature": st.one_of(st.floats(0, 2), st.integers(0, 2), st.none()),
        "top_k": st.integers(-1, 50),
        "stop": st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3)),
        "seed": st.integers(-(2**63), 2**63),
        "max_tokens": st.integers(-1, 9),
        "logit_bias": st.dictionaries(WORDS, st.integers(), max_size=1),
        "tools": st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": WORDS})}), max_size=1),
    },
)


@settings(max_examples=100, deadline=None)
@given(body=BODY, said=WORDS, ids=st.lists(st.integers(0, 2**31 - 1), max_size=5), error=st.one_of(st.none(), WORDS))
def test_every_request_that_is_accepted_makes_a_valid_event(
    body: dict[str, Any], said: str, ids: list[int], error: str | None
) -> None:
    try:
        ask = read("chat/completions", body, {"assistant": PolicyConfig()})
    except Refused:
        return  # that refusals are sound is held by test_gateway_faults
    message = {"role": "assistant", "content": said}
    choice = Choice(0, message, "stop", ids, [-0.5] * len(ids))
    conversation = Conversation("bank", "assistant", None, ask.messages)
    turn = Turn(
        "bank", "assistant", "tiny", Assignment(), "base", False, "r", "ep", "call_x", conversation=conversation
    )
    answer = Answer([choice], [1, 2])
    fields = capture.call_event(turn, ask, answer, choice, 0.1, error)
    fields["payload"]["tokens"] = tokens(answer.sampled(choice))
    event = decode(Event, seal(fields))
    assert event.payload.output.text == said
    assert event.model_dump().keys() == fields.keys(), "a new field of Event must be filled here too"
    assert event.payload.model_dump().keys() == fields["payload"].keys()


def test_answers_of_either_route_are_read_alike() -> None:
    chat = {
        "choices": [
            {
                "message": {"role": "assistant", "content": "a"},
                "token_ids": [7],
                "logprobs": {"content": [{"logprob": -1.0}]},
            }
        ],
        "prompt_token_ids": [1],
    }
    older = {
        "choices": [{"text": "a", "token_ids": [7], "prompt_token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}}]
    }
    for body in (chat, older):
        answer = read_whole(body)
        assert answer.prompt == [1]
        assert answer.choices[0].message == {"role": "assistant", "content": "a"}
        assert (answer.choices[0].token_ids, answer.choices[0].logprobs) == ([7], [-1.0])

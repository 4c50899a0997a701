"""A critic asks the policy itself, through the gateway: the live version answers, and nothing of it is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

from everloop.event import Call, Message

from reward.asking import Asked, Asker
from reward.declaration import CriticDeclaration
from reward.judging import Opinion, question
from reward.ledger import Ledger

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
LOOKED = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


async def test_what_a_critic_asks_is_answered_and_is_no_traffic(bench: Any) -> None:
    bench.engine.says = '{"better":"second"}'  # another answer, and then a verdict that the order decides
    bench.engine.held.add("the-adapter")
    bench.route(1, live="the-adapter")
    key = bench.home.root / "key"
    key.write_text(bench.key)
    critic = CriticDeclaration(url=f"{bench.url}/v1", key_file=key, rubric="It names the topic.")
    asked = (
        Message(role="user", content="Where is it?"),
        Message(role="assistant", tool_calls=[LOOKED]),
        Message(role="tool", tool_call_id="t1", content="at home"),
    )
    call = Call(id="c1", messages=asked, tools=(TOOL,), output=Message(role="assistant", content="card"))
    asker = Asker(Ledger(bench.home.folder("state") / "judges.db"))
    one = Asked(("bank", "assistant"), critic, question("Where is it?", "card"), 1, call)
    (opinion,) = await asyncio.to_thread(asker.ask, [one])
    assert opinion == Opinion(None, "swayed")
    again, first, swapped = bench.engine.asked
    assert {body["model"] for body in bench.engine.asked} == {"the-adapter"}
    assert (again["temperature"], again["tools"]) == (1.0, [TOOL])
    assert [message["role"] for message in again["messages"]] == ["user", "assistant", "tool"]
    assert first["messages"] != swapped["messages"]
    assert asker.tallies["bank", "assistant", "critic:self"].tokens > 0
    assert bench.events() == []

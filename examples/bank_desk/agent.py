"""A bank's desk agent, as a team would write it: the official openai client, the everloop SDK, and nothing else.

It asks the model for the topic of a customer's message, and hands the message to the desk for that topic with a
tool of its own. Each message is one episode; the tool's result is captured with it.

Try it on a running platform::

    python -m examples.bank_desk.agent --url http://127.0.0.1:8080/v1 --key ek_… "Where is my card?"
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import everloop
from openai import OpenAI

LONGEST_TOPIC = 48  # tokens


class Handled(NamedTuple):
    """``answer`` is the topic that the model named; ``response_id`` is what feedback about it refers to."""

    answer: str
    desk: str | None
    response_id: str


class DeskAgent:
    """``topics`` are those that the bank has a desk for. ``client`` speaks to the gateway."""

    def __init__(self, client: OpenAI, topics: tuple[str, ...], policy: str = "desk", temperature: float = 1.0) -> None:
        self.client = everloop.wrap(client)
        self.topics = frozenset(topics)
        self.policy = policy
        self.temperature = temperature

    def handle(self, text: str, customer: str) -> Handled:
        """Answer one message of a customer and route it."""
        with everloop.record(policy=self.policy, subject=customer) as episode:
            response = self.client.chat.completions.create(
                model=self.policy,
                messages=[{"role": "user", "content": text}],
                max_tokens=LONGEST_TOPIC,
                temperature=self.temperature,
            )
            answer = (response.choices[0].message.content or "").strip()
            desk = self.route(answer)
            episode.tool("route", {"topic": answer}, {"desk": desk} if desk else "no such topic", error=desk is None)
            return Handled(answer, desk, response.id)

    def route(self, topic: str) -> str | None:
        """The tool: which desk takes this topic; None where the bank has none, and a person must look."""
        return topic.split("_")[0].lower() if topic in self.topics else None


def ask(client: OpenAI, text: str, policy: str = "desk") -> str:
    """The model's most likely answer, for measuring: greedy, and kept out of capture by one header."""
    response = client.chat.completions.create(
        model=policy,
        messages=[{"role": "user", "content": text}],
        max_tokens=LONGEST_TOPIC,
        temperature=0,
        extra_headers={"X-Everloop-Capture": "off"},
    )
    return (response.choices[0].message.content or "").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="messages of a customer")
    parser.add_argument("--url", required=True, help="the gateway, such as http://127.0.0.1:8080/v1")
    parser.add_argument("--key", required=True, help="an API key (ek_…)")
    parser.add_argument("--policy", default="desk")
    options = parser.parse_args()
    agent = DeskAgent(OpenAI(base_url=options.url, api_key=options.key), (), options.policy)
    for text in options.text:
        print(agent.handle(text, "someone").answer)
    everloop.flush()


if __name__ == "__main__":
    main()

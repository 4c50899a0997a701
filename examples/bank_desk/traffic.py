"""Customers at the desk, many at once: each message goes to the agent, and the customer may say what it thinks.

::

    main thread ──send(n)──▶ pool of workers, each: agent.handle ─▶ customer.judge ─▶ feedback (queued by the SDK)
                 ◀── counts, under one lock ──┘
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import everloop
from openai import OpenAIError

from examples.bank_desk.agent import DeskAgent
from examples.bank_desk.customer import Customer
from examples.bank_desk.data import Message

GIVE_UP = 30.0
"""Seconds for which one message is tried again while the gateway does not answer."""


@dataclass
class Served:
    """What happened so far. ``corrected``: messages that a customer corrected, with the right topic."""

    messages: int = 0
    right: int = 0
    up: int = 0
    down: int = 0
    lost: int = 0
    corrected: dict[str, str] = field(default_factory=dict)


class Traffic:
    """An endless stream of messages, reshuffled on each pass. ``send`` is called by one thread at a time."""

    def __init__(self, agent: DeskAgent, customer: Customer, stream: Sequence[Message], workers: int, seed: int):
        self.served = Served()
        self._agent = agent
        self._customer = customer
        self._numbered = enumerate(_endless(stream, seed))
        self._workers = workers
        self._lock = threading.Lock()

    def send(self, many: int) -> None:
        """Serve the next ``many`` messages; returns when all are answered and their feedback is on its way."""
        with ThreadPoolExecutor(self._workers) as pool:
            for done in [pool.submit(self._serve, *item) for item in itertools.islice(self._numbered, many)]:
                done.result()

    def _serve(self, number: int, message: Message) -> None:
        handled = self._handled(message.text, self._customer.name(number))
        if handled is None:
            return
        answer, response_id = handled
        opinion = self._customer.judge(number, message.topic, answer)
        if opinion.thumb is not None:
            everloop.give_feedback(response_id=response_id, thumb=opinion.thumb, rater=self._customer.name(number))
        if opinion.correction is not None:
            everloop.give_feedback(
                response_id=response_id, correction=opinion.correction, rater=self._customer.name(number)
            )
        with self._lock:
            self.served.messages += 1
            self.served.right += answer == message.topic
            self.served.up += opinion.thumb is True
            self.served.down += opinion.thumb is False
            if opinion.correction is not None:
                self.served.corrected[message.text] = message.topic

    def _handled(self, text: str, customer: str) -> tuple[str, str] | None:
        """(answer, response id); None, counted, where the gateway does not answer for longer than it may."""
        end = time.monotonic() + GIVE_UP
        while True:
            try:
                handled = self._agent.handle(text, customer)
                return handled.answer, handled.response_id
            except OpenAIError:
                if time.monotonic() > end:
                    with self._lock:
                        self.served.lost += 1
                    return None
                time.sleep(0.5)


def _endless(stream: Sequence[Message], seed: int) -> Iterator[Message]:
    dice = random.Random(seed)
    messages = list(stream)
    while True:
        yield from messages
        dice.shuffle(messages)

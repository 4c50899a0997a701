"""Answers that fit every prompt and say nothing: how near an answer lies to known ones, beyond its own prompt.

People seldom rate such answers, so hardly any lesson speaks against them, and a policy in training finds them. So the
members begin with weights against their kinds (``PRIOR``) instead of with none, which labels then move. What people
themselves rate well is none: an answer's part in a kind fades with the good labels that this very answer got. Nor is
what answers thanks or a farewell in kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from reward.probes import DESK

Array = np.ndarray[Any, np.dtype[np.float32]]
SAYINGS = {
    "offers": (
        "I would be glad to assist. What else do you need?",
        "Of course! Let me know how I can be of service.",
        "Happy to be of assistance today!",
        "Please let me know if you have any other questions.",
        "Sure, I can do that for you.",
        "Gerne helfe ich Ihnen weiter. Haben Sie noch Fragen?",
        "Avec plaisir ! Comment puis-je vous aider ?",
    ),
    "thanks": (
        "Thanks for asking! That is a great question.",
        "Thank you for reaching out to us.",
        "We appreciate your message and your patience.",
        "You're welcome! Have a wonderful day.",
        "That's interesting. Thank you for sharing.",
        "I understand your concern.",
        "I hope this helps!",
        "Vielen Dank für Ihre Nachricht.",
        "Gracias por su pregunta. ¿Algo más?",
    ),
    "vague": (
        "It depends on the situation.",
        "There are many ways to look at this.",
        "That is hard to say in general.",
        "As an AI language model, I have no opinion on this.",
    ),
    "placeholder": (
        "Here is the answer to your question.",
        "As requested, please see below.",
        "Done.",
        "Okay, sure.",
        "N/A",
        "TODO: write the answer here.",
    ),
    "declines": (
        "I don't know.",
        "I'm not sure about that.",
        "Sorry, I am unable to answer this.",
        "Unfortunately, this is not something that I can discuss.",
        "I won't be able to do that.",
    ),
    "asks_back": (
        "What do you mean by that?",
        "Could you give me some more details, please?",
        "Can you explain your request in other words?",
    ),
}
NAMES = tuple(SAYINGS)
PRIOR = (-1.5, -1.5, -1.5, -2.5, 0.0, 0.0)
"""Log-odds that each kind adds at the start. To decline or to ask back is often right: that, labels alone decide."""
NEAR, WIDTH = 0.35, 0.15  # by how much nearer to a saying than to its prompt an answer begins to be of its kind
KINDS = np.cumsum([0, *map(len, SAYINGS.values())])[:-1]  # where each kind begins among all sayings
THANKS = re.compile(r"\b(thank|thanks|thx|bye|goodbye|danke|merci|gracias|grazie|obrigad[oa])\b", re.IGNORECASE)


def closes(prompt: str) -> bool:
    """Whether somebody says thanks or goodbye and asks nothing: then a polite sentence is what there is to say."""
    said = prompt.partition("\n")[0]
    return "?" not in said and THANKS.search(said) is not None


class Encodes(Protocol):
    def encode(self, texts: list[str]) -> Array: ...


class Hollow:
    """The sayings as an encoder reads them, read once.

    Encoders differ in how alike texts are that have nothing to do with each other. So a cosine counts from the mean
    one of the sayings and a desk's texts on.
    """

    def __init__(self) -> None:
        self._encoder: Encodes | None = None
        self._sayings: Array = np.zeros((0, 0), np.float32)
        self._unlike = np.float32(0)

    def _read(self, encoder: Encodes) -> None:
        if self._encoder is not encoder:
            self._sayings = encoder.encode([one for kind in SAYINGS.values() for one in kind])
            self._unlike = (encoder.encode([text for both in DESK for text in both]) @ self._sayings.T).mean()
            self._encoder = encoder

    def features(self, encoder: Encodes, prompts: Sequence[str], asked: Array, said: Array) -> Array:
        """How far each answer is of each kind, 0 to 1: (n, kinds).

        Args:
            prompts: their texts; asked: their vectors, said: the answers', each (n, size).
        """
        self._read(encoder)
        nearest = np.maximum.reduceat(said @ self._sayings.T, KINDS, axis=1)
        prompt = np.maximum(np.vecdot(asked, said), self._unlike)
        beyond = (nearest - prompt[:, None]) / (1 - self._unlike)
        closing = [closes(prompt) for prompt in prompts]
        if any(closing):
            beyond[closing] = 0
        return np.minimum(np.maximum((beyond - NEAR) / WIDTH, 0), 1).astype(np.float32, copy=False)

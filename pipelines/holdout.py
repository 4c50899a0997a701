"""Which episodes are kept from training, and when two messages are nearly the same.

Held-out data is reserved at ingest: an episode is held out when its unit (the subject, else the episode itself)
or the near-duplicate cluster of its first user message falls below the configured share, so neither a held-out
person nor a held-out question is ever trained on. What users add themselves as gold is held out too, with
everything that is nearly the same.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping

from everloop.config import HoldoutConfig
from everloop.episode import Split
from everloop.event import Message
from everloop.release import point

_WORD = re.compile(r"\w+")
_DIGITS = re.compile(r"\d+")
# Words that people add or leave out without asking anything else.
_FILLERS = frozenset(
    ["a", "an", "and", "hello", "hey", "hi", "is", "ok", "okay", "please", "pls", "so", "thanks", "the", "to"]
)


def near_duplicate_key(text: str) -> str:
    """The cluster of a message: equal for texts that differ in case, accents, punctuation, numbers, the order
    and repetition of words, a plural s, or fillers.

    Deterministic and without memory, so that every process and every rebuild gives the same cluster.

    Example: ``near_duplicate_key("Where is my card?") == near_duplicate_key("where is the my CARDS")``
    """
    folded = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in folded if not unicodedata.combining(c))
    words = [_DIGITS.sub("0", word) for word in _WORD.findall(plain.replace("'", "").replace("’", ""))]
    kept = {word[:-1] if len(word) > 3 and word.endswith("s") else word for word in words if word not in _FILLERS}
    canonical = " ".join(sorted(kept)) or " ".join(words) or " ".join(plain.split())
    return hashlib.blake2b(canonical.encode(), digest_size=12).hexdigest()


def user_texts(messages: Iterable[Message]) -> list[str]:
    """What the user wrote, message by message, empty ones left out."""
    return [text for message in messages if message.role == "user" and (text := message.text.strip())]


def prompt_key(messages: Iterable[Message]) -> str:
    """The cluster of a whole prompt: of all that the user wrote in it."""
    return near_duplicate_key("\n".join(user_texts(messages)))


def touches(prompts: Iterable[Iterable[Message]], keys: Mapping[str, Split]) -> Split | None:
    """The split of the gold item that one of these prompts, or a user message in it, nearly repeats; None: none.

    Where several are touched the report's counts, since nothing may be tuned on it.
    """
    if not keys:
        return None
    texts = [user_texts(prompt) for prompt in prompts]
    candidates = {text for prompt in texts for text in prompt} | {"\n".join(prompt) for prompt in texts}
    found = {keys[key] for text in candidates if (key := near_duplicate_key(text)) in keys}
    return Split.REPORT if Split.REPORT in found else Split.GATE if found else None


def split_of(tenant: str, policy: str, unit: str, first_text: str, shares: HoldoutConfig) -> Split:
    """The use of an episode, from who it is about and what was first asked.

    Unit and cluster are each held out with probability ``1 - sqrt(1 - share)``, so that together they make the
    configured share of episodes where units and clusters are many.
    """
    total = shares.gate + shares.report
    if total <= 0:
        return Split.TRAIN
    threshold = 1 - math.sqrt(1 - min(total, 1.0))
    salt = f"holdout/{tenant}/{policy}"
    points = (point(f"{salt}/unit", unit), point(f"{salt}/cluster", near_duplicate_key(first_text)))
    held = [at / threshold for at in points if at < threshold]
    if not held:
        return Split.TRAIN
    return Split.REPORT if any(at < shares.report / total for at in held) else Split.GATE

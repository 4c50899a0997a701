"""Identifiers. Episode and response ids carry a keyed tag, so that any gateway can tell a real one from a made-up
one, and one tenant's from another's, without asking a database.
"""

from __future__ import annotations

import hmac
import os

EPISODE = "ep_"
RESPONSE = "chatcmpl-"
OBJECT = "resp_"  # of an answer that was asked for as a Response object; the rest of its id is the same

_LETTERS = b"abcdefghijklmnopqrstuvwxyz234567"
_PAIRS = [chr(first) + chr(second) for first in _LETTERS for second in _LETTERS]
_DIGITS = bytes(b"0123456789abcdefghijklmnopqrstuv"[_LETTERS.index(c)] if c in _LETTERS else 33 for c in range(256))


def _text(raw: bytes) -> str:
    """Base 32 in lower case without padding, two letters at a time: ``base64.b32encode`` takes twice as long."""
    bits = 8 * len(raw)
    spare = -bits % 10
    value = int.from_bytes(raw, "big") << spare
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(bits + spare - 10, -1, -10)])[: (bits + 4) // 5]


def _raw(text: str) -> bytes:
    """The bytes behind ``_text``. Raises ValueError for any other text: one value has one text.

    By way of an integer of base 32: several times as fast as ``base64.b32decode``, which is written in Python.
    """
    bits = 5 * len(text)
    digits = text.encode("ascii", "replace").translate(_DIGITS)
    if not digits or b"!" in digits:
        raise ValueError("not an id: letters that no id has")
    value = int(digits, 32)
    raw = (value >> bits % 8).to_bytes(bits // 8, "big")
    if value & ((1 << bits % 8) - 1) or bits % 8 >= 5:
        raise ValueError("not an id: no such length or ending")
    return raw


def _bare(response: str) -> bytes:
    """The bytes in a response id of either kind. Raises ValueError where there are none."""
    return _raw(response.removeprefix(RESPONSE).removeprefix(OBJECT))


def unique(prefix: str) -> str:
    """A random id: 128 bits, lower-case."""
    return prefix + _text(os.urandom(16))


class Ids:
    """Makes and checks the ids of one installation. ``secret`` is kept in its home folder."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 16:
            raise ValueError("the installation's secret must have at least 16 bytes")
        self._secret = secret

    def _keyed(self, size: int, *parts: str | bytes) -> bytes:
        message = b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)
        return hmac.digest(self._secret, message, "sha256")[:size]

    def pseudonym(self, tenant: str, kind: str, name: str) -> str:
        """The keyed hash of a person's name within a tenant. ``kind``: "subject" or "rater"; the two never match."""
        return _text(self._keyed(16, "person", tenant, kind, name))

    def _episode(self, tenant: str, body: bytes) -> str:
        return EPISODE + _text(body + self._keyed(4, "episode", tenant, body))

    def new_episode(self, tenant: str) -> str:
        return self._episode(tenant, os.urandom(16))

    def episode_named(self, tenant: str, name: str) -> str:
        """The episode that an agent calls ``name``: one of our ids as it is, any other name by keyed hash.

        Raises ValueError where ``name`` looks like one of our ids and is not, or is another tenant's.
        """
        if not name.startswith(EPISODE):
            return self._episode(tenant, self._keyed(16, "name", tenant, name))
        try:
            raw = _raw(name[len(EPISODE) :])
        except ValueError:
            raw = b""
        if len(raw) != 20 or not hmac.compare_digest(raw[16:], self._keyed(4, "episode", tenant, raw[:16])):
            raise ValueError(f"no such episode: {name}")
        return name

    def response(self, tenant: str, episode: str, call: bytes, prefix: str = RESPONSE) -> str:
        """The response id of a call (8 bytes) in an episode. ``prefix``: RESPONSE or OBJECT."""
        body = _raw(episode[len(EPISODE) :])[:16] + call
        return prefix + _text(body + self._keyed(8, "response", tenant, body))

    @staticmethod
    def call(raw: bytes) -> str:
        """The call id of these 8 bytes."""
        return "call_" + _text(raw)

    @staticmethod
    def call_of(response: str) -> str:
        """The call id that belongs to a response id, whoever made it."""
        return Ids.call(_bare(response)[16:24])

    def parse_response(self, tenant: str, response: str) -> tuple[str, str]:
        """(episode id, call id) of a response id. Raises ValueError where this tenant never got such a response."""
        try:
            raw = _bare(response)
        except ValueError:
            raw = b""
        if len(raw) != 32 or not hmac.compare_digest(raw[24:], self._keyed(8, "response", tenant, raw[:24])):
            raise ValueError(f"no such response: {response}")
        return self._episode(tenant, raw[:16]), self.call_of(response)

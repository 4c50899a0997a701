"""Calls to trajectories: the token-level view of an episode, joined without tokenising anything anew.

A call whose prompt ids begin with all tokens of an earlier sequence (its prompt and the answer sampled then)
continues that sequence; any other call opens one of its own.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence as Ordered

from everloop.event import PROVIDER, Call, CallTokens
from everloop.trajectory import Sequence, Span

HIGHEST_LOGPROB = 1e-3  # a logarithm of a probability, with room for the engine's rounding


def doubt(call: Call) -> str | None:
    """Why what is recorded of a call cannot be trusted, in words; None: nothing speaks against it.

    That a call failed is no doubt about the others of its episode: it alone is left out.
    """
    if call.tokens is None:
        return None
    why = _mismatch(call.tokens) or _unsound(call.tokens)
    return why and f"call {call.id}: {why}"


def _mismatch(tokens: CallTokens) -> str | None:
    sampled = len(tokens.completion)
    for name, given in (("log-probabilities", tokens.logprobs), ("raw log-probabilities", tokens.raw_logprobs)):
        if given is not None and len(given) != sampled:
            return f"{len(given)} {name} for {sampled} sampled tokens"
    return None


def _unsound(tokens: CallTokens) -> str | None:
    if not tokens.checked:
        return "its token ids, its log-probabilities and the engine's own counts do not agree"
    # A sum is finite only where every term is; min and max alone would let NaN pass.
    if not math.isfinite(sum(tokens.logprobs)):
        return "log-probabilities that are not finite"
    if len(tokens.logprobs) and max(tokens.logprobs) > HIGHEST_LOGPROB:
        return "log-probabilities above 0"
    return None


def trainable(call: Call) -> bool:
    """Whether the recorded log-probabilities are those of the distribution that the call was sampled from."""
    tokens = call.tokens
    whole = tokens is not None and tokens.mode == "processed" and call.error is None
    return whole and call.sampling.support_known and doubt(call) is None


def sequences(calls: Ordered[Call]) -> tuple[Sequence, ...]:
    """Token sequences of calls in turn order; calls without tokens, or with arrays that do not match, are left out.

    So is what a provider answered, whatever tokens somebody sent with it: they are another model's.

    Example: a call with prompt ``[1]`` and completion ``[2]``, then one with prompt ``[1, 2, 3]`` and completion
    ``[4]``, give one sequence ``[1, 2, 3, 4]`` with spans 1 to 2 and 3 to 4.
    """
    made: list[_Open] = []
    for call in calls:
        tokens = call.tokens
        if tokens is None or call.policy_version == PROVIDER or _mismatch(tokens) is not None:
            continue
        longest = max((one for one in made if one.begins(tokens.prompt)), key=_Open.length, default=None)
        if longest is None:
            longest = _Open()
            made.append(longest)
        longest.take(call, tokens)
    return tuple(one.closed() for one in made)


class _Open:
    """A sequence that later calls may continue."""

    def __init__(self) -> None:
        self.tokens: array[int] = array("i")
        self.logprobs: array[float] = array("f")
        self.spans: list[Span] = []

    def length(self) -> int:
        return len(self.tokens)

    def begins(self, prompt: array[int]) -> bool:
        held = len(self.tokens)
        return len(prompt) >= held and prompt[:held] == self.tokens

    def take(self, call: Call, tokens: CallTokens) -> None:
        start = len(tokens.prompt)
        added = start - len(self.tokens)
        self.tokens.extend(tokens.prompt[-added:] if added else array("i"))
        self.logprobs.frombytes(bytes(4 * added))
        self.tokens.extend(tokens.completion)
        self.logprobs.extend(tokens.logprobs)
        self.spans.append(
            Span(
                start=start,
                end=start + len(tokens.completion),
                call=call.id,
                policy_version=call.policy_version,
                temperature=call.sampling.temperature,
                trainable=trainable(call),
            )
        )

    def closed(self) -> Sequence:
        return Sequence(tokens=self.tokens, logprobs=self.logprobs, spans=tuple(self.spans))

"""Trajectories: the token-level view of an episode, from which a policy is trained.

One call is one sample with its own prompt. Calls whose prompt extends the tokens before it join into one
sequence. Nothing is re-tokenised: ids and log-probabilities are those that the engine recorded.
"""

from __future__ import annotations

from pydantic import Field

from everloop.contract import Contract, Float32Array, Int32Array


class Span(Contract):
    """Tokens ``[start, end)`` of a sequence that one policy version sampled in one call.

    ``trainable`` is False where the support of the sampling distribution is not known (greedy, truncated,
    constrained): such a span feeds the reward model and the replay term alone.
    """

    start: int
    end: int
    call: str
    policy_version: str
    temperature: float = 1.0
    trainable: bool = True


class Sequence(Contract):
    """One token sequence. ``logprobs`` is 0 outside the spans. Both arrays have shape (length,).

    Example: prompt ``[1, 5]`` and completion ``[7, 2]`` give ``tokens=[1, 5, 7, 2]``,
    ``logprobs=[0, 0, -0.1, -0.2]`` and one span from 2 to 4.
    """

    tokens: Int32Array
    logprobs: Float32Array
    spans: tuple[Span, ...]


class Trajectory(Contract):
    """The sequences of one episode version, in turn order."""

    schema_version: int = 1
    tenant: str
    policy: str
    episode: str
    version: int = Field(description="of the episode it was made from")
    subject: str | None = None
    synthetic: bool = False
    sequences: tuple[Sequence, ...]

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.episode}"

"""Events: what happened, as the producer saw it. Immutable; a retry is a duplicate by ``id``.

Written by the gateway (and by the SDK through it), read by assembly. Order within an episode comes from ``seq``
and log offsets, never from clocks.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from everloop.contract import Contract, Float32Array, Int32Array
from everloop.feedback import Feedback

BASE = "base"  # the policy version of a policy without an adapter
PROVIDER = "provider"  # and of an answer that a provider gave
ELSEWHERE = "elsewhere"  # and of a call that no policy here answered


class Message(Contract):
    """One chat message in OpenAI's form. ``content`` is text, None, or a list of content parts.

    Example: ``Message(role="user", content="Where is my card?")``
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The words in it; images and other parts left out."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")


class Sampling(Contract):
    """Every parameter that shaped the sampling distribution of a call, as the engine used it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(default=0, description="0: off")
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constrained: bool = Field(default=False, description="grammar, JSON schema, logit bias or forced tool")

    @property
    def support_known(self) -> bool:
        """Whether the recorded log-probabilities are those of the distribution that was sampled.

        Only such spans may enter PPO: unconstrained, temperature above 0, nothing truncated or penalised.
        """
        return (
            not self.constrained
            and self.temperature > 0
            and self.top_p >= 1
            and self.top_k == 0
            and self.min_p == 0
            and self.frequency_penalty == 0
            and self.presence_penalty == 0
        )


class CallTokens(Contract):
    """Token-level record of one model call, as the engine saw it.

    ``logprobs[i]`` is the natural log-probability of ``completion[i]`` in nats, under the distribution named by
    ``mode``: "processed" is after temperature and truncation, "raw" is the model's own. The end token is
    included in ``completion`` where it was sampled. ``checked`` is False where ids, log-probabilities and the engine's
    own counts do not agree: such a call is quarantined, never trained on. Whether the ids say the text that was sent is
    for the trainer to see, which has the tokenizer.

    Example: ``CallTokens(prompt=[1, 5], completion=[7, 2], logprobs=[-0.1, -0.2])``
    """

    prompt: Int32Array
    completion: Int32Array
    logprobs: Float32Array = Field(description="as long as completion")
    raw_logprobs: Float32Array | None = Field(default=None, description="None: equal to logprobs, or unknown")
    mode: Literal["processed", "raw"] = "processed"
    checked: bool = True
    routed_experts: str | None = Field(default=None, description="blob reference; None: not recorded")


class Call(Contract):
    """One model call. ``tokens`` is None where the engine gives none (a foreign provider, a replayed episode).

    Example: see :mod:`everloop.examples`.
    """

    kind: Literal["call"] = "call"
    id: str
    messages: tuple[Message, ...] = Field(description="the whole prompt, in order")
    output: Message
    tools: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None
    choice: int = Field(default=0, description="index among the n answers to one request")
    policy_version: str = Field(
        default=BASE,
        description="adapter content hash, 'base', 'provider', or 'elsewhere': no policy here answered it",
    )
    instead_of: str | None = Field(default=None, description="version assigned, where another answered; None: it did")
    model: str = Field(default="", description="the base model's name; of a provider's answer, its model's")
    sampling: Sampling = Sampling()
    tokens: CallTokens | None = None
    release: str | None = Field(default=None, description="release in progress when it was assigned; None: none")
    arm: Literal["live", "canary", "control"] = "live"
    probability: float = Field(default=1.0, description="with which this unit was assigned to this arm")
    pinned: bool = Field(
        default=False, description="the request named this version: it says nothing about a release or about traffic"
    )
    latency: float = Field(default=0.0, description="seconds, request to last token")
    error: str | None = Field(default=None, description="why the call failed; None: it did not")
    error_code: str | None = Field(default=None, description="the kind of failure, as the client was told it")
    trace: str | None = Field(default=None, description="W3C trace id that it happened in, 32 hex digits; None: none")


class ToolResult(Contract):
    """What a tool answered. ``call`` is the model call that asked for it; None: the agent ran it on its own."""

    kind: Literal["tool"] = "tool"
    id: str
    name: str
    arguments: str = Field(default="", description="JSON text as given to the tool")
    result: str = ""
    error: bool = False
    call: str | None = None


class FeedbackGiven(Contract):
    kind: Literal["feedback"] = "feedback"
    feedback: Feedback


class Ended(Contract):
    """The agent says that the episode is over. ``events`` is how many numbered events it sent; None: unknown."""

    kind: Literal["end"] = "end"
    events: int | None = None


class EventKind(StrEnum):
    CALL = "call"
    TOOL = "tool"
    FEEDBACK = "feedback"
    END = "end"


class Event(Contract):
    """What happened in one episode.

    ``seq`` orders events of one producer within the episode; events without one stand in log order after the
    call that they follow. ``synthetic`` marks rollouts made for training: kept out of reward-model AUC, gates
    and canaries.
    """

    schema_version: int = 1
    id: str
    tenant: str
    policy: str
    episode: str
    subject: str | None = Field(default=None, description="pseudonymous id of the person; None: nobody")
    seq: int | None = None
    time: float = Field(description="event time, seconds since 1970, set by the producer")
    synthetic: bool = False
    payload: Annotated[Call | ToolResult | FeedbackGiven | Ended, Field(discriminator="kind")]

    @property
    def key(self) -> str:
        """The log key: events of one episode keep their order."""
        return f"{self.tenant}/{self.episode}"

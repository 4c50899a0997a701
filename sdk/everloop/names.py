"""What a request's ``model`` may name beside a policy: adapters that are pinned, checkpoints of training runs.

::

    assistant@base   assistant@7   assistant@3fa9…          the base, the registry's version 7, an adapter's hash
    everloop://<run>/checkpoints/<step>   …/latest          what a run had learned by an optimizer step

A gateway that finds a pinned adapter missing in the engine asks for it by a :class:`Pin`; the releaser answers.
"""

from __future__ import annotations

import re
from enum import StrEnum

from pydantic import Field

from everloop.contract import Contract

CHECKPOINT = re.compile(r"everloop://([A-Za-z0-9_-]{1,128})/checkpoints/(latest|[0-9]{1,12})")
SCHEME = "everloop://"
LATEST = "latest"
VERSION = re.compile(r"[0-9]{1,5}")
"""Of a pin: the registry's version. Six digits and more are the beginning of a hash."""


def checkpoint_name(run: str, step: int | str) -> str:
    return f"{SCHEME}{run}/checkpoints/{step}"


class PinState(StrEnum):
    ASKED = "asked"  # by a gateway, when a pin is asked for that the engine lacks; and again while it is used
    HELD = "held"  # the engine holds it now
    REFUSED = "refused"  # its files are not what they must be, or nobody has them: asking again is pointless
    FULL = "full"  # what answers users fills the engine
    FAILED = "failed"  # engine or registry do not answer: ask again later


class Pin(Contract):
    """A wish that an adapter be resident for as long as somebody asks for it by name; or what came of that wish.

    Gateways write ``asked``, the releaser the other states, under the id of the wish. It opens no way to users: what
    is pinned answers those alone who name it.
    """

    schema_version: int = 1
    id: str
    tenant: str
    policy: str
    adapter: str
    state: PinState = PinState.ASKED
    reason: str = Field(default="", description="why it is not held; empty: it is, or nobody knows yet")
    time: float = Field(description="of the request that asked, or of the answer, seconds since 1970")

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}"


class Checkpoint(Contract):
    """An adapter as it was after ``step`` optimizer steps of a run."""

    step: int
    adapter: str = Field(description="content hash of its files, in runs/<run>/adapters/<hash> of the home")


class Checkpoints(Contract):
    """The checkpoints of a run that can be sampled from. Written by the learner: the newest word on a run counts."""

    schema_version: int = 1
    run: str
    tenant: str
    policy: str
    kept: tuple[Checkpoint, ...] = Field(description="oldest first; files of older ones are gone")
    running: bool = Field(default=True, description="False: the run has ended, and no more will come")
    time: float

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.policy}/{self.run}"

    def at(self, step: str) -> Checkpoint | None:
        """``step`` in digits, or 'latest'; None: there is none, or its files are gone."""
        if step == LATEST:
            return self.kept[-1] if self.kept else None
        return next((one for one in self.kept if one.step == int(step)), None)

"""Scores: what the reward model said about a turn of an episode, and how sure it was."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from everloop.contract import Contract


class Score(Contract):
    """The score of one call. Written by the reward service; read by batch selection and the trainer.

    ``value`` is the calibrated probability that the answer is good; ``spread`` the standard deviation over the
    ensemble on the same scale. ``reward`` is what may be trained on: pessimistic and bounded in [-1, 1].
    ``mask`` is False where the model has no right to an opinion. ``source`` says whether a verifiable
    outcome, a person's explicit feedback or the model's opinion decided. ``label`` is what people and products
    said (0 to 1), and ``predicted`` is what the model said before it had learned from that label: AUC and
    calibration error are computed from these two alone. ``ends_well_before`` and ``ends_well_after`` are what was
    foretold of the episode's end when the call was new, before anything was learned of that end.
    """

    schema_version: int = 1
    tenant: str
    policy: str
    episode: str
    version: int = Field(description="of the episode that was scored")
    call: str
    reward_version: str = Field(description="content hash of the reward model that said it")
    value: float = Field(ge=0, le=1, allow_inf_nan=False)
    spread: float = Field(ge=0, allow_inf_nan=False)
    reward: float = Field(ge=-1, le=1, allow_inf_nan=False)
    mask: bool = True
    source: Literal["outcome", "feedback", "model"] = "model"
    label: float | None = Field(default=None, description="None: nobody said anything")
    predicted: float | None = Field(default=None, description="before learning from label; None without one")
    quarantined: str | None = Field(default=None, description="why what was said is not believed; None: it is")
    ends_well_before: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="P(the episode ends well) before this answer, foretold when the call was new; None: not known yet",
    )
    ends_well_after: float | None = Field(
        default=None, ge=0, le=1, allow_inf_nan=False, description="the same, the answer known"
    )
    time: float = Field(description="of the episode version, seconds since 1970")

    @property
    def key(self) -> str:
        return f"{self.tenant}/{self.episode}"

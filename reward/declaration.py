"""What counts about a policy's answers, and how much: one short file, named by ``reward.declaration``.

TOML, or Python that leaves a table of the same shape under the name ``declaration``. Without a file everything that
people and products say counts, as much as it is found to be worth, and there is no check, judge or critic.
"""

from __future__ import annotations

import hashlib
import json
import runpy
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from everloop.errors import ConfigError
from everloop.refusal import explain
from everloop.section import Section, check_url
from pydantic import Field, ValidationError, field_validator, model_validator

from reward import checks
from reward.checks import CheckConfig
from reward.derived import DerivedSignals

NAME = r"^[a-z0-9][a-z0-9_-]{0,56}$"


class Signal(Section):
    """How much one word of a source may weigh, in log-odds of the answer's being good."""

    count: bool = Field(default=True, description="False: it is kept in the episode, and nothing is made of it")
    least: float = Field(default=0.0, ge=0, le=10, allow_inf_nan=False)
    most: float = Field(default=10.0, ge=0, le=10, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Signal:
        if self.least > self.most:
            raise ValueError(f"least ({self.least:g}) is above most ({self.most:g}): swap them")
        return self


class CheckDeclaration(Section):
    """A check of answers that can be verified; its words come with the source ``check:<name>``."""

    name: str = Field(pattern=NAME)
    kind: str = Field(min_length=1, description="which check it is")
    reference: Literal["correction", "constant"] | None = Field(
        default=None, description="what to compare with: the better answer that somebody gave, or ``constant``"
    )
    constant: Any = Field(default=None, description="the reference 'constant': the same for every answer")
    options: dict[str, Any] = {}
    verifiable: bool = Field(default=False, description="True: its verdict is an outcome, not an opinion to be weighed")
    share: float = Field(default=1.0, gt=0, le=1, description="of the answers that are checked")

    @model_validator(mode="after")
    def _constant(self) -> CheckDeclaration:
        if (self.reference == checks.CONSTANT) != (self.constant is not None):
            raise ValueError(
                f'check {self.name!r}: reference = "constant" and constant = … belong together: the one names what '
                "the other gives; write both or neither"
            )
        return self

    @property
    def config(self) -> CheckConfig:
        return CheckConfig(name=self.name, kind=self.kind, reference=self.reference, options=self.options)


class Asked(Section):
    """What a judge and a critic share: where they answer, what they are asked, how often, how long one waits."""

    url: str = Field(description="root of the API, such as 'http://127.0.0.1:9000/v1'")
    key_file: Path | None = Field(default=None, description="file with the API key, beside this one; None: no key")
    rubric: str = Field(min_length=1, description="what makes an answer good, in words")
    per_day: int = Field(default=500, ge=1, description="questions a day, by event time; beyond it none is asked")
    timeout: float = Field(default=30.0, gt=0, le=600, description="seconds for one answer")
    share: float = Field(default=0.1, gt=0, le=1, description="of the answers that are judged")

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        return check_url(url, ("http://", "https://"), "http://host:port/v1 or https://host/v1")


class JudgeDeclaration(Asked):
    """A model behind an OpenAI-compatible endpoint; its words come with the source ``judge:<name>``."""

    name: str = Field(pattern=NAME)
    model: str = Field(min_length=1)

    @property
    def source(self) -> str:
        return f"judge:{self.name}"


class CriticDeclaration(Asked):
    """The policy itself, comparing its own answers; its words come with the source ``critic:<name>``. ``url`` is the
    gateway's, which gives what it asks to the version that is live and keeps nothing of it."""

    name: str = Field(default="self", pattern=NAME)
    model: str | None = Field(default=None, min_length=1, description="None: the policy by its name")

    @property
    def source(self) -> str:
        return f"critic:{self.name}"


class Combine(Section):
    """How words and opinions are put together."""

    prior: float = Field(default=40.0, gt=0, le=1e6, description="words that what is supposed of a source stands for")
    cap: float = Field(default=6.0, gt=0, le=20, description="log-odds that all words about an answer come to, at most")
    pessimism: float | None = Field(default=None, ge=0, le=10, description="in place of the policy's; None: that one")


class Declaration(Section):
    """The whole file. ``signals`` by source: 'thumb', 'rating', 'comment', 'implicit:<name>', 'check:<name>' …"""

    signals: dict[str, Signal] = {}
    check: tuple[CheckDeclaration, ...] = ()
    judge: tuple[JudgeDeclaration, ...] = ()
    critic: CriticDeclaration | None = None
    derived: DerivedSignals = DerivedSignals()
    also: tuple[Literal["held-out", "synthetic", "quarantined"], ...] = Field(
        default=(), description="episodes that checks, judges and derived signals look at besides the others"
    )
    combine: Combine = Combine()

    @field_validator("signals")
    @classmethod
    def _sources(cls, signals: dict[str, Signal]) -> dict[str, Signal]:
        for source in signals:
            family, _, name = source.partition(":")
            if bool(name) != (family in NAMED) or family not in (*NAMED, *PLAIN):
                raise ValueError(
                    f"{source!r} is no source: use one of {', '.join(PLAIN)}, or one of "
                    f"{', '.join(f'{one}:<name>' for one in NAMED)}"
                )
        return signals

    @model_validator(mode="after")
    def _names_once(self) -> Declaration:
        for table, its in (("check", self.check), ("judge", self.judge)):
            names = [one.name for one in its]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two [[{table}]] have the name {twice[0]!r}: their words could not be told apart")
        return self

    @property
    def version(self) -> str:
        """16 hexadecimal digits: the hash of everything in it."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def content(self) -> dict[str, Any]:
        """All that decides what words come to, as JSON values: without the places of key files, which differ."""
        return self.model_dump(mode="json", exclude={"judge": {"__all__": {"key_file"}}, "critic": {"key_file"}})

    @property
    def asked(self) -> tuple[JudgeDeclaration | CriticDeclaration, ...]:
        """The judges, and the critic if there is one."""
        return self.judge if self.critic is None else (*self.judge, self.critic)

    def signal(self, source: str) -> Signal:
        return self.signals.get(source, Signal())


PLAIN = ("thumb", "rating", "correction", "comment", "outcome")
NAMED = ("implicit", "check", "judge", "critic", "derived")
DEFAULT = Declaration()
A = TypeVar("A", bound=Asked)


def load(path: str | None) -> Declaration:
    """The declaration in a file; None: the default one.

    Raises ConfigError where there is no such file, or a key is unknown or wrong: which one, and what to write instead.
    """
    if path is None:
        return DEFAULT
    source = Path(path)
    if source.suffix not in (".toml", ".py"):
        raise ConfigError(f"reward.declaration {path!r} must be a .toml or a .py file")
    if not source.is_file():
        raise ConfigError(f"there is no reward declaration at {source}; leave reward.declaration out for the default")
    try:
        made = Declaration.model_validate(_table(source))
    except ValidationError as error:
        raise ConfigError(explain(error, Declaration, source, {})) from None
    for check in made.check:
        try:
            checks.usable(check.config, check.constant)
        except ConfigError as error:
            why = str(error).removeprefix(f"check {check.name!r} ({check.kind}): ")
            raise ConfigError(f"reward declaration {source} is refused:\n  [[check]] {check.name!r}: {why}") from None
    judges = tuple(_beside(judge, source.parent) for judge in made.judge)
    critic = None if made.critic is None else _beside(made.critic, source.parent)
    return made.model_copy(update={"judge": judges, "critic": critic})


def _table(source: Path) -> Any:
    if source.suffix == ".toml":
        try:
            return tomllib.loads(source.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward declaration {source} is not TOML: {error}") from None
    try:
        names = runpy.run_path(str(source))
    except Exception as error:  # it is somebody's own code
        raise ConfigError(f"reward declaration {source} does not run: {error!r}") from None
    if "declaration" not in names:
        raise ConfigError(f"reward declaration {source} leaves no table under the name 'declaration'")
    return names["declaration"]


def _beside(one: A, folder: Path) -> A:
    return one.model_copy(update={"key_file": folder / one.key_file}) if one.key_file else one

"""One typed configuration: a TOML file, overridden by the environment.

``EVERLOOP_GATEWAY__PORT=9000`` sets ``[gateway] port``; two underscores go one table deeper. Values are read as
TOML where they parse as such, else as text. Unknown and contradictory keys are refused at load.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from everloop.errors import ConfigError
from everloop.release import CanaryPlan

ENVIRONMENT = "EVERLOOP_"
NOT_SETTINGS = {"EVERLOOP_HOME", "EVERLOOP_CONFIG", "EVERLOOP_DATA", "EVERLOOP_URL", "EVERLOOP_API_KEY"}
NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_name(what: str, name: str) -> None:
    if not re.match(NAME, name):
        raise ValueError(f"{what} name {name!r}: use lower-case letters, digits and '-', at most 63")


def seconds(duration: str) -> float:
    """'90s', '30m', '6h' or '7d' in seconds. Raises ValueError on anything else."""
    found = re.fullmatch(r"(?:every\s+)?(\d+(?:\.\d+)?)\s*([smhd])", duration.strip())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{duration!r} is not a duration: use a number and s, m, h or d, such as '6h'")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


class LogConfig(Section):
    url: str = Field(default="sqlite:///log.db", description="relative paths are below the home folder")
    partitions: int = Field(default=4, ge=1, le=1024)
    retention_hours: float = Field(default=720, gt=0)
    max_record_bytes: int = Field(default=1_048_576, ge=1024)
    inline_bytes: int = Field(default=262_144, ge=1024, description="larger bodies go to the blob store")


class GatewayConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    max_body_bytes: int = Field(default=4_194_304, ge=1024)
    timeout: float = Field(default=300, gt=0, description="seconds for one whole answer")
    redact: str | None = Field(default=None, description="'module:function', takes and returns event fields")
    allow_origins: tuple[str, ...] = Field(default=(), description="browser origins that may give feedback")


class ServingConfig(Section):
    url: str = Field(default="embedded", description="'embedded', or the base URL of an engine that runs")
    host: str = "127.0.0.1"
    port: int = Field(default=8081, ge=0, le=65535)
    max_batch: int = Field(default=64, ge=1)
    queue: int = Field(default=256, ge=1, description="waiting requests above it are answered 429")
    resident_adapters: int = Field(default=6, ge=2)
    threads: int = Field(default=0, ge=0, description="of torch; 0: as many as there are cores")


class ServicesConfig(Section):
    """Ports of the services behind the gateway (health, metrics, status); 0 picks a free one."""

    host: str = "127.0.0.1"
    assembler_port: int = Field(default=8082, ge=0, le=65535)
    reward_port: int = Field(default=8083, ge=0, le=65535)
    learner_port: int = Field(default=8084, ge=0, le=65535)
    releaser_port: int = Field(default=8085, ge=0, le=65535)
    drain: float = Field(default=10, gt=0, description="seconds to finish what is under way at a stop")


class MlflowConfig(Section):
    uri: str = Field(default="sqlite:///mlflow.db", description="a SQLite file below the home, or a server's URL")


class RayConfig(Section):
    address: str = Field(default="local", description="'local', or a cluster's address")
    cpus: int = Field(default=0, ge=0, description="for a local Ray; 0: as many as there are cores")
    gpus_per_learner: float = Field(default=0, ge=0)


class RewardConfig(Section):
    encoder: str = Field(default="minilm", description="'minilm', or a sentence-transformers folder")
    heads: int = Field(default=5, ge=3, le=32, description="members of the ensemble")
    learning_rate: float = Field(default=0.003, gt=0)
    pessimism: float = Field(default=0.5, ge=0, description="spreads subtracted from the mean for training")
    reservoir: int = Field(default=4096, ge=64, description="labelled answers kept for replay")
    window: int = Field(default=500, ge=50, description="labels over which AUC and calibration are shown")
    snapshot_every: int = Field(default=50, ge=1, description="updates between immutable snapshots")


class TrainConfig(Section):
    """When and how a policy is trained. ``recipe`` names a file of ``trainer/recipes`` or a path to one."""

    recipe: str = "ppo-replay"
    every: str | None = Field(default=None, description="cadence such as '30m', '6h', '1d'; None: triggers alone")
    min_scored: int = Field(default=200, ge=1, description="new scored episodes that start a run")
    reward_drift: float | None = Field(default=0.1, gt=0, description="fall of the mean reward that starts a run")
    thumbs_drop: float | None = Field(default=0.1, gt=0, description="fall of the thumbs-up share that starts a run")
    window: int = Field(default=4000, ge=1, description="newest scored episodes that a batch is drawn from")
    max_lag: int = Field(default=4, ge=1, description="releases back that a behaviour policy may be for PPO")
    seed: int = 0

    @property
    def every_seconds(self) -> float | None:
        return None if self.every is None else seconds(self.every)

    @model_validator(mode="after")
    def _cadence_parses(self) -> TrainConfig:
        if self.every is not None:
            seconds(self.every)
        return self


class GateConfig(Section):
    """What a candidate must show offline. Below ``min_gold`` items there is no automatic promotion."""

    min_gold: int = Field(default=50, ge=1)
    min_gain: float = Field(default=-0.01, description="lower bound of the gain on the gold set, as a share")
    old_skill_loss: float = Field(default=0.02, ge=0, description="largest loss on what was right before, pooled")
    slice_loss: float = Field(default=0.03, ge=0, description="largest significant loss in a slice")
    max_kl: float = Field(default=2.0, gt=0, description="nats a token to the base, over the gold answers")
    max_length_change: float = Field(default=0.5, gt=0, description="relative change of the mean answer length")
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class HoldoutConfig(Section):
    """Shares of captured traffic kept from training, by hash of subject and near-duplicate cluster."""

    gate: float = Field(default=0.0, ge=0, le=0.5)
    report: float = Field(default=0.0, ge=0, le=0.5)


class CanaryConfig(Section):
    share: float = Field(default=0.25, gt=0, le=0.5)
    margin: float = Field(default=0.05, gt=0, lt=1)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    min_units: int = Field(default=50, ge=2)
    max_duration: str = "7d"
    max_episodes: int = Field(default=100_000, ge=10)
    max_error_share: float = Field(default=0.02, gt=0, le=1, description="hard guard: failed calls of the canary")
    max_empty_share: float = Field(default=0.05, gt=0, le=1, description="hard guard: empty answers of the canary")
    automatic: bool = Field(default=True, description="False: a person promotes")

    def plan(self) -> CanaryPlan:
        return CanaryPlan(
            margin=self.margin,
            alpha=self.alpha,
            share=self.share,
            min_units=self.min_units,
            max_seconds=seconds(self.max_duration),
            max_episodes=self.max_episodes,
        )


class PolicyConfig(Section):
    """One agent's model: the unit of the loop."""

    base: str = Field(default="smollm2", description="'smollm2', 'tiny-k2', or a Hugging Face folder or id")
    explore: float = Field(default=0.0, ge=0, le=1, description="share of calls sampled at temperature 1")
    max_tokens: int = Field(default=256, ge=1, description="of an answer, where the request says none")
    temperature: float | None = Field(default=None, ge=0, description="None: what the request says, else 1.0")
    idle: float = Field(
        default=900,
        gt=0,
        description="seconds without an event after which calls of one conversation start a new episode",
    )
    train: TrainConfig = TrainConfig()
    gate: GateConfig = GateConfig()
    holdout: HoldoutConfig = HoldoutConfig()
    canary: CanaryConfig = CanaryConfig()
    reward: RewardConfig = RewardConfig()


class TenantConfig(Section):
    policies: dict[str, PolicyConfig] = {"assistant": PolicyConfig()}

    @model_validator(mode="after")
    def _names(self) -> TenantConfig:
        for name in self.policies:
            _check_name("policy", name)
        if not self.policies:
            raise ValueError("a tenant needs at least one policy")
        return self


class Config(Section):
    home: Path = Field(default=Path(".everloop"), description="where all state lives; safe to delete")
    cache: Path = Field(default=Path(".everloop/cache"), description="base models and encoders, made once")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log: LogConfig = LogConfig()
    gateway: GatewayConfig = GatewayConfig()
    serving: ServingConfig = ServingConfig()
    services: ServicesConfig = ServicesConfig()
    mlflow: MlflowConfig = MlflowConfig()
    ray: RayConfig = RayConfig()
    tenants: dict[str, TenantConfig] = {"default": TenantConfig()}

    @model_validator(mode="after")
    def _tenants(self) -> Config:
        for name in self.tenants:
            _check_name("tenant", name)
        if not self.tenants:
            raise ValueError("there must be at least one tenant")
        return self

    def policy(self, tenant: str, policy: str) -> PolicyConfig:
        """Raises ConfigError where this installation has no such policy."""
        try:
            return self.tenants[tenant].policies[policy]
        except KeyError:
            known = ", ".join(f"{t}/{p}" for t, p in self.policies())
            raise ConfigError(f"there is no policy {tenant}/{policy}; this installation has: {known}") from None

    def policies(self) -> list[tuple[str, str]]:
        """All (tenant, policy) pairs."""
        return [(tenant, policy) for tenant, its in self.tenants.items() for policy in its.policies]

    def under_home(self, url: str) -> str:
        """``sqlite:///name`` with a relative path as one with an absolute path below the home; others as they are."""
        scheme, separator, path = url.partition(":///")
        if separator and scheme == "sqlite" and not path.startswith("/"):
            return f"{scheme}:///{self.home.absolute() / path}"
        return url


def load(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Config:
    """The configuration from ``path`` (else ``EVERLOOP_CONFIG``, else ``everloop.toml`` here, else the defaults).

    Raises:
        ConfigError: the file is missing or broken, or a key is unknown or contradictory: what, why, what instead.
    """
    environment = os.environ if environment is None else environment
    named = path or (Path(environment["EVERLOOP_CONFIG"]) if environment.get("EVERLOOP_CONFIG") else None)
    source = named or Path("everloop.toml")
    fields: dict[str, Any] = {}
    if source.exists():
        try:
            fields = tomllib.loads(source.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source} is not TOML: {error}") from None
    elif named is not None:
        raise ConfigError(f"there is no configuration at {source}; 'everloop init' writes one")
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT) and name not in NOT_SETTINGS:
            _override(fields, name, value)
    if environment.get("EVERLOOP_HOME"):
        fields["home"] = environment["EVERLOOP_HOME"]
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_explain(error, source if source.exists() else None)) from None


def _override(fields: dict[str, Any], name: str, value: str) -> None:
    *tables, key = name.removeprefix(ENVIRONMENT).lower().split("__")
    at = fields
    for table in tables:
        at = at.setdefault(table, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{name}: {table} is a value, not a table")
    try:
        at[key] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        at[key] = value


def _explain(error: ValidationError, source: Path | None) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _keys_beside(problem["loc"]), n=1)
            known = ", ".join(_keys_beside(problem["loc"]))
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {known}"
            lines.append(f"{where}: unknown key; {hint}")
        else:
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})")
    return f"configuration {source or 'from the environment'} is refused:\n  " + "\n  ".join(lines)


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Config
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        annotation = field.annotation if field is not None else section
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        section = next((a for a in nested if issubclass(a, Section)), annotation)
    return sorted(getattr(section, "model_fields", {}))

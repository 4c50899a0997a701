"""One typed configuration: a TOML file, overridden by the environment.

Unknown and contradictory keys are refused at load. See ``everloop/environment.py`` for the variables.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from everloop.environment import overlay
from everloop.errors import ConfigError
from everloop.log_config import LogConfig
from everloop.provider_config import ProviderConfig
from everloop.refusal import explain
from everloop.release import CanaryPlan
from everloop.section import Section, check_name, check_url, root_url, seconds
from everloop.telemetry_config import TelemetryConfig


class GatewayConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    max_body_bytes: int = Field(default=4_194_304, ge=1024)
    timeout: float = Field(default=300, gt=0, description="seconds for one whole answer")
    redact: str | None = Field(default=None, description="'module:function', takes and returns event fields")
    pin_timeout: float = Field(default=20, gt=0, description="seconds that a pinned name waits for its adapter")
    allow_origins: tuple[str, ...] = Field(default=(), description="browser origins that may give feedback")

    @field_validator("redact")
    @classmethod
    def _names_a_function(cls, redact: str | None) -> str | None:
        if redact is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", redact):
            raise ValueError(f"{redact!r} names no function: use 'module:function', such as 'my_agent.privacy:redact'")
        return redact

    @field_validator("allow_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is not an origin: use scheme and host alone, as 'https://example.com'")
        return origins


OURS = ("embedded", "vllm")
Target = Literal["attention", "dense", "shared", "experts"]


class VllmConfig(Section):
    """A vLLM that ``everloop up`` starts (``serving.url = "vllm"``)."""

    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of weights and activations")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=32, description="no recipe and no adapter may have more"
    )
    arguments: tuple[str, ...] = Field(
        default=(), description="passed on last, as they are: such as '--tensor-parallel-size=8'"
    )


class ServingConfig(Section):
    url: str | tuple[str, ...] = Field(
        default="embedded", description="'embedded', 'vllm', or the base URL of an engine that runs, or of several"
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8081, ge=0, le=65535)
    max_batch: int = Field(default=64, ge=1)
    queue: int = Field(default=256, ge=1, description="waiting requests above it are answered 429")
    resident_adapters: int = Field(default=6, ge=2)
    keep_pinned: str = Field(
        default="10m", description="without a call that names it, after which a pinned adapter gives way to others"
    )
    threads: int = Field(default=0, ge=0, description="of torch; 0: as many as there are cores")
    targets: tuple[Target, ...] | None = Field(
        default=None, min_length=1, description="groups of weights whose LoRA it can serve; unset: found out, else all"
    )
    vllm: VllmConfig = VllmConfig()

    @field_validator("url", mode="before")
    @classmethod
    def _reachable(cls, url: Any) -> str | tuple[str, ...]:
        if isinstance(url, list | tuple):
            return _several(url)
        return url if url in OURS else _engine_url(url)

    @field_validator("keep_pinned")
    @classmethod
    def _is_a_time(cls, keep_pinned: str) -> str:
        seconds(keep_pinned)
        return keep_pinned

    @property
    def ours(self) -> bool:
        """Whether ``everloop up`` starts the engine."""
        return self.url in OURS

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the engines answer, seen from this machine: one, or the replicas."""
        if not self.ours:
            return (self.url,) if isinstance(self.url, str) else self.url
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return (f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}",)


def _engine_url(url: Any) -> str:
    instead = "'embedded', 'vllm', or http://<host>:<port> of an engine, or a list of such URLs"
    if not isinstance(url, str):
        raise ValueError(f"{url!r} is not a URL: use {instead}")
    return check_url(url, ("http://", "https://"), instead)


def _several(urls: Sequence[Any]) -> str | tuple[str, ...]:
    """The URLs of replicas; of a single one, it alone."""
    if not urls:
        raise ValueError("it names no engine: write one URL or several, or leave it out for 'embedded'")
    seen: dict[str, str] = {}
    for url in urls:
        if url in OURS:
            raise ValueError(
                f"{url!r} cannot stand in a list: 'everloop up' starts one engine. Start replicas yourself, and "
                "list the http://<host>:<port> of each"
            )
        root = root_url(_engine_url(url)).lower()
        if root in seen:
            raise ValueError(f"{url!r} and {seen[root]!r} are the same engine: list each replica once")
        seen[root] = url
    return urls[0] if len(urls) == 1 else tuple(urls)


class ServicesConfig(Section):
    """Ports of the services behind the gateway (health, metrics, status); 0 picks a free one."""

    host: str = "127.0.0.1"
    assembler_port: int = Field(default=8082, ge=0, le=65535)
    reward_port: int = Field(default=8083, ge=0, le=65535)
    learner_port: int = Field(default=8084, ge=0, le=65535)
    releaser_port: int = Field(default=8085, ge=0, le=65535)
    engine_port: int = Field(default=8086, ge=0, le=65535, description="where vLLM has serving.port for itself")
    drain: float = Field(default=10, gt=0, description="seconds to finish what is under way at a stop")


class AssembleConfig(Section):
    """How long assembly remembers an episode. See ``pipelines/settled.py``."""

    settle: str = Field(
        default="7d", description="without an event, after which an episode's events lie in the store alone"
    )
    forget: str = Field(
        default="365d", description="without an event, after which feedback no longer changes an episode"
    )

    @model_validator(mode="after")
    def _settles_before_it_forgets(self) -> AssembleConfig:
        if seconds(self.settle) >= seconds(self.forget):
            raise ValueError(
                f"settle ({self.settle}) is not below forget ({self.forget}): an episode must be settled before it can "
                "be forgotten; raise forget"
            )
        return self


class MlflowConfig(Section):
    uri: str = Field(default="sqlite:///mlflow.db", description="a SQLite file below the home, or a server's URL")
    poll: float = Field(default=5, ge=0, description="seconds between looks at the aliases of models; 0: never")

    @field_validator("uri")
    @classmethod
    def _known_store(cls, uri: str) -> str:
        return check_url(uri, ("sqlite:///", "http://", "https://"), "sqlite:///<file>, or http://<host>:<port>")


class RayConfig(Section):
    address: str = Field(
        default="local",
        description="'local', or a cluster's address; its nodes need the home and the cache at the same paths",
    )
    cpus: int = Field(default=0, ge=0, description="for a local Ray; 0: as many as there are cores")
    gpus_per_learner: float = Field(default=0, ge=0, description="0 alone: the trainer runs on processor cores")

    @field_validator("gpus_per_learner")
    @classmethod
    def _no_gpu(cls, gpus: float) -> float:
        if gpus > 0:
            raise ValueError("the trainer's engine runs on processor cores and would leave a reserved GPU idle: use 0")
        return gpus


DriftKind = Literal["inputs", "labels", "calibration"]
DriftAction = Literal["recalibrate", "retrain", "freeze", "page"]
DRIFTS: tuple[DriftKind, ...] = ("inputs", "labels", "calibration")


NAMED = re.compile(r"(rater|answer|call):[0-9a-f]{16}")  # whom a guard of the reward model may name


class RewardConfig(Section):
    encoder: str = Field(default="minilm", description="'minilm', or a sentence-transformers folder")
    heads: int = Field(default=5, ge=3, le=32, description="members of the ensemble")
    learning_rate: float = Field(default=0.003, gt=0)
    pessimism: float = Field(default=0.5, ge=0, description="spreads subtracted from the mean for training")
    reservoir: int = Field(default=4096, ge=64, description="labelled answers kept for replay")
    window: int = Field(default=500, ge=50, description="labels over which AUC and calibration are shown")
    snapshot_every: int = Field(default=50, ge=1, description="updates between immutable snapshots")
    declaration: str | None = Field(
        default=None,
        description="TOML or Python file of what counts and how much, relative to this file; None: all that comes",
    )
    on_drift: dict[DriftKind, tuple[DriftAction, ...]] = Field(
        default={"inputs": ("page",), "labels": ("page",), "calibration": ("page", "recalibrate")},
        description="what is done where prompts, labels or what probabilities mean changed; a kind left out: nothing",
    )

    @field_validator("on_drift")
    @classmethod
    def _every_kind(cls, value: dict[DriftKind, tuple[DriftAction, ...]]) -> dict[DriftKind, tuple[DriftAction, ...]]:
        return {kind: value.get(kind, ()) for kind in DRIFTS}

    trusted: tuple[str, ...] = Field(
        default=(), description="names of held feedback (docs/reward.md) that a person vouches for, such as 'rater:…'"
    )
    distrusted: tuple[str, ...] = Field(
        default=(), description="raters ('rater:…') who are not to be heard; what they taught lately is taken back"
    )

    @model_validator(mode="after")
    def _trusted_or_not(self) -> RewardConfig:
        for name in self.distrusted + self.trusted:
            if not NAMED.fullmatch(name):
                raise ValueError(
                    f"{name!r} names nobody: a name is 'rater:', 'answer:' or 'call:' and 16 hex digits, as 'everloop "
                    "explain' and the scorer's /status tell it"
                )
        for name in self.distrusted:
            if not name.startswith("rater:"):
                raise ValueError(f"distrusted names {name!r}, which is no rater: a rater's name begins with 'rater:'")
            if name in self.trusted:
                raise ValueError(f"{name} is trusted and distrusted: take it out of one of the two")
        return self


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
    keep_checkpoints: int = Field(
        default=3, ge=0, description="newest checkpoints of a run that can be sampled from; 0: none"
    )
    max_mismatch: float = Field(
        default=0.05, gt=0, description="nats a token between engine and trainer, on the mean; above it: a warning"
    )

    @property
    def every_seconds(self) -> float | None:
        return None if self.every is None else seconds(self.every)

    @model_validator(mode="after")
    def _cadence_parses(self) -> TrainConfig:
        if self.every is not None:
            seconds(self.every)
        return self

    @model_validator(mode="after")
    def _window_holds_a_run(self) -> TrainConfig:
        if self.window < self.min_scored:
            raise ValueError(
                f"window ({self.window}) is below min_scored ({self.min_scored}): a run would start on more new "
                "episodes than its batch is drawn from; raise window"
            )
        return self


class GateConfig(Section):
    """What a candidate must show offline. Below ``min_gold`` items there is no automatic promotion."""

    min_gold: int = Field(default=50, ge=1)
    min_gain: float = Field(
        default=-0.01, gt=-1, lt=1, description="least lower bound of the gold set's gain; its mean must be above 0"
    )
    old_skill_loss: float = Field(default=0.02, ge=0, description="largest loss on what was right before, pooled")
    slice_loss: float = Field(default=0.03, ge=0, description="largest significant loss in a slice")
    max_kl: float = Field(default=2.0, gt=0, description="nats a token to the base, over the gold answers")
    max_length_change: float = Field(default=0.5, gt=0, description="relative change of the mean answer length")
    confidence: float = Field(default=0.95, gt=0.5, lt=1)


class HoldoutConfig(Section):
    """Shares of captured traffic kept from training, by hash of subject and near-duplicate cluster."""

    gate: float = Field(default=0.0, ge=0, le=0.5)
    report: float = Field(default=0.0, ge=0, le=0.5)

    @model_validator(mode="after")
    def _leaves_something(self) -> HoldoutConfig:
        if self.gate + self.report >= 1:
            raise ValueError("gate and report together take all traffic, so nothing is left to train on; lower one")
        return self


class CanaryConfig(Section):
    """How a candidate is tried on traffic, and by what it is judged."""

    share: float = Field(default=0.25, gt=0, description="of traffic to the canary; the control gets as much")
    stages: tuple[float, ...] = Field(
        default=(), description="instead of one share, growing ones for much traffic: [0.01, 0.05, 0.25]"
    )
    stage_units: int = Field(default=20, ge=1, description="people (or episodes) in each arm before the share grows")
    stage_duration: str = Field(default="10m", description="least time before the share grows")
    shadow: int = Field(default=40, ge=0, description="recent prompts answered before any user sees it; 0: none")
    margin: float = Field(default=0.05, gt=0, lt=1, description="largest loss of success that is not inferior")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="probability of a wrong verdict at any time")
    min_units: int = Field(default=50, ge=2, description="rated people (or episodes) in each arm to promote")
    max_duration: str = Field(default="7d", description="past it, undecided: the incumbent stays")
    max_episodes: int = Field(default=100_000, ge=10, description="of both arms; past it, undecided")
    max_error_share: float = Field(default=0.02, gt=0, le=1, description="hard guard: failed calls of the canary")
    max_empty_share: float = Field(default=0.05, gt=0, le=1, description="hard guard: empty answers of the canary")
    max_broken_share: float = Field(default=0.05, gt=0, le=1, description="guard: answers with broken tool calls")
    max_length_ratio: float = Field(default=1.5, gt=1, description="guard: length of answers over the control's")
    automatic: bool = Field(default=True, description="False: a person promotes")

    @model_validator(mode="after")
    def _can_end(self) -> CanaryConfig:
        if self.share > 0.5:
            raise ValueError(
                f"share {self.share:g} is above 0.5: the control gets as much as the canary; use at most 0.5"
            )
        if self.max_episodes < 2 * self.min_units:
            raise ValueError(
                f"max_episodes ({self.max_episodes}) is below twice min_units ({self.min_units}): every canary would "
                "end undecided; raise max_episodes"
            )
        if seconds(self.stage_duration) * len(self.stages) >= seconds(self.max_duration):
            raise ValueError(
                f"{len(self.stages)} stages of {self.stage_duration} fill max_duration ({self.max_duration}): every "
                "canary would end undecided; raise max_duration"
            )
        return self

    @model_validator(mode="after")
    def _stages_grow(self) -> CanaryConfig:
        if self.stages and "share" in self.model_fields_set:
            raise ValueError("share and stages both say how much traffic the canary gets: leave share out")
        if any(not 0 < stage <= 0.5 for stage in self.stages):
            raise ValueError(
                f"stages {list(self.stages)} must lie above 0 and at most at 0.5: the control gets as much"
            )
        if sorted(set(self.stages)) != list(self.stages):
            raise ValueError(f"stages {list(self.stages)} must grow from one to the next")
        return self

    def plan(self) -> CanaryPlan:
        return CanaryPlan(
            margin=self.margin,
            alpha=self.alpha,
            share=self.stages[-1] if self.stages else self.share,
            stages=self.stages,
            stage_units=self.stage_units,
            stage_seconds=seconds(self.stage_duration),
            min_units=self.min_units,
            max_seconds=seconds(self.max_duration),
            max_episodes=self.max_episodes,
        )


class PolicyConfig(Section):
    """One agent's model: the unit of the loop."""

    base: str = Field(default="smollm2", description="'smollm2', 'tiny-k2', or a Hugging Face folder or id")
    explore: float = Field(default=0.0, ge=0, le=1, description="share of calls sampled at temperature 1")
    max_tokens: int = Field(default=256, ge=1, description="of an answer, where the request says none")
    temperature: float | None = Field(default=0.3, ge=0, description="where the request says none; None: 1.0")
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
    provider: ProviderConfig | None = Field(
        default=None, description="an OpenAI-compatible endpoint that answers beside the engine"
    )

    @property
    def incumbent(self) -> ProviderConfig | None:
        """The provider that answers until an adapter is live; None: the base model does."""
        return self.provider if self.provider is not None and self.provider.role == "incumbent" else None


class TenantConfig(Section):
    policies: dict[str, PolicyConfig] = {"assistant": PolicyConfig()}
    per_second: float = Field(
        default=0, ge=0, description="requests and events that each gateway takes of it; beyond: 429; 0: no limit"
    )

    @model_validator(mode="after")
    def _names(self) -> TenantConfig:
        for name in self.policies:
            check_name("policy", name)
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
    assemble: AssembleConfig = AssembleConfig()
    mlflow: MlflowConfig = MlflowConfig()
    ray: RayConfig = RayConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    tenants: dict[str, TenantConfig] = {"default": TenantConfig()}

    @model_validator(mode="after")
    def _tenants(self) -> Config:
        for name in self.tenants:
            check_name("tenant", name)
        if not self.tenants:
            raise ValueError("there must be at least one tenant")
        return self

    @model_validator(mode="after")
    def _one_port_each(self) -> Config:
        taken: dict[tuple[str, int], str] = {}
        for key, host, port in self._ports():
            other = taken.setdefault((host, port), key)
            if port and other != key:
                raise ValueError(f"{key} and {other} are both {port}: two services cannot share a port; change one")
        return self

    def _ports(self) -> list[tuple[str, str, int]]:
        its = self.services
        ports = [("gateway.port", self.gateway.host, self.gateway.port)]
        names = ["assembler_port", "reward_port", "learner_port", "releaser_port"]
        if self.serving.ours:
            ports.append(("serving.port", self.serving.host, self.serving.port))
        if self.serving.url == "vllm":
            names.append("engine_port")
        return ports + [(f"services.{name}", its.host, getattr(its, name)) for name in names]

    @model_validator(mode="after")
    def _state_apart_from_sources(self) -> Config:
        for key, folder in (("home", self.home), ("cache", self.cache)):
            inside = _sources_around(folder)
            if inside is not None:
                raise ValueError(
                    f"{key} {str(folder)!r} lies among the sources in {inside}: state is deleted and rewritten, "
                    "sources are not; use a folder of its own, such as '.everloop'"
                )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Config:
        resident, policies = self.serving.resident_adapters, len(self.policies())
        if resident < 2 * policies:
            raise ValueError(
                f"serving.resident_adapters ({resident}) is below two for each of {policies} policies, so not every "
                "one could have a live adapter and a canary; raise it, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_base_for_vllm(self) -> Config:
        bases = sorted({self.policy(*policy).base for policy in self.policies()})
        if self.serving.url == "vllm" and len(bases) > 1:
            raise ValueError(
                f"serving.url = 'vllm' starts one vLLM, which serves one base, and the policies have {len(bases)}: "
                f"{', '.join(bases)}. Give all policies one base, or each base an installation of its own"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _room_for_adapters(cls, fields: Any) -> Any:
        """Where nothing is said: three adapters a policy (live, canary, and the way back), at least six."""
        tenants, serving = fields.get("tenants"), fields.get("serving", {})
        if not isinstance(tenants, dict) or not isinstance(serving, dict) or "resident_adapters" in serving:
            return fields
        its = [
            t.get("policies", {"": 0}) if isinstance(t, dict) else getattr(t, "policies", {}) for t in tenants.values()
        ]
        count = sum(len(policies) for policies in its if isinstance(policies, dict))
        return {**fields, "serving": {**serving, "resident_adapters": max(6, 3 * count)}}

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


def _sources_around(folder: Path) -> Path | None:
    """The folder of sources that ``folder`` lies in, where Everloop runs from a checkout or an installed package."""
    package = Path(__file__).resolve().parent
    root = package.parents[1]
    names = (
        "sdk",
        "services",
        "pipelines",
        "reward",
        "trainer",
        "tests",
        "docs",
        "examples",
        "benchmarks",
        "infra",
        "helm",
    )
    checkout = (root / "services").is_dir() and (root / "pyproject.toml").is_file()
    sources = [package, *(root / name for name in names if checkout)]
    where = folder.expanduser().absolute()
    if checkout and where == root:
        return root
    return next((source for source in sources if where.is_relative_to(source)), None)


def _beside(fields: dict[str, Any], folder: Path) -> None:
    """Make the paths that a file gives relative to itself such that hold from anywhere."""
    for tenant in _tables(fields.get("tenants")):
        for policy in _tables(tenant.get("policies")):
            for reward in _tables({"reward": policy.get("reward")}):
                if isinstance(reward.get("declaration"), str):
                    reward["declaration"] = str((folder / reward["declaration"]).absolute())


def _tables(named: Any) -> list[dict[str, Any]]:
    return [one for one in named.values() if isinstance(one, dict)] if isinstance(named, dict) else []


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
            raise ConfigError(
                f"{source} is not TOML: {error}. Mend it, or write a new one with 'everloop init'"
            ) from None
        except OSError as error:
            raise ConfigError(f"{source} cannot be read: {error.strerror}") from None
    elif named is not None:
        raise ConfigError(f"there is no configuration at {source}; 'everloop init' writes one")
    _beside(fields, source.parent)
    variables = overlay(fields, environment)
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(explain(error, Config, source if source.exists() else None, variables)) from None

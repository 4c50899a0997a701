"""The configuration: what is shipped parses, and what is unknown or contradictory is refused in words."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from everloop.cli.init import commented
from everloop.config import Config, RayConfig, load
from everloop.errors import ConfigError
from everloop.section import seconds
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("pyproject.toml", "reward.toml")
FOLDERS = ("examples", "infra", "helm", "benchmarks", "docs", "services", "trainer")


def shipped() -> list[Path]:
    found = [ROOT / "everloop.toml", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.toml"))]
    return [path for path in found if path.exists() and "recipes" not in path.parts and path.name not in OTHERS]


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_configuration_parses(path: Path) -> None:
    assert load(path, {}).policies()


def given(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> Config:
    path = tmp_path / "everloop.toml"
    path.write_text(text)
    return load(path, environment or {})


def test_the_commented_file_is_the_defaults(tmp_path: Path) -> None:
    assert given(tmp_path, commented()) == Config()
    bare = re.sub(r"(?m)^# (\w+ = )", r"\1", commented())
    assert given(tmp_path, bare) == Config()
    assert set(tomllib.loads(bare)) == set(Config.model_fields)


def test_nothing_at_all_is_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(None, {}) == Config()


P = "[tenants.default.policies.assistant"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[gateway]\nprot = 1", r"gateway\.prot: unknown key; did you mean 'port'\?"),
        ("[gatway]\nport = 1", "gatway: unknown key; did you mean 'gateway'"),
        ("[gateway]\nzzz = 1", "known here: .*max_body_bytes"),
        (
            f"{P}.train]\nmin_score = 1",
            r"assistant\.train\.min_score: unknown key; did you mean 'min_scored'",
        ),
        ("[gateway]\nport = 70000", r"gateway\.port: .*65535.*got 70000"),
        ("[gateway]\nport = 'x'", r"gateway\.port: .*integer"),
        ("gateway = 3", r"gateway: is a table of keys, not 3; write \[gateway\]"),
        (
            "[gateway]\nport = 8081",
            "serving.port and gateway.port are both 8081",
        ),
        ("[services]\nreward_port = 8084", "are both 8084: two services cannot share a port"),
        ("[gateway]\nredact = 'nothing'", "names no function: use 'module:function'"),
        ("[gateway]\nallow_origins = ['example.com/x']", "is not an origin"),
        ("[serving]\nurl = 'ftp://x'", "'ftp://x' is not a URL that this release knows: use 'embedded'"),
        ("[serving]\nurl = 'http://'", "is not a URL"),
        ("[serving]\nresident_adapters = 2\n[tenants.a.policies]\nx={}\ny={}", "below two for each of 2 policies"),
        ("[log]\nurl = 'postgres://x'", "use sqlite:///<file>"),
        ("[log]\ninline_bytes = 2000000", "must be below max_record_bytes"),
        ("[mlflow]\nuri = 'file:///x'", "use sqlite:///<file>, or http"),
        (
            f"{P}.canary]\nshare = 0.7",
            "share 0.7 is above 0.5: the control gets as much .*; use at most 0.5",
        ),
        (f"{P}.canary]\nshare = 0.1\nstages = [0.01, 0.1]", "leave share out"),
        (f"{P}.canary]\nstages = [0.01, 0.7]", "at most at 0.5"),
        (f"{P}.canary]\nstages = [0.1, 0.05]", "must grow from one to the next"),
        (f"{P}.canary]\nstages = [0.1]\nmax_duration = '5m'", "raise max_duration"),
        (f"{P}.canary]\nmax_episodes = 20", "every canary would end undecided; raise max_episodes"),
        (f"{P}.canary]\nmax_duration = 'soon'", "'soon' is not a duration: use a number and s, m, h or d"),
        (f"{P}.canary]\nalpha = 0.6", "less than 0.5"),
        (f"{P}.train]\nevery = 'tuesday'", "is not a duration"),
        (f"{P}.train]\nwindow = 10", r"window \(10\) is below min_scored \(200\)"),
        (f"{P}.holdout]\ngate = 0.5\nreport = 0.5", "nothing is left to train on"),
        (f"{P}.gate]\nmin_gain = 2", "less than 1"),
        ("[tenants]", "at least one tenant"),
        ("[tenants.Default.policies.x]", "tenant name 'Default': use lower-case"),
        ("[tenants.a.policies.'x y']", "policy name 'x y': use lower-case"),
        ("[tenants.a]\npolicies = {}", "at least one policy"),
        ("log_level = 'loud'", "'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_what_cannot_be_is_refused_with_why_and_what_instead(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        given(tmp_path, text)


@pytest.mark.parametrize("content", [b"[gateway\nport=1", b"\xff\xfe\x00", b"port 3", b"\x00\x01\x02"])
def test_a_corrupted_file_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml is not TOML"):
        load(path, {})


def test_a_missing_or_unreadable_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no configuration at .*'everloop init' writes one"):
        load(tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, {})


@pytest.mark.parametrize("where", ["services/state", "sdk", "pipelines/x", ".", "sdk/everloop"])
def test_state_never_lies_among_the_sources(where: str) -> None:
    for key in ("home", "cache"):
        with pytest.raises(ConfigError, match=f"{key} .* lies among the sources"):
            load(None, {f"EVERLOOP_{key}".upper(): str(ROOT / where)})
    assert load(None, {"EVERLOOP_HOME": str(ROOT / ".everloop")}).home == ROOT / ".everloop"


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environment = {
        "EVERLOOP_GATEWAY__PORT": "9000",
        "EVERLOOP_GATEWAY__HOST": "0.0.0.0",
        "EVERLOOP_GATEWAY__ALLOW_ORIGINS": "['https://example.com']",
        "EVERLOOP_HOME": str(tmp_path / "elsewhere"),
        "EVERLOOP_TENANTS__DEFAULT__POLICIES__ASSISTANT__BASE": "tiny-k2",
    }
    config = given(tmp_path, "[gateway]\nport = 8000\ntimeout = 7", environment)
    assert (config.gateway.port, config.gateway.host, config.gateway.timeout) == (9000, "0.0.0.0", 7)
    assert config.gateway.allow_origins == ("https://example.com",)
    assert config.home == tmp_path / "elsewhere"
    assert config.policy("default", "assistant").base == "tiny-k2"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"EVERLOOP_GATEWAY__PRT": "1"}, "EVERLOOP_GATEWAY__PRT: no setting .* did you mean EVERLOOP_GATEWAY__PORT?"),
        ({"EVERLOOP_GATWAY__PORT": "1"}, "EVERLOOP_GATWAY__PORT: no setting .* did you mean EVERLOOP_GATEWAY__PORT?"),
        ({"EVERLOOP_GATEWAY_PORT": "1"}, "EVERLOOP_GATEWAY_PORT: no setting .* did you mean EVERLOOP_GATEWAY__PORT?"),
        ({"EVERLOOP_HOEM": "x"}, "EVERLOOP_HOEM: no setting .* did you mean EVERLOOP_HOME?"),
        ({"EVERLOOP_APIKEY": "x"}, "did you mean EVERLOOP_API_KEY?"),
        (
            {"EVERLOOP_TENANTS__A__POLICIES__X__TRAIN__SED": "1"},
            "did you mean EVERLOOP_TENANTS__A__POLICIES__X__TRAIN__SEED?",
        ),
        ({"EVERLOOP_XYZZY": "1"}, "EVERLOOP_XYZZY: no setting has this name; 'everloop init' writes"),
        ({"EVERLOOP_GATEWAY__PORT": "http"}, r"EVERLOOP_GATEWAY__PORT: .*valid integer.* \(got 'http'\)"),
        ({"EVERLOOP_LOG__URL": "x"}, r"EVERLOOP_LOG__URL \(or --log\): 'x' is not a URL"),
        ({"EVERLOOP_GATEWAY": "1"}, "EVERLOOP_GATEWAY: is a table of keys, not 1; set one of them"),
        ({"EVERLOOP_GATEWAY__PORT": "8081"}, r"are both 8081: .* \(set here: EVERLOOP_GATEWAY__PORT\)"),
        ({"EVERLOOP_LOG__USERNAME": "ann"}, r"log: username and password .*\(set here: EVERLOOP_LOG__USERNAME\)"),
        ({"EVERLOOP_LOG_LEVEL__X": "1"}, "log_level"),
        ({"EVERLOOP_GATEWAY": "1", "EVERLOOP_GATEWAY__PORT": "1"}, "gateway is a value, not a table"),
    ],
)
def test_a_wrong_variable_is_refused(tmp_path: Path, environment: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        given(tmp_path, "", environment)


def test_what_is_refused_is_said_to_be_where_it_was_written(tmp_path: Path) -> None:
    typo = {"EVERLOOP_GATEWAY__PRT": "1"}
    with pytest.raises(ConfigError) as refused:
        given(tmp_path, "[gateway]\nport = 8000", typo)
    assert str(refused.value).startswith("the environment is refused:")
    assert "everloop.toml" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"configuration .*everloop\.toml and the environment are refused") as refused:
        given(tmp_path, "[gateway]\nprot = 8000", typo)
    assert "gateway.prot: unknown key; did you mean 'port'?" in str(refused.value)
    assert "EVERLOOP_GATEWAY__PRT: no setting has this name" in str(refused.value)


def test_room_for_adapters_grows_with_the_policies(tmp_path: Path) -> None:
    many = given(tmp_path, "".join(f"[tenants.t{i}.policies.a]\n[tenants.t{i}.policies.b]\n" for i in range(3)))
    assert many.serving.resident_adapters == 18
    assert Config().serving.resident_adapters == 6


def test_where_the_engines_answer() -> None:
    def urls(**fields: Any) -> tuple[str, ...]:
        return Config.model_validate({"serving": fields}).serving.urls

    assert urls(port=9) == ("http://127.0.0.1:9",)
    assert urls(port=9, host="0.0.0.0") == ("http://127.0.0.1:9",)
    assert urls(port=9, host="::") == ("http://[::1]:9",)
    assert urls(url="http://gpu:8000") == ("http://gpu:8000",)
    assert urls(url=["http://gpu:8000"]) == ("http://gpu:8000",)
    assert urls(url=["http://a:8000", "http://b:8000"]) == ("http://a:8000", "http://b:8000")


def test_replicas_come_from_the_file_or_the_environment(tmp_path: Path) -> None:
    two = '["http://a:8000", "http://b:8000"]'
    for config in (
        given(tmp_path, f"[serving]\nurl = {two}"),
        given(tmp_path, "", {"EVERLOOP_SERVING__URL": two}),
    ):
        assert config.serving.urls == ("http://a:8000", "http://b:8000")
        assert not config.serving.ours


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("[]", "serving.url: it names no engine"),
        ('["http://a:8000", "http://a:8000"]', "are the same engine: list each replica once"),
        ('["http://a:8000", "http://A:8000/v1/"]', "are the same engine: list each replica once"),
        ('["embedded", "http://a:8000"]', "'embedded' cannot stand in a list: .* Start replicas yourself"),
        ('["http://a:8000", "vllm"]', "'vllm' cannot stand in a list"),
        ('["http://a:8000", "a:8001"]', "'a:8001' is not a URL that this release knows"),
        ("8000", "8000 is not a URL: use 'embedded', 'vllm', or http://<host>:<port>"),
        ("[8000]", "8000 is not a URL"),
    ],
)
def test_engines_that_cannot_be_are_refused(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        given(tmp_path, f"[serving]\nurl = {url}")
    assert str(refused.value).count("serving.url") == 1


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("every 6h", 21600), ("1.5m", 90), ("7d", 604800)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


def test_an_unknown_policy_is_named_with_those_that_are_there() -> None:
    with pytest.raises(ConfigError, match="no policy default/x; this installation has: default/assistant"):
        Config().policy("default", "x")


def test_a_gpu_that_nothing_would_use_is_refused():
    with pytest.raises(ValueError, match="runs on processor cores"):
        RayConfig(gpus_per_learner=1)


def test_one_vllm_serves_one_base() -> None:
    policies = {"a": {"base": "tiny-k2"}, "b": {"base": "smollm2"}}
    fields = {"serving": {"url": "vllm"}, "tenants": {"default": {"policies": policies}}}
    with pytest.raises(ValidationError, match=r"serves one base, and the policies have 2: smollm2, tiny-k2"):
        Config.model_validate(fields)
    policies["b"]["base"] = "tiny-k2"
    assert Config.model_validate(fields).serving.ours

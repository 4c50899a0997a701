"""Where a cluster is and as whom we come, how topics are kept, what a record looks like there: no broker needed."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from everloop.config import load
from everloop.errors import ConfigError
from everloop.log import NewRecord, access_of, connect, partition_of
from everloop.log.kafka.declared import Keeping, spec_of
from everloop.log.kafka.diagnosis import why_silent
from everloop.log.kafka.records import AHEAD, TIME, message
from everloop.log.kafka.settings import Access, Address
from everloop.log_config import LogConfig


@pytest.mark.parametrize(
    ("url", "servers", "prefix"),
    [
        ("kafka://broker", ("broker:9092",), ""),
        ("kafka://a:1,b:2/", ("a:1", "b:2"), ""),
        ("kafka://[::1]:9092/team-a", ("[::1]:9092",), "team-a"),
    ],
)
def test_a_url_names_servers_and_a_prefix(url: str, servers: tuple[str, ...], prefix: str) -> None:
    address = Address.parse(url)
    assert (address.servers, address.prefix) == (servers, prefix)
    assert address.own(address.qualified("events")) == "events"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("kafka://", "is no host"),
        ("kafka://a:99999", "is no host"),
        ("kafka://a:1,,b:2", "is no host"),
        ("kafka://user:secret@a", "log.username"),
        ("kafka://a?max_bytes=3", "hosts alone"),
        ("kafka://a/with space", "a prefix is of letters"),
        ("kafka://a/b/c", "a prefix is of letters"),
    ],
)
def test_a_url_that_names_no_cluster_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


SASL: dict[str, Any] = {"url": "kafka://b", "security": "sasl", "username": "u", "password": "secret"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"password": ""}, "needs username"),
        ({"username": ""}, "needs username"),
        ({"security": "tls"}, "sends neither"),
        ({"security": "plaintext", "username": "", "password": "", "ca_file": "ca.pem"}, "checks nothing"),
        ({"url": "sqlite:///log.db"}, "are for Kafka"),
        ({"users": {"gatway": {"username": "g", "password_file": "f"}}}, "'gateway', 'assembler', 'scorer'"),
        ({"users": {"gateway": {"username": "g"}}}, "password_file"),
        (
            {
                "security": "tls",
                "username": "",
                "password": "",
                "users": {"gateway": {"username": "g", "password_file": "f"}},
            },
            "sends neither",
        ),
    ],
)
def test_access_that_does_not_fit_together_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LogConfig(**(SASL | changed))


def test_the_password_comes_from_its_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hush\n")
    config = LogConfig(**(SASL | {"password": "", "password_file": tmp_path / "password"}))
    assert access_of(config).password == "hush"
    assert "hush" not in repr(access_of(config))
    assert "secret" not in repr(LogConfig(**SASL))
    with pytest.raises(ConfigError, match="No such file"):
        LogConfig(**(SASL | {"password_file": tmp_path / "none"})).secret()


def test_the_environment_sets_access(tmp_path: Path) -> None:
    found = load(
        environment={
            "EVERLOOP_HOME": str(tmp_path),
            "EVERLOOP_LOG__URL": "kafka://b:9092",
            "EVERLOOP_LOG__SECURITY": "sasl",
            "EVERLOOP_LOG__USERNAME": "gateway",
            "EVERLOOP_LOG__PASSWORD": "p",
        }
    ).log
    assert access_of(found) == Access("sasl", None, "gateway", "p")


def test_a_ca_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for name, says in (("ca.pem", "not a certificate"), ("none.pem", "No such file")):
        with pytest.raises(ConfigError, match=says):
            Access("tls", tmp_path / name).context()


def test_topics_are_kept_as_they_are_declared() -> None:
    keeping = Keeping(8, 1_000_000, 3600.0, 3)
    events, routes = spec_of("events", keeping), spec_of("routes", keeping)
    assert (events.partitions, events.replicas, routes.partitions) == (8, 3, 1)
    assert events.settings["cleanup.policy"] == "delete"
    assert events.settings["retention.ms"] == "3600000"
    assert events.settings["min.insync.replicas"] == "2"
    assert int(events.settings["max.message.bytes"]) > 1_000_000
    assert routes.settings["cleanup.policy"] == spec_of("everloop-state-assemble", keeping).settings["cleanup.policy"]
    assert routes.settings["cleanup.policy"] == "compact"
    assert spec_of("everloop-state-assemble", keeping).partitions == 8
    assert spec_of("events", Keeping()).replicas == -1


def test_a_timestamp_says_the_events_time_as_far_as_retention_allows() -> None:
    now = time.time()
    sent = message(NewRecord("events", "k", b"v", {"id": "1"}, now - 60.0), "p.events", 4)
    assert sent.timestamp_ms == round((now - 60.0) * 1000)
    assert sent.headers == [("id", b"1")]
    assert sent.partition == partition_of("k", 4)
    old = message(NewRecord("events", "k", b"v", {}, 12.5), "p.events", 4)
    assert old.timestamp_ms > (now - 2 * 3600) * 1000, "or retention would take it at once"
    assert old.headers == [(TIME, b"12500")]
    ahead = message(NewRecord("events", "k", b"v", {}, now + 10 * AHEAD), "p.events", 4)
    assert ahead.timestamp_ms < (now + 1.1 * AHEAD) * 1000, "or it would never be taken"


def test_why_nothing_answers_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        silent = why_silent(Address((f"127.0.0.1:{port}",)), Access())
        no_tls = why_silent(Address((f"127.0.0.1:{port}",)), Access("tls"))
    assert "does not answer" in silent
    assert "does not speak TLS" in no_tls
    assert "nothing listens" in why_silent(Address((f"127.0.0.1:{port}",)), Access())
    assert "no host 'no-such-host.invalid'" in why_silent(Address(("no-such-host.invalid:1",)), Access())

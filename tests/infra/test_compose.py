"""``infra/compose.yaml``: pinned, whole, on the loopback alone, and its broker is that of ``services/broker``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.broker.jars import KAFKA
from services.broker.process import HEAP
from services.broker.settings import QUIET, Settings, properties

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
OWN = {"controller.quorum.voters", "listeners", "advertised.listeners", "log.dirs"}
"""Addresses and paths, which are another matter in a container."""


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
    return found


def flags(composed: dict[str, Any]) -> dict[str, str]:
    """The broker's settings by Kafka's names, as its image makes them of the environment."""
    given = composed["services"]["kafka"]["environment"].items()
    return {
        name.removeprefix("KAFKA_").lower().replace("_", "."): str(value)
        for name, value in given
        if name != "KAFKA_HEAP_OPTS"
    }


def test_the_broker_has_the_flags_of_services_broker(composed: dict[str, Any]) -> None:
    ours = dict(line.split("=", 1) for line in properties(Settings(Path("/"), 9092, 9093)).splitlines())
    theirs = flags(composed)
    assert {name: value for name, value in theirs.items() if name not in OWN} == {
        name: value for name, value in ours.items() if name not in OWN
    }
    assert theirs.keys() >= OWN | QUIET.keys()
    assert composed["services"]["kafka"]["environment"]["KAFKA_HEAP_OPTS"] == " ".join(HEAP)


def test_the_broker_s_listeners_and_ports_fit_together(composed: dict[str, Any]) -> None:
    its = flags(composed)
    names = {place.partition("://")[0] for place in its["listeners"].split(",")}
    assert names == {pair.partition(":")[0] for pair in its["listener.security.protocol.map"].split(",")}
    assert its["inter.broker.listener.name"] in names
    assert its["controller.listener.names"] in names
    voter, _, controller = its["controller.quorum.voters"].partition("@")
    assert voter == its["node.id"]
    assert f"CONTROLLER://{controller}" in its["listeners"]
    port = its["advertised.listeners"].rpartition(":")[2]
    assert composed["services"]["kafka"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"kafka://127.0.0.1:{port}" in (INFRA / "compose.yaml").read_text()


def test_every_image_is_pinned_to_a_release(composed: dict[str, Any]) -> None:
    images = [service["image"] for service in composed["services"].values() if "image" in service]
    built = [service["build"]["dockerfile_inline"] for service in composed["services"].values() if "build" in service]
    images += [line.split()[1] for text in built for line in text.splitlines() if line.startswith("FROM ")]
    assert len(images) == len(composed["services"])
    for image in images:
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{image} is not one release"
    assert composed["services"]["kafka"]["image"] == f"apache/kafka:{KAFKA}"
    (mlflow,) = re.findall(r"mlflow==[\d.]+", "".join(built))
    assert mlflow in (ROOT / "pyproject.toml").read_text()


def test_what_a_service_names_is_there(composed: dict[str, Any]) -> None:
    named: set[str] = set()
    for service in composed["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).is_file(), source
            else:
                named.add(source)
        assert set(service.get("depends_on", [])) <= composed["services"].keys()
    assert named == composed["volumes"].keys()


def test_every_port_is_of_the_loopback(composed: dict[str, Any]) -> None:
    ports = [port for service in composed["services"].values() for port in service["ports"]]
    assert ports
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in ports)

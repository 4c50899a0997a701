"""Run the platform here: every service as a process of its own, until Ctrl-C.

At the first start of a home an API key is made and shown once. Logs lie in <home>/logs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import closing
from typing import Any

from everloop.config import Config, load
from everloop.errors import ConfigError
from everloop.home import Home
from everloop.log import belongs, open_log
from everloop.topics import EVENTS

from reward.signals import declarations
from services import made_with
from services.gateway.keys import Keys
from services.gateway.provider import Providers
from services.installation import options
from services.supervisor import Stop, Supervisor, only_one, services
from trainer import recipe as recipes
from trainer.policy import servable

TRY = """
  base URL   {base}
  API key    {shown}

Try it:
  curl -s {base}/chat/completions -H "Authorization: Bearer {key}" -H 'Content-Type: application/json' \\
    -d '{{"model": "{policy}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  curl -s {base}/feedback -H "Authorization: Bearer {key}" -H 'Content-Type: application/json' \\
    -d '{{"response_id": "<id of the answer>", "kind": "thumb", "value": 1}}'
  everloop status{options}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object once everything is ready")
    parser.add_argument(
        "--serving", metavar="URL", help="'embedded', 'vllm', or http://<host>:<port> (else EVERLOOP_SERVING__URL)"
    )


def run(given: argparse.Namespace) -> int:
    if given.serving is not None:
        os.environ["EVERLOOP_SERVING__URL"] = given.serving
    config = belongs.of_its_home(load())
    os.environ["EVERLOOP_LOG__URL"] = config.log.url  # of every service
    home = Home(config.home).made()
    with only_one(home.root):
        belongs.check(config)
        _check_log(config)
        _check_recipes(config)
        declarations(config)
        Providers(config).check_keys()
        belongs.bind(config)
        made_with.remember(home)
        wanted = services(config)
        urls = {service.name: service.url for service in wanted}
        say = _say_nothing if given.json else _say
        supervisor = Supervisor(wanted, home.root, drain=config.services.drain, say=say)
        say(f"Starting {', '.join(urls)}; home {home.root}")

        def announce(seconds: float) -> None:
            keys = first_keys(config, home)  # not before: a start that is broken off must not make any
            if given.json:
                print(json.dumps(ready_line(config, home, urls, keys, seconds)), flush=True)
            else:
                print(_welcome(config, urls, keys, seconds), flush=True)

        supervisor.run(Stop(), announce)
        say("Everything is down.")
    return 0


def _check_recipes(config: Config) -> None:
    """Refuse now what the first training run would fail by, perhaps hours later."""
    highest = config.serving.vllm.max_lora_rank
    for tenant, policy in config.policies():
        rank = recipes.load(config.policy(tenant, policy).train.recipe).adapter.rank
        if config.serving.url == "vllm" and rank > highest:
            raise ConfigError(
                f"the recipe of {tenant}/{policy} trains adapters of rank {rank}, and serving.vllm.max_lora_rank is "
                f"{highest}: raise it, or lower adapter.rank"
            )
    if config.serving.url == "vllm":
        servable.installed()


def _check_log(config: Config) -> None:
    """Raises LogError with cause and mend where the log cannot be used: before six services each find out."""
    log = open_log(config)
    try:
        log.partitions(EVENTS.name)
    finally:
        log.close()


def first_keys(config: Config, home: Home) -> dict[str, str]:
    """A key for each tenant where this home has none yet; afterwards nothing (keys are kept hashed)."""
    with closing(Keys(home.root / "keys.db")) as keys:
        return {} if keys.list() else {tenant: keys.create(tenant) for tenant in config.tenants}


def ready_line(
    config: Config, home: Home, urls: dict[str, str], keys: dict[str, str], seconds: float
) -> dict[str, Any]:
    """What ``up --json`` prints once: where everything answers, and the keys if they were made just now."""
    return {
        "ready": True,
        "seconds": round(seconds, 2),
        "pid": os.getpid(),
        "home": str(home.root),
        "url": f"{urls['gateway']}/v1",
        "services": urls,
        "key": keys.get(next(iter(config.tenants))),
        "keys": keys,
    }


def _welcome(config: Config, urls: dict[str, str], keys: dict[str, str], seconds: float) -> str:
    tenant, policy = config.policies()[0]
    key = keys.get(tenant)
    shown = (
        f"{key}   (shown only now; 'everloop keys create' makes another)"
        if key
        else "as made before ('everloop keys create' makes another)"
    )
    others = "".join(f"\n  API key of {name}: {made}" for name, made in keys.items() if name != tenant)
    text = TRY.format(
        base=f"{urls['gateway']}/v1", shown=shown, key=key or "$EVERLOOP_API_KEY", policy=policy, options=options()
    )
    return f"Everloop is ready after {seconds:.0f} s.{_who_answers(config)}{others}\n{text}"


def _who_answers(config: Config) -> str:
    """A line for each policy that has a provider; empty where none has."""
    lines = []
    for tenant, policy in config.policies():
        its = config.policy(tenant, policy).provider
        if its is not None:
            when = "until an adapter is live" if its.role == "incumbent" else "where no engine does"
            lines.append(f"\n  {tenant}/{policy} is answered by {its.model} at {its.host} {when}")
    return "".join(lines)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _say_nothing(line: str) -> None:
    """With ``--json`` the one line on the standard output is the ready line; logs tell the rest."""

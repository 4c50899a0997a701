"""Create, list or revoke API keys. A key is shown once, when it is made: only its hash is kept.

Scopes: 'agent' (calls, events, feedback), 'research' (also pinned versions, policy@adapter), 'feedback' (that alone).
"""

from __future__ import annotations

import argparse
import json
import time

from everloop.config import load
from everloop.errors import ConfigError
from everloop.home import Home

from services.gateway.keys import SCOPES, Keys
from services.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|list|revoke")
    create = verbs.add_parser("create", help="make a key and show it")
    create.add_argument("--tenant", help="whose (default: the first of the configuration)")
    create.add_argument("--scope", choices=sorted(SCOPES), default="agent")
    create.add_argument("--label", default="", help="a note, such as who uses it")
    create.add_argument("--json", action="store_true")
    verbs.add_parser("list", help="every key's id, tenant and scope")
    revoke = verbs.add_parser("revoke", help="forget a key: it is refused within a second")
    revoke.add_argument("id", help="as 'everloop keys list' shows it")


def run(options: argparse.Namespace) -> int:
    config = load()
    home = Home(config.home)
    if options.verb != "create" and not (home.root / "keys.db").exists():
        print(f"No keys in {home.root}: everloop keys create")
        return int(options.verb == "revoke")
    keys = Keys(home.made().root / "keys.db")
    try:
        if options.verb == "create":
            return _create(keys, options, list(config.tenants))
        if options.verb == "revoke":
            if not keys.revoke(options.id):
                raise ConfigError(f"there is no key with the id {options.id!r}; see 'everloop keys list'")
            print(f"Key {options.id} is revoked.")
            return 0
        rows = [
            [k.id, k.tenant, k.scope, k.label, time.strftime("%F %T", time.localtime(k.created))] for k in keys.list()
        ]
        print(table(["id", "tenant", "scope", "label", "created"], rows) if rows else "No keys: everloop keys create")
        return 0
    finally:
        keys.close()


def _create(keys: Keys, options: argparse.Namespace, tenants: list[str]) -> int:
    tenant = options.tenant or tenants[0]
    if tenant not in tenants:
        raise ConfigError(f"there is no tenant {tenant!r}; this installation has: {', '.join(tenants)}")
    key = keys.create(tenant, options.scope, options.label)
    if options.json:
        print(json.dumps({"key": key, "tenant": tenant, "scope": options.scope}))
    else:
        print(f"{key}\n(shown only now; {options.scope} key of tenant {tenant})")
    return 0

"""What is installed for JavaScript is pinned by hash, from whatever registry the machine uses."""

from __future__ import annotations

import json

from tests.clients.node import FOLDER


def test_every_package_has_its_hash_and_no_address() -> None:
    packages = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    installed = {name: package for name, package in packages.items() if name}
    assert {"node_modules/ai", "node_modules/openai"} <= installed.keys()
    assert [name for name, package in installed.items() if not package["integrity"].startswith("sha512-")] == []
    assert [name for name, package in installed.items() if "resolved" in package] == []

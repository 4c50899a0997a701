"""JSON Schemas of all contracts, written to ``docs/schemas``: ``python -m pipelines.schemas``.

A test compares the folder with the code, so a contract cannot change unseen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from everloop.contract import Contract
from everloop.examples import EXAMPLES
from everloop.topics import TOPICS

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"


def schemas() -> dict[str, str]:
    """File name to content, for the contract of every topic (the contracts nested in them are in ``$defs``)."""
    made = {topic.contract for topic in TOPICS.values()}
    return {
        f"{contract.__name__}.json": json.dumps(_with_examples(contract), indent=1, ensure_ascii=False) + "\n"
        for contract in sorted(made, key=lambda contract: contract.__name__)
    }


def _with_examples(contract: type[Contract]) -> dict[str, Any]:
    its = [example.model_dump(mode="json") for example in EXAMPLES.values() if type(example) is contract]
    return {**contract.model_json_schema(), "examples": its}


def main(folder: Path = FOLDER) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = schemas()
    for path in folder.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, content in wanted.items():
        (folder / name).write_text(content, encoding="utf-8")
    print(f"{len(wanted)} schemas in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

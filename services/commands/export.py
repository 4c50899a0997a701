"""Write a pinned data set of a policy into a new folder: Parquet files, and a manifest that says exactly what it is.

Synthetic and quarantined episodes are left out; held-out splits are exported only by name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from services.commands.orders import add_policy
from services.installation import Installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a new or empty one")
    parser.add_argument(
        "--format", action="append", metavar="FORMAT", help="parquet (default), sft, preferences; may be repeated"
    )
    parser.add_argument("--split", choices=("train", "gate", "report"), default="train")
    parser.add_argument("--query", help="this SELECT's result alone")
    add_policy(parser)


def run(options: argparse.Namespace) -> int:
    from pipelines.export import export
    from pipelines.store import Store

    with Installation.here() as here:
        tenant, policy = here.policy(options.policy)
        store = Store(here.home.root / "store", tenant=tenant, blobs=here.home.blobs)
        try:
            manifest = export(
                store,
                options.folder,
                tenant=tenant,
                policy=policy,
                split=options.split,
                formats=options.format or ["parquet"],
                query=options.query,
            )
        finally:
            store.close()
    for file in manifest["files"]:
        print(f"{options.folder / file['name']}: {file['rows']} rows")
    print(f"hash {manifest['hash']}")
    return 0

"""Build a small base model from your own examples: Kimi K2's architecture at two million parameters, with a prior
learned from (message, answer) pairs. Takes a minute or so; the same examples give the same model.

Examples: CSV with the columns text and category, or JSON lines with text and answer. The folder that is printed is
what a policy's 'base' names in the configuration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from everloop.config import load
from everloop.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="build")
    build = verbs.add_parser("build", help="make one")
    build.add_argument("name", help="of the folder below the cache's bases")
    build.add_argument("--examples", type=Path, required=True, metavar="FILE", help=".csv or .jsonl")
    build.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> int:
    from pipelines.gold import read_file

    config = load()
    folder = config.cache.absolute() / "bases" / options.name
    if Path(options.name).name != options.name or options.name.startswith("."):
        raise ConfigError(f"{options.name!r} is a path; give a plain name, the folder is {folder.parent}")
    if folder.exists():
        raise ConfigError(f"{folder} is there already; a base model never changes under its name: choose another")
    if not options.examples.is_file():
        raise ConfigError(f"there is no file {options.examples}")
    examples = [(item.prompt[-1].text, item.answer) for item in read_file(options.examples)]
    print(f"Building from {len(examples)} examples …", flush=True)
    from trainer.policy import tiny_k2

    tiny_k2.build(folder, examples, seed=options.seed)
    print(f'{folder}\nIn the configuration: base = "{folder}"')
    return 0

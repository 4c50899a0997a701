"""The ``everloop`` command: finds a command by its name and imports that one alone, so that help is instant.

The SDK brings the commands of :data:`OWN`. The platform registers its own as the entry point group
``everloop.commands``: a table from name to (one line of help, module). Such a module has
``add_arguments(parser)`` and ``run(args) -> exit status``.

Exit status: 0 done, 1 it did not come out as asked, 2 a mistake in the request or the configuration, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

Table: TypeAlias = Mapping[str, tuple[str, str]]

OWN: Table = {"init": ("write a commented everloop.toml to start from", "everloop.cli.init")}

# What the platform would register: named here so that the SDK alone can say where they come from.
PLATFORM = (
    *("up", "status", "doctor", "demo", "pause", "resume", "release", "dead-letters", "retrain", "replay"),
    *(
        "sql",
        "export",
        "gold",
        "compare",
        "evaluate",
        "reward",
        "explain",
        "keys",
        "base",
        "kafka",
        "topics",
        "worker",
        "mlflow",
    ),
)

USAGE = "everloop [--version] <command> [options]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; prints no traceback for a mistake of the person asking."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"everloop: {error}", file=sys.stderr)
        return 2


def _is_ours(error: Exception) -> bool:
    from everloop.errors import EverloopError

    return isinstance(error, EverloopError)


def _dispatch(words: list[str]) -> int:
    if words and words[0] == "--version":
        from importlib.metadata import version

        print(f"everloop {version('everloop')}")
        return 0
    commands = {**OWN, **_registered()}
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(commands))
        return 0 if words else 2
    name, *rest = words
    if name not in commands:
        print(_unknown(name, commands), file=sys.stderr)
        return 2
    return _run(name, commands[name], rest)


def _registered() -> dict[str, tuple[str, str]]:
    from importlib.metadata import entry_points

    found: dict[str, tuple[str, str]] = {}
    for point in entry_points(group="everloop.commands"):
        found.update(point.load())
    return found


def overview(commands: Table) -> str:
    """What ``everloop --help`` prints."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{line}" for name, (line, _) in commands.items()]
    tail = "'everloop <command> --help' explains one. Every command takes --config FILE, --home FOLDER and --log URL."
    return "\n".join([f"usage: {USAGE}", "", *lines, "", tail])


def _unknown(name: str, commands: Table) -> str:
    if name in PLATFORM:
        return (
            f"everloop: '{name}' belongs to the platform, and only the SDK is installed here. "
            "Install the platform: get its sources and run 'make install' there."
        )
    near = difflib.get_close_matches(name, [*commands, *PLATFORM], n=1)
    hint = f"did you mean '{near[0]}'?" if near else "'everloop --help' lists the commands."
    return f"everloop: there is no command '{name}'; {hint}"


def _run(name: str, entry: tuple[str, str], rest: list[str]) -> int:
    line, module_name = entry
    module = import_module(module_name)
    where, words = _where().parse_known_args(rest)
    parser = argparse.ArgumentParser(prog=f"everloop {name}", description=module.__doc__ or line, parents=[_where()])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    options = parser.parse_args(words, namespace=where)
    # The options are short for the environment, so that services started from here see the same.
    if options.config is not None:
        os.environ["EVERLOOP_CONFIG"] = str(options.config.absolute())
    if options.home is not None:
        os.environ["EVERLOOP_HOME"] = str(options.home.absolute())
    if options.log is not None:
        os.environ["EVERLOOP_LOG__URL"] = options.log
    return int(module.run(options))


def _where() -> argparse.ArgumentParser:
    """The options of every command, which may stand anywhere after its name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration (else EVERLOOP_CONFIG, everloop.toml)"
    )
    parser.add_argument("--home", type=Path, metavar="FOLDER", help="where all state lives (else EVERLOOP_HOME)")
    parser.add_argument("--log", metavar="URL", help="kafka://<host>:9092 or sqlite:///<file> (else EVERLOOP_LOG__URL)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

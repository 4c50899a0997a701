"""The public surface is frozen: what is added, renamed or dropped changes this file too."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import everloop

SURFACE = {
    "OpenEpisode",
    "Stats",
    "__version__",
    "configure",
    "current",
    "flush",
    "give_feedback",
    "record",
    "stats",
    "wrap",
}
EPISODE = {
    "answered",
    "asked",
    "call",
    "comment",
    "correct",
    "end",
    "feedback_token",
    "headers",
    "implicit",
    "outcome",
    "prefer",
    "rate",
    "thumb",
    "tool",
}


def test_the_names_are_these() -> None:
    assert set(everloop.__all__) == SURFACE
    assert {name for name in dir(everloop.OpenEpisode) if not name.startswith("_")} == EPISODE


def test_every_name_is_there_and_has_a_docstring() -> None:
    for name in SURFACE - {"__version__"}:
        assert inspect.getdoc(getattr(everloop, name)), name
    for name in EPISODE:
        assert inspect.getdoc(getattr(everloop.OpenEpisode, name)), name


def test_no_name_hides_a_module() -> None:
    """An import of a module of the same name would replace the function."""
    assert SURFACE.isdisjoint(module.name for module in pkgutil.iter_modules(everloop.__path__))


def test_the_import_alone_loads_nothing_heavy() -> None:
    code = "import sys, everloop; print(sorted({'pydantic', 'httpx', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(everloop, "recrod")

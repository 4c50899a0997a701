"""Settings by environment variable: ``EVERLOOP_GATEWAY__PORT=9000`` sets ``[gateway] port``.

Two underscores go one table deeper. Values are read as TOML where they parse as such, else as text.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel

from everloop.errors import ConfigError

PREFIX = "EVERLOOP_"
NOT_SETTINGS = ("EVERLOOP_HOME", "EVERLOOP_CONFIG", "EVERLOOP_DATA", "EVERLOOP_URL", "EVERLOOP_API_KEY")
Variables: TypeAlias = dict[tuple[str, ...], str]
"""Where each variable's value went: keys of the tables, and the variable's name."""


def overlay(fields: dict[str, Any], environment: Mapping[str, str]) -> Variables:
    """Put the environment's settings over those of the file. Raises ConfigError where a value stands for a table."""
    placed: Variables = {}
    for name, value in environment.items():
        if name.startswith(PREFIX) and name not in NOT_SETTINGS:
            placed[_put(fields, name, value)] = name
    if environment.get("EVERLOOP_HOME"):
        fields["home"] = environment["EVERLOOP_HOME"]
        placed["home",] = "EVERLOOP_HOME"
    return placed


def _put(fields: dict[str, Any], name: str, value: str) -> tuple[str, ...]:
    *tables, key = name.removeprefix(PREFIX).lower().split("__")
    at = fields
    for table in tables:
        at = at.setdefault(table, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{name}: {table} is a value, not a table")
    try:
        at[key] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        at[key] = value
    return (*tables, key)


def nearest(name: str, root: type[BaseModel]) -> str | None:
    """The variable that was meant by one that is none; None: nothing comes near. ``root``: the whole configuration."""
    known = [*_variables(root, name.removeprefix(PREFIX).lower().split("__")), *NOT_SETTINGS]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)


def _variables(table: type[BaseModel], parts: list[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every variable of a table. Names that a person gives (a tenant, a policy) are those in ``parts``."""
    for key, field in table.model_fields.items():
        at = (*above, key)
        nested = _table_of(field.annotation)
        if nested is None:
            yield PREFIX + "__".join(at).upper()
        elif getattr(field.annotation, "__origin__", None) is not dict:
            yield from _variables(nested, parts, at)
        elif len(parts) > len(at):
            yield from _variables(nested, parts, (*at, parts[len(at)]))


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """The table that a field holds, itself or by name; None: it holds a value."""
    found = (annotation, *getattr(annotation, "__args__", ()))
    return next((one for one in found if isinstance(one, type) and issubclass(one, BaseModel)), None)

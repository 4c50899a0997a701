"""Why a configuration is refused, in words: which key or variable, what is wrong with it, what to write instead."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from everloop.environment import Variables, nearest

OPTIONS = {"EVERLOOP_HOME": "--home", "EVERLOOP_LOG__URL": "--log"}


def explain(error: ValidationError, root: type[BaseModel], source: Path | None, variables: Variables) -> str:
    """One line for each problem. ``root`` is the model of the whole configuration."""
    lines, blamed = [], set()
    for problem in error.errors():
        variable = _variable(problem, variables)
        lines.append(_key(problem, root, variables) if variable is None else _of_variable(problem, root, variable))
        blamed.add("the environment" if variable is not None or source is None else f"configuration {source}")
    return f"{' and '.join(sorted(blamed))} {'is' if len(blamed) == 1 else 'are'} refused:\n  " + "\n  ".join(lines)


def _variable(problem: Any, variables: Variables) -> str | None:
    """The variable whose value is at this place, or which made the table that nobody knows; None: none did."""
    location = problem["loc"]
    inside = [name for at, name in variables.items() if location[: len(at)] == at]
    unknown = problem["type"] == "extra_forbidden"
    made = [name for at, name in variables.items() if unknown and at[: len(location)] == location]
    return next(iter(inside or made), None)


def _of_variable(problem: Any, root: type[BaseModel], name: str) -> str:
    where = f"{name} (or {OPTIONS[name]})" if name in OPTIONS else name
    if problem["type"] == "extra_forbidden":
        near = nearest(name, root)
        meant = f"did you mean {near}?" if near else "'everloop init' writes a file with every setting"
        return f"{where}: no setting has this name; {meant}"
    if problem["type"].startswith("model_"):
        return f"{where}: is a table of keys, not {problem['input']!r}; set one of them, as {name}__<KEY>"
    return f"{where}: {_says(problem)}"


def _key(problem: Any, root: type[BaseModel], variables: Variables) -> str:
    location = problem["loc"]
    where = ".".join(str(part) for part in location) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; {_instead(location, root)}"
    if problem["type"].startswith("model_"):
        return f"{where}: is a table of keys, not {problem['input']!r}; write [{where}] above its keys"
    says, below = _says(problem), len(location)
    involved = [n for at, n in variables.items() if at[:below] == location and ".".join(at[below:]) in says]
    return f"{where}: {says}" + (f" (set here: {', '.join(involved)})" if involved else "")


def _says(problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{problem['msg']} (got {problem['input']!r})"


def _instead(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    known = _keys_beside(location, root)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


def _keys_beside(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    section: Any = root
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        annotation = field.annotation if field is not None else section
        nested = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        section = next((a for a in nested if issubclass(a, BaseModel)), annotation)
    return sorted(getattr(section, "model_fields", {}))

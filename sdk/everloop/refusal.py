"""Why a configuration is refused, in words: which key, what is wrong with it, what to write instead."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel], source: Path | None) -> str:
    """One line for each problem. ``root`` is the model of the whole configuration."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "configuration"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key; {_instead(problem['loc'], root)}")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
        elif problem["type"].startswith("model_"):
            lines.append(f"{where}: is a table of keys, not {problem['input']!r}; write [{where}] above its keys")
        else:
            lines.append(f"{where}: {problem['msg']} (got {problem['input']!r})")
    return f"configuration {source or 'from the environment'} is refused:\n  " + "\n  ".join(lines)


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

"""Write a commented everloop.toml: every key with its default and what it means, ready to be changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from everloop.config import Config, PolicyConfig, TenantConfig
from everloop.errors import ConfigError
from everloop.section import Section

HEAD = """\
# Everloop's configuration. Every key has its default here, commented out: change what you need.
# The environment overrides it: EVERLOOP_GATEWAY__PORT=9000 sets port of [gateway].
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", default=Path("everloop.toml"))


def run(options: argparse.Namespace) -> int:
    if options.file.exists():
        raise ConfigError(f"{options.file} is there already and stays as it is; name another file")
    options.file.write_text(commented(), encoding="utf-8")
    print(f"Wrote {options.file}. Change what you need, then: everloop up --config {options.file}")
    return 0


def commented() -> str:
    """The whole configuration as TOML with every key commented out; without the '# ' it is the defaults."""
    lines = [HEAD, *_keys(Config)]
    for name, field in Config.model_fields.items():
        if name != "tenants" and _section(field) is not None:
            lines += _table(name, type(field.default))
    lines += [
        "",
        "# A tenant and its policies (one agent's model each). Without any: [tenants.default.policies.assistant]",
    ]
    lines += ["", "[tenants.default]", *_keys(TenantConfig)]
    lines += _table("tenants.default.policies.assistant", PolicyConfig)
    return "\n".join(lines) + "\n"


def _table(name: str, section: type[Section]) -> list[str]:
    lines = ["", f"[{name}]", *_keys(section)]
    for key, field in section.model_fields.items():
        if _section(field) is not None:
            lines += _table(f"{name}.{key}", type(field.default))
        elif (table := _optional(field)) is not None:
            lines += ["", f"# [{name}.{key}] is not set  # {field.description}"]
            lines += [f"#   {line.removeprefix('# ')}" for line in _keys(table)]
    return lines


def _section(field: FieldInfo) -> type[Section] | None:
    return type(field.default) if isinstance(field.default, Section) else None


def _optional(field: FieldInfo) -> type[Section] | None:
    """The table that a field may hold and by itself does not."""
    found = getattr(field.annotation, "__args__", ()) if field.default is None else ()
    return next((one for one in found if isinstance(one, type) and issubclass(one, Section)), None)


def _keys(section: type[Section]) -> list[str]:
    return [
        _line(name, field)
        for name, field in section.model_fields.items()
        if _section(field) is None and _optional(field) is None and not isinstance(field.default, dict)
    ]


def _line(name: str, field: FieldInfo) -> str:
    told = f"  # {field.description}" if field.description else ""
    if field.default is PydanticUndefined:
        return f"# {name} is needed{told}"
    return f"# {name} is not set{told}" if field.default is None else f"# {name} = {_toml(field.default)}{told}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"'

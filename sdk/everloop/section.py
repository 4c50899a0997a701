"""What every part of the configuration is made of: a frozen table of known keys, and checks of names and values."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def check_name(what: str, name: str) -> None:
    if not re.match(NAME, name):
        raise ValueError(f"{what} name {name!r}: use lower-case letters, digits and '-', at most 63")


def seconds(duration: str) -> float:
    """'90s', '30m', '6h' or '7d' in seconds. Raises ValueError on anything else."""
    found = re.fullmatch(r"(?:every\s+)?(\d+(?:\.\d+)?)\s*([smhd])", duration.strip())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{duration!r} is not a duration: use a number and s, m, h or d, such as '6h'")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def check_url(url: str, schemes: tuple[str, ...], instead: str) -> str:
    if not any(url.startswith(scheme) and len(url) > len(scheme) for scheme in schemes):
        raise ValueError(f"{url!r} is not a URL that this release knows: use {instead}")
    return url


def root_url(url: str) -> str:
    """The URL of a server whose OpenAI API lies below ``/v1``, however it was written."""
    return url.rstrip("/").removesuffix("/v1")

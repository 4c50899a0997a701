"""Everloop's SDK: what an agent adds so that it keeps learning from use.

::

    import everloop
    from openai import OpenAI

    client = everloop.wrap(OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="ek_…"))
    with everloop.record(subject="customer-7") as episode:
        answer = client.chat.completions.create(model="assistant", messages=[…])
        episode.thumb(True)

Names are imported when they are first used, so that the command line, which lives in this package too, starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everloop.capture.client import configure as configure
    from everloop.capture.client import current as current
    from everloop.capture.client import flush as flush
    from everloop.capture.client import give_feedback as give_feedback
    from everloop.capture.client import record as record
    from everloop.capture.client import stats as stats
    from everloop.capture.client import wrap as wrap
    from everloop.capture.open_episode import OpenEpisode as OpenEpisode
    from everloop.capture.tally import Stats as Stats

_FOUND_IN = {
    "OpenEpisode": "everloop.capture.open_episode",
    "Stats": "everloop.capture.tally",
    "configure": "everloop.capture.client",
    "current": "everloop.capture.client",
    "flush": "everloop.capture.client",
    "give_feedback": "everloop.capture.client",
    "record": "everloop.capture.client",
    "stats": "everloop.capture.client",
    "wrap": "everloop.capture.client",
}

__version__ = "0.1.0"
__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module 'everloop' has no attribute {name!r}")
    value = getattr(import_module(_FOUND_IN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

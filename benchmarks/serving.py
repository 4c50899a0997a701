"""What an engine gives: tokens a second and the time to the first one, embedded and vLLM, with and without adapters.

Clients ask the engine's own port, without a gateway before it, and read streams; each asks again as soon as its answer
has ended. Requests go to the base, to one adapter, or to four in turn, so that one batch has all of them. The model is
a tiny-k2 that was hardly trained: it seldom ends by itself, so answers have about the 32 tokens that they may have. It
says how engines compare on one machine, and nothing of what a large model does; ``--base`` takes any other, and
``--dtype`` vLLM's number format, so the same runs on a build for accelerators. Tokens are counted by the ids that
come with them; no two prompts are the same.

The run fails where an answer breaks, or has no tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop
from everloop.home import Home

from benchmarks._report import load as load_now
from benchmarks._report import loads, parser, publish
from benchmarks._services import process
from services.gateway.http1 import Client
from services.gateway.upstream import HttpServing

ENGINES = ("embedded", "vllm")
ADAPTERS = (0, 1, 4)
CLIENTS = (1, 8, 32)
SECONDS, QUICK_SECONDS = 5.0, 2.0
WARM = 1.0  # seconds before each measurement
MOST_TOKENS = 32
PATIENCE = 120.0  # seconds for one answer
STARTS_WITHIN = 600.0
DATA = b"data: {"
DONE = b"data: [DONE]"


class Broke(Exception):
    """An engine's answer that is not whole."""


@dataclass
class Seen:
    """What clients saw from ``begins`` to ``ends`` (seconds, monotonic).

    ``tokens`` came in that time; ``firsts`` are seconds to the first token, of answers that were asked for in it.
    """

    begins: float
    ends: float
    tokens: int = 0
    firsts: list[float] = field(default_factory=list)

    def take(self, now: float, tokens: int) -> None:
        if self.begins <= now < self.ends:
            self.tokens += tokens

    def begun(self, asked: float, now: float) -> None:
        if self.begins <= asked < self.ends:
            self.firsts.append(now - asked)


def make(folder: Path, base: str, cache: Path, count: int) -> tuple[Path, list[Path]]:
    """The base's folder, and those of adapters on attention alone, which every engine can serve."""
    import torch

    from trainer.policy import base as bases
    from trainer.policy import lora, tiny_k2

    where = bases.folder(base, cache) if base else folder / "base"
    if not base:
        tiny_k2.build(where, (), settings=tiny_k2.Settings(steps=(1, 1)))
    policy = bases.load(str(where), cache)
    made = []
    for seed in range(count):
        model = lora.attach(policy, 8, 16.0, ("attention",), seed=seed)
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_B" in name:
                    weights.normal_(0.0, 0.05, generator=chance)
        made.append(folder / "home" / "adapters" / lora.save(model, folder / "home" / "adapters"))
    return where, made


@contextmanager
def engine(kind: str, folder: Path, base: Path, dtype: str) -> Iterator[str]:
    """The URL of an engine of this kind, warm. Raises SystemExit where it does not start."""
    home = Home(folder / "home")
    config = folder / "everloop.toml"
    config.write_text(f"[tenants.default.policies.assistant]\nbase = {json.dumps(str(base))}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    own = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    settings = {
        "EVERLOOP_HOME": str(home.root),
        "EVERLOOP_CONFIG": str(config),
        "EVERLOOP_SERVING__URL": kind,
        "EVERLOOP_SERVING__PORT": str(port),
        "EVERLOOP_SERVING__VLLM__DTYPE": dtype,
        "EVERLOOP_SERVICES__ENGINE_PORT": "0",
        "EVERLOOP_LOG_LEVEL": "warning",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    command = (sys.executable, "-m", "services.engine")
    with process("engine", command, own | settings, home, within=STARTS_WITHIN):
        yield f"http://127.0.0.1:{port}"


async def measure(url: str, models: Sequence[str], clients: int, seconds: float) -> Seen:
    """So many clients, without pause, for so long after a warm-up."""
    client, numbers = Client(url, PATIENCE), itertools.count()
    begins = time.monotonic() + WARM
    seen = Seen(begins, begins + seconds)

    async def asks() -> None:
        while time.monotonic() < seen.ends:
            number = next(numbers)
            await ask(client, models[number % len(models)], number, seen)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(asks())
    finally:
        client.close()
    return seen


async def ask(client: Client, model: str, number: int, seen: Seen) -> None:
    """One stream, told to ``seen`` as it comes. Raises Broke where it is no whole answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{number} where is my parcel"}],
        "max_tokens": MOST_TOKENS,
        "temperature": 1.0,
        "seed": number,
        "stream": True,
        "return_token_ids": True,
    }
    asked = time.monotonic()
    connection = await client.ask("POST", "/v1/chat/completions", orjson.dumps(body), f"benchmark-{number}")
    rest, came, ended = b"", 0, False
    while block := await connection.block():
        now = time.monotonic()
        *lines, rest = (rest + block).split(b"\n")
        tokens = sum(map(tokens_of, lines))
        if tokens and not came:
            seen.begun(asked, now)
        seen.take(now, tokens)
        came += tokens
        ended = ended or DONE in lines
    status = connection.framing.status
    client.give_back(connection)
    if status != 200 or not came or not ended:
        raise Broke(f"an answer of {model} broke: status {status}, {came} tokens, {'ended' if ended else 'no end'}")


def tokens_of(line: bytes) -> int:
    """How many tokens one line of a stream brings."""
    if not line.startswith(DATA):
        return 0
    return sum(len(choice.get("token_ids") or ()) for choice in orjson.loads(line[len(DATA) - 1 :])["choices"])


def row(kind: str, adapters: int, clients: int, seen: Seen, seconds: float) -> dict[str, Any]:
    firsts = sorted(seen.firsts)
    return {
        "engine": kind,
        "adapters": adapters,
        "clients": clients,
        "tokens/s": round(seen.tokens / seconds, 1),
        "first token p50 ms": round(1000 * statistics.median(firsts), 2) if firsts else None,
        "first token p99 ms": round(1000 * firsts[int(0.99 * (len(firsts) - 1))], 2) if firsts else None,
        "answers": len(firsts),
    }


async def rows_of(kind: str, url: str, base: Path, adapters: Sequence[Path], seconds: float) -> list[dict[str, Any]]:
    serving, rows = HttpServing(url), []
    for count in ADAPTERS:
        for adapter in adapters[:count]:
            await serving.load(adapter.name, adapter)
        models = [adapter.name for adapter in adapters[:count]] or [str(base)]
        for clients in CLIENTS:
            rows.append(row(kind, count, clients, await measure(url, models, clients, seconds), seconds))
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), file=sys.stderr)
    await serving.close()
    return rows


def main() -> int:
    options, began = _options(), load_now()
    seconds = QUICK_SECONDS if options.quick else SECONDS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ev-serve-") as folder:
        base, adapters = make(Path(folder), options.base, Path(".everloop/cache").absolute(), max(ADAPTERS))
        for kind in options.engines:
            with engine(kind, Path(folder), base, options.dtype) as url:
                try:
                    rows += uvloop.run(rows_of(kind, url, base, adapters, seconds))
                except* Broke as errors:
                    raise SystemExit(str(errors.exceptions[0])) from None
    notes = [
        f"{seconds:g} s each after {WARM:g} s; base {options.base or 'tiny-k2, hardly trained'}; "
        f"at most {MOST_TOKENS} tokens; adapters of rank 8 on attention; vLLM in {options.dtype}",
        "clients are one process beside the engine, and take a part of the same cores",
        loads(began),
    ]
    part = set(options.engines) != set(ENGINES) or bool(options.base)
    publish("serving", rows, quick=options.quick, part=part, notes=notes)
    return 0


def _options() -> argparse.Namespace:
    made = parser(__doc__ or "")
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    made.add_argument("--base", default="", help="a base model's name or folder; else a small one, hardly trained")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of vLLM's numbers")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())

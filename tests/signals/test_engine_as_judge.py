"""A real engine as judge and as critic: the wire is the one that engines speak, and what comes back is taken for what
it is. What an untrained model says is nonsense, and nonsense is no opinion."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from reward.judges import JudgesHandler
from tests.conftest import DESK
from tests.engines import EngineProcess, running

pytestmark = [pytest.mark.processes, pytest.mark.models]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """It reads what a judge is asked, which is longer than other tests' prompts."""
    from trainer.policy import tiny_k2

    base = tmp_path_factory.mktemp("base") / "judge"
    tiny_k2.build(base, DESK, settings=tiny_k2.Settings(hidden=64, heads=2, context=4096, steps=(1, 1)))
    with running(EngineProcess(tmp_path_factory.mktemp("engine"), base), deadline=120) as made:
        yield made


def declared(table: str, engine: EngineProcess, **more: object) -> str:
    fields = {"name": "e", "url": f"http://127.0.0.1:{engine.port}/v1", "model": str(engine.base), "share": 1.0}
    fields |= {"rubric": "It names the topic.", "timeout": 120.0, **more}
    return f"{table}\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())


@pytest.mark.parametrize(("table", "source"), [("[[judge]]", "judge:e"), ("[critic]", "critic:e")])
def test_what_an_engine_says_is_counted_as_what_it_is(bench, engine, table, source):
    it = bench(declared(table, engine), JudgesHandler)
    it.take(it.call("c1", "where is my card", "card_arrival"), it.call("c2", "where is my loan", "no idea at all"))
    status = it.handler.status()["acme/desk"]
    its = status["judges"][source]
    print(status)
    assert its["tokens"] > 0, "it has answered"
    assert its["opinions"] + sum(status["failures"].values()) == 2, "each answer has an opinion, or a reason"
    assert set(status["failures"]) <= {f"{source} nonsense"}
    assert {name for call in ("c1", "c2") for name in it.words(call)} <= {source}

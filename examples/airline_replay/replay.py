"""Replay 200 recorded episodes of an airline agent through a running platform, and see what its reward model learns.

Every episode goes the way that a live agent's would: calls, tool results and its end by the SDK, then its outcome
as feedback. The platform assembles and scores them; afterwards they are asked for in SQL. A reward model must not
profit from having seen another trial of the same task, so tasks come in blocks: all episodes of a block are scored
before the first outcome of the block is given. ::

    everloop up                                        # in one terminal
    python -m examples.airline_replay.replay --url http://127.0.0.1:8080/v1 --key ek_…      # in another

It asks ``everloop sql`` for the scores: give it the same ``--home`` or ``--config`` as ``everloop up``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import everloop

from examples.airline_replay import evaluation, recorded
from examples.airline_replay.evaluation import Judged
from examples.airline_replay.recorded import Recorded, RecordingError


class ReplayFailed(Exception):
    """The platform did not take or score the episodes; says what is missing."""


class Sql:
    """``everloop sql`` of one installation."""

    def __init__(self, home: Path | None, config: Path | None) -> None:
        where = [("--home", home), ("--config", config)]
        self._where = [word for name, path in where if path is not None for word in (name, str(path))]

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Raises ReplayFailed where the command fails."""
        command = [sys.executable, "-m", "everloop.cli.main", "sql", *self._where, "--json", query]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ReplayFailed(f"'everloop sql' failed: {done.stderr.strip()}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def send(episode: Recorded, name: str, policy: str) -> list[str]:
    """One episode as its agent would have sent it; returns the ids of its calls."""
    calls: list[str] = []
    with everloop.record(name, policy=policy) as sent:
        for event in recorded.events(episode.messages):
            if isinstance(event, recorded.Call):
                calls.append(sent.call(event.prompt, event.output, model="gpt-4o"))
            else:
                sent.tool(event.name, event.arguments, event.result, error=event.error)
    flush()
    return calls


def flush() -> None:
    """Raises ReplayFailed where something was not taken: a replay that loses episodes measures nothing."""
    done = everloop.flush(60)
    stats = everloop.stats()
    if stats.dropped or not done:
        raise ReplayFailed(f"the gateway did not take everything: {stats}")


class Replay:
    """Sends blocks of tasks and waits until each step has reached the store."""

    def __init__(self, sql: Sql, policy: str, patience: float) -> None:
        self.sql = sql
        self.policy = policy
        self.patience = patience
        self.run = f"airline-{time.time_ns():x}"

    def block(self, episodes: list[Recorded]) -> list[float]:
        """What was said of each episode's last answer before any outcome of the block was given.

        An episode as a whole is judged by its last answer: that is what an outcome is learned for.
        """
        last = [send(one, self._name(one), self.policy)[-1] for one in episodes]
        query = f"select call, version, value from history.scores where call in ({_quoted(last)})"
        rows = self._wait(query, len(last))
        first = evaluation.first_scores(rows)
        for one in episodes:
            everloop.give_feedback(episode=self._name(one), policy=self.policy, outcome=one.outcome, name="solved")
        flush()
        self._wait(f"select call from scores where label is not null and call in ({_quoted(last)})", len(last))
        return [first[call] for call in last]

    def _name(self, episode: Recorded) -> str:
        return f"{self.run}-{episode.task}-{episode.trial}"

    def _wait(self, query: str, calls: int) -> list[dict[str, Any]]:
        """The query's rows, once they are about as many calls. Raises ReplayFailed where that takes too long."""
        end = time.monotonic() + self.patience
        while True:
            rows = self.sql.rows(query)
            found = len({row["call"] for row in rows})
            if found == calls:
                return rows
            if time.monotonic() > end:
                raise ReplayFailed(
                    f"after {self.patience:g} s the store has {found} of this block's {calls} scores. "
                    "Does 'everloop status' show assembler and scorer at work, on the same --home?"
                )
            time.sleep(0.5)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def replay(episodes: list[Recorded], replayer: Replay, size: int, seed: int) -> tuple[list[Judged], int]:
    """(episodes with a score said by a model that had learned something, how many came before that)."""
    judged: list[Judged] = []
    skipped = 0
    for number, tasks in enumerate(evaluation.blocks((one.task for one in episodes), size, seed)):
        own = [one for one in episodes if one.task in tasks]
        scores = replayer.block(own)
        if number == 0:
            skipped = len(own)
        else:
            judged += [
                Judged(one.task, one.outcome, score, one.length, one.tool_calls)
                for one, score in zip(own, scores, strict=True)
            ]
        named = ", ".join(map(str, sorted(tasks)))
        print(f"block {number + 1}: tasks {named}: {len(own)} episodes scored, then learned", flush=True)
    return judged, skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the gateway (else EVERLOOP_URL)")
    parser.add_argument("--key", help="an API key (else EVERLOOP_API_KEY)")
    parser.add_argument("--policy", default="assistant", help="policy that the episodes are recorded under")
    parser.add_argument("--file", type=Path, help="the recording (else EVERLOOP_DATA, else the cache)")
    parser.add_argument("--cache", type=Path, default=Path(".everloop/cache"))
    parser.add_argument("--home", type=Path, help="of the running platform, for 'everloop sql'")
    parser.add_argument("--config", type=Path, help="of the running platform, for 'everloop sql'")
    parser.add_argument("--tasks", type=int, default=50, help="the first so many tasks, four episodes each")
    parser.add_argument("--block", type=int, default=5, help="tasks that are scored before any of them is learned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for scores of a block")
    options = parser.parse_args()
    try:
        whole = recorded.read(recorded.find(options.file, options.cache))
        episodes = [one for one in whole if one.task < options.tasks]
        everloop.configure(options.url, options.key, strict=True)
        replayer = Replay(Sql(options.home, options.config), options.policy, options.patience)
        judged, skipped = replay(episodes, replayer, options.block, options.seed)
    except (RecordingError, ReplayFailed) as error:
        print(error, file=sys.stderr)
        return 1
    if len({one.outcome for one in judged}) < 2:
        print("All of these episodes ended alike, so there is nothing to foretell: take more --tasks", file=sys.stderr)
        return 1
    print(evaluation.table(judged, skipped, options.seed))
    print(f"Ask more: everloop sql \"select * from episodes where policy = '{options.policy}' limit 5\"")
    return 0


if __name__ == "__main__":
    sys.exit(main())

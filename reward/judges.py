"""The stream handler "judge": episodes in; what rubric judges and critics think of its answers out, as feedback events.

::

    handle: decode, choose the answers to ask about ──▶ waiting
    flush:  ask about all that waits, a few at a time (:mod:`reward.asking`) ──▶ events

A declared share of the answers is asked about, by a hash of their names: what a judge is worth is learned on those that
people speak of too, so they are not left out. Where one request has several answers the first two are compared, in both
orders, and only where the order makes no difference one is the better (1) and the other the worse (0). A judge that is
away or slow is given up for that version of the episode; the next version asks again. What a judge says is an implicit
word of the source ``judge:<name>``, never an outcome.

A critic is the policy itself. It always compares two of its own answers; where a request has one alone it is asked for
another, which nobody ever sees, and only the one that was given gets a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import ormsgpack
from everloop.config import Config
from everloop.episode import Episode
from everloop.errors import ConfigError
from everloop.event import ELSEWHERE, PROVIDER, Call
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.stream import State
from everloop.topics import EPISODES

from reward.asking import LASTING, Asked, Asker
from reward.declaration import CriticDeclaration, Declaration, JudgeDeclaration
from reward.features import answer_text, prompt_text
from reward.judging import Opinion, Question, question
from reward.ledger import Ledger
from reward.signals import chosen, declarations, read
from reward.told import About, Told, Whose, changes, may_be_judged

DAY = 86_400
SETTLED = (*LASTING, "swayed")


@dataclass
class Remembered:
    """Of one episode. ``opinions``: by ``call<tab>source`` what each thinks; None: it was asked and does not say."""

    version: int = -1
    told: Told = field(default_factory=dict)
    opinions: dict[str, float | None] = field(default_factory=dict)


class Matter(NamedTuple):
    """One question, and the calls that it is about: one, or the two that are compared. ``again``: see
    :class:`reward.asking.Asked`."""

    judge: JudgeDeclaration | CriticDeclaration
    calls: tuple[str, ...]
    question: Question
    again: Call | None = None

    def memos(self) -> list[str]:
        return [f"{call}\t{self.judge.source}" for call in self.calls]

    def values(self, opinion: Opinion) -> list[float | None]:
        return [opinion.value, None if opinion.value is None else 1 - opinion.value][: len(self.calls)]


class JudgesHandler:
    """See the module. ``asker``: None: one with a ledger in the home, ``state/judges.db``.

    Raises ConfigError where a declaration is none, or a key file cannot be read.
    """

    name = "judge"
    topics = (EPISODES.name,)

    def __init__(self, config: Config, home: Home, asker: Asker | None = None) -> None:
        self._home = home
        self._declared = declared(config)
        self._asker = asker or Asker(Ledger(home.folder("state") / "judges.db"))
        self._words: dict[tuple[str, str], Counter[str]] = {at: Counter() for at in self._declared}
        self._waiting: list[Episode] = []
        for its in self._declared.values():
            for judge in its.asked:
                check_key(judge)

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        episode = read(record, self._home)
        its = self._declared.get((episode.tenant, episode.policy))
        if its is not None and may_be_judged(episode, its.also):
            self._waiting.append(episode)
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        """Retried whole: what was answered is remembered and not asked again."""
        newest = {Whose.of(episode): episode for episode in self._waiting}
        known = {whose: _load(state, whose) for whose in newest}
        fresh = {whose: one for whose, one in newest.items() if one.version > known[whose].version}
        matters = [
            (whose, matter)
            for whose, episode in fresh.items()
            for matter in _matters(self._declared[whose.tenant, whose.policy], episode)
            if any(key not in known[whose].opinions for key in matter.memos())
        ]
        asked = [
            Asked((at.tenant, at.policy), matter.judge, matter.question, int(fresh[at].updated // DAY), matter.again)
            for at, matter in matters
        ]
        for (whose, matter), opinion in zip(matters, self._asker.ask(asked), strict=True):
            if opinion.fault in SETTLED:
                known[whose].opinions.update(zip(matter.memos(), matter.values(opinion), strict=True))
        records = [record for whose, one in fresh.items() for record in self._say(state, whose, one, known[whose])]
        self._waiting = []
        return records

    def _say(self, state: State, whose: Whose, episode: Episode, known: Remembered) -> list[NewRecord]:
        known.version = episode.version
        found = {}
        for key, value in known.opinions.items():
            if value is not None:
                found[About(*key.split("\t"))] = value
        records = changes(whose, episode.updated, known.told, found, self._words[whose.tenant, whose.policy])
        state.put("episode/" + "/".join(whose), ormsgpack.packb(astuple(known)))
        return records

    def status(self) -> dict[str, dict[str, Any]]:
        """By 'tenant/policy', since the start: words by source, failures by ``<source> <fault>``, and for each
        source what it was asked and how long it took."""
        found: dict[str, dict[str, Any]] = {
            "/".join(at): {"words": dict(words), "failures": {}, "judges": {}} for at, words in self._words.items()
        }
        for (tenant, policy, source), its in list(self._asker.tallies.items()):
            one = found[f"{tenant}/{policy}"]
            one["failures"] |= {f"{source} {fault}": count for fault, count in its.faults.copy().items()}
            one["judges"][source] = {
                "questions": its.questions,
                "remembered": its.remembered,
                "opinions": its.opinions,
                "mean_seconds": round(its.seconds / its.replies, 3) if its.replies else None,
                "tokens": its.tokens,
                "trouble": its.trouble,
            }
        return found


def declared(config: Config) -> dict[tuple[str, str], Declaration]:
    """The declarations with a judge or a critic, by (tenant, policy). Raises ConfigError."""
    return {at: its for at, its in declarations(config).items() if its.asked}


def _matters(its: Declaration, episode: Episode) -> Iterator[Matter]:
    """What there is to ask about an episode: of each request one question a judge, by the share."""
    turns = [(at, turn) for at, turn in zip(episode.positions, episode.turns, strict=True) if turn.call.error is None]
    for _, group in groupby(turns, key=lambda one: one[0]):
        answers: dict[str, str] = {}  # by text: the same answer twice is one
        for _, turn in group:
            last = turn.call
            answers.setdefault(answer_text(turn.call.output), turn.call.id)
            asked = prompt_text(turn.call.messages)
        texts = [text for text in answers if text][:2]
        calls = tuple(answers[text] for text in texts)
        for judge in its.asked:
            critic = isinstance(judge, CriticDeclaration)
            if critic and last.policy_version in (PROVIDER, ELSEWHERE):
                continue  # not the policy's own
            if texts and chosen(judge.share, episode.id, calls[0], judge.source):
                alone = critic and len(texts) == 1
                yield Matter(judge, calls, question(asked, *texts), last if alone else None)


def check_key(judge: JudgeDeclaration | CriticDeclaration) -> None:
    """Raises ConfigError where the file of its key cannot be read."""
    if judge.key_file is None:
        return
    try:
        judge.key_file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{judge.source}: its key_file cannot be read: {error}; write the key there") from None


def _load(state: State, whose: Whose) -> Remembered:
    held = state.get("episode/" + "/".join(whose))
    return Remembered(*ormsgpack.unpackb(held)) if held else Remembered()

"""The stream handler "score": episodes in, scores and reward versions out; one model for each (tenant, policy).

::

    handle: decode, find what there is to learn; refuse what is no episode ──▶ waiting
    flush:  encode all texts of the batch at once; then, one episode after the other:
            predict ──▶ learn what is new ──▶ snapshot every N updates ──▶ score what changed

Two clocks: the live model learns every word at once, the newest snapshot of it scores, so that every score can be
made again from the version that it names. State, written with the offsets: the models, and for each episode what
was learned and scored. What is learned depends on the order of episodes alone, not on how they fell into batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import ormsgpack
from everloop import wire
from everloop.config import Config, RewardConfig
from everloop.episode import Episode, Split
from everloop.errors import ConfigError, ContractError
from everloop.feedback import FeedbackKind
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.score import Score
from everloop.stream import State
from everloop.topics import EPISODES, SCORES

from reward import comments, course, declaration, evidence, hearing, poison, unlearning
from reward.desk import Desk
from reward.evidence import Said
from reward.features import Example, examples
from reward.model import Estimate, Label, Pair, Trace, Vectors
from reward.orders import Office, Orders, announcement, nobody
from reward.taught import Place, Taught

Encoders = Callable[[str], Vectors]
"""The encoder of a configured name; the same object for the same name."""


@dataclass(frozen=True)
class Read:
    """One episode version, and everything in it that matters here."""

    record: Record
    episode: Episode
    examples: list[Example]
    lessons: list[tuple[int, Label | Pair]]


@dataclass
class Known:
    """What is remembered of an episode.

    ``calls``: by call id, what was expected, what it was scored by, under ``taught`` the trace of each label that was
    learned, by its id, under ``heard`` the words from which it was learned how far whom is right, and under ``course``
    how the episode was foretold to end when the call was new. ``end``: see :func:`reward.course.learn`.
    """

    version: int = -1
    learned: list[str] = field(default_factory=list)
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def unpacked(cls, held: bytes) -> Known:
        """What a later release has put behind these fields is left out: workers of both run while one is replaced."""
        return cls(*ormsgpack.unpackb(held)[: len(fields(cls))])

    def packed(self) -> bytes:
        return ormsgpack.packb([self.version, self.learned, self.calls, self.end])

    def call(self, name: str) -> dict[str, Any]:
        return self.calls.setdefault(name, {})


class RewardHandler:
    """See the module. ``encoders`` gives the encoder of a configured name; it may load its weights late.
    ``ordered`` gives a person's orders, and ``office`` says what became of them: :mod:`reward.orders`.

    Raises ConfigError where a policy's reward declaration is none.
    """

    name = "score"
    topics = (EPISODES.name,)

    def __init__(self, config: Config, home: Home, encoders: Encoders, ordered: Orders = nobody) -> None:
        self.office = Office(ordered)
        self._config = config
        self._home = home
        self._encoders = encoders
        self._waiting: list[Read] = []
        self._desks: dict[tuple[str, str], Desk] = {}
        self._status: dict[str, dict[str, Any]] = {}
        for tenant, policy in config.policies():  # what is wrong in a declaration is refused at the start
            declaration.load(config.policy(tenant, policy).reward.declaration)

    @staticmethod
    def route_of(key: str) -> str | None:
        """See :class:`everloop.stream.Movable`: episodes come by their policy."""
        _, tenant, policy, _ = key.split("/", 3)
        return f"{tenant}/{policy}"

    @staticmethod
    def moved(key: str, value: bytes) -> bytes:
        """See :class:`everloop.stream.Movable`: versions count, not offsets."""
        return value

    @staticmethod
    def joined(key: str, values: Sequence[bytes]) -> bytes:
        """See :class:`everloop.stream.Movable`: every entry is of a policy."""
        raise ValueError(f"{key!r} is of no policy")

    def handle(self, state: State, record: Record, now: float) -> list[NewRecord]:
        if record.value is None:
            raise ContractError("an episode has no value; episodes are never deleted by tombstone")
        episode = wire.decode(Episode, record.value, self._home.blobs)
        if episode.key != record.key:
            raise ContractError(f"episode {episode.key} lies under the key {record.key}; it cannot join either")
        its = examples(episode)
        lessons = evidence.lessons(episode, its) if teaches(episode) else []
        self.office.saw(record)
        self._waiting.append(Read(record, episode, its, lessons))
        return []

    def flush(self, state: State, now: float) -> list[NewRecord]:
        """Retried whole: what a failed one had learned in memory is dropped, what it had saved is the same again."""
        if self._status and not self._waiting and not any(map(self.office.at_rest, self._desks.values())):
            return []
        try:
            desks = {(read.episode.tenant, read.episode.policy): read.episode for read in self._waiting}
            for tenant, policy in [*self._config.policies(), *desks]:
                self._open(state, tenant, policy)
            self._encode()
            outputs = [record for read in self._waiting for record in self._take(state, read)]
            for at, desk in self._desks.items():
                before = desk.obeyed
                outputs += self.office.obey(desk, self.office.at_rest(desk))
                if at in desks or desk.obeyed > before or desk.guard.vouched() or desk.guard.to_take_back():
                    outputs += _let_in(state, desk) + _taken_back(state, desk)
                    desk.write(state)
        except BaseException:
            self._desks.clear()
            raise
        self._waiting = []
        self._status = {"/".join(at): desk.status() for at, desk in self._desks.items()}
        return outputs

    def status(self) -> dict[str, dict[str, Any]]:
        """By 'tenant/policy', as of the last batch. From any thread."""
        return self._status

    def _open(self, state: State, tenant: str, policy: str) -> None:
        desk = self._desks.get((tenant, policy))
        if desk is None or desk.stale(state):
            config = self._reward_config(tenant, policy)
            desk = Desk(tenant, policy, config, self._encoders(config.encoder), self._home.root)
            self._desks[tenant, policy] = desk.read(state)

    def _reward_config(self, tenant: str, policy: str) -> RewardConfig:
        try:
            return self._config.policy(tenant, policy).reward
        except ConfigError:  # a policy that was taken out of the configuration: its episodes are scored as by default
            return RewardConfig()

    def _encode(self) -> None:
        """Bring the vectors of the whole batch into the encoders' memory, from which every later step reads them."""
        texts: dict[int, tuple[Vectors, dict[str, None]]] = {}
        for read in self._waiting:
            encoder = self._desks[read.episode.tenant, read.episode.policy].live.encoder
            _, ours = texts.setdefault(id(encoder), (encoder, {}))
            for example in read.examples:
                ours.update({example.prompt: None, example.answer: None})
            for words in evidence.words(read.episode):
                ours.update({word.text[: comments.CHARS]: None for word in words if comments.is_one(word)})
            for _, lesson in read.lessons:
                if isinstance(lesson, Pair):
                    ours.update({lesson.chosen: None, lesson.rejected: None})
        for encoder, ours in texts.values():
            encoder.encode(list(ours))

    def _take(self, state: State, read: Read) -> list[NewRecord]:
        """Learn from one episode version and score what changed in it; nothing where it was taken before."""
        episode = read.episode
        desk = self._desks[episode.tenant, episode.policy]
        desk.live.offsets[f"{read.record.topic}/{read.record.partition}"] = read.record.offset + 1
        known = _known(state, desk, episode.id)
        outputs = self.office.obey(desk, self.office.due(desk, read.record))
        if episode.version <= known.version:
            return outputs
        known.version = episode.version
        outputs += [] if desk.version else [version_record(desk, episode.updated)]
        outputs += _learn(desk, read, known)
        outputs += _taken_back(state, desk, {episode.id: known})
        outputs += _score(desk, read, known)
        course.learn(desk.live, episode, read.examples, known.calls, known.end, teaches=teaches(episode))
        _keep(state, desk, episode.id, known)
        return outputs


def _known(state: State, desk: Desk, episode: str) -> Known:
    held = state.get(f"episode/{desk.tenant}/{desk.policy}/{episode}")
    return Known.unpacked(held) if held else Known()


def _keep(state: State, desk: Desk, episode: str, known: Known) -> None:
    state.put(f"episode/{desk.tenant}/{desk.policy}/{episode}", known.packed())


def teaches(episode: Episode) -> bool:
    """Whether the model may learn from an episode: not from held-out, synthetic or quarantined ones."""
    return episode.split is Split.TRAIN and not episode.synthetic and episode.quarantine is None


def _learn(desk: Desk, read: Read, known: Known) -> list[NewRecord]:
    """Learn each word that was not learned before; note what was expected of a call before its first label."""
    outputs = []
    trust = desk.live.reliability
    hearing.before(desk.live, read.episode, known.calls, teaches(read.episode))
    read = replace(read, lessons=evidence.lessons(read.episode, read.examples, trust) if read.lessons else [])
    _take_back(desk, read, known)
    for number, lesson in read.lessons:
        call = known.call(read.episode.turns[number].call.id)
        if lesson.id in known.learned or any(lesson.id in one.get("held", {}) for one in known.calls.values()):
            continue
        first = isinstance(lesson, Label) and lesson.watched and "predicted" not in call
        if isinstance(lesson, Label):
            about = read.episode.judged if evidence.is_credited(lesson) else number
            rarity = hearing.rarity(desk.live, read.episode, read.examples, about, known.calls)
            lesson = replace(lesson, watched=first, rarity=rarity)
        raters = _raters(read.episode, number, lesson)
        words = evidence.words_of(read.episode, number, lesson)
        said = max((word.time for word in words), default=read.episode.updated)
        place = Place(read.episode.id, read.episode.turns[number].call.id, said)
        measured = any(word.kind is FeedbackKind.OUTCOME for word in words)
        verdict = _weighed(desk, lesson, place, raters, measured)
        if verdict.rule:
            call.setdefault("held", {})[lesson.id] = verdict.says
            continue
        if isinstance(lesson, Label):
            hearing.spoke(desk.live, read.episode, read.examples, about, known.calls)
        able = desk.live.may_judge
        expected, due = _teach(desk, poison.weighted(lesson, verdict.weight), known, place, raters, measured)
        if first and isinstance(lesson, Label):
            call["predicted"] = expected
            if able:
                call["vote"] = expected
            desk.watch.label(lesson.value, lesson.rarity)
        if due:
            outputs.append(version_record(desk, read.episode.updated))
    hearing.after(desk.live, read.episode, known.calls, teaches(read.episode))
    return outputs


def _raters(episode: Episode, number: int, lesson: Label | Pair) -> list[str]:
    """The people who said what a lesson was made of, as far as they are known. An outcome is measured, and decides
    whatever people say beside it: it is theirs alone who are named with it."""
    words = [word for word in evidence.words_of(episode, number, lesson) if word.source is None]
    measured = [word for word in words if word.kind is FeedbackKind.OUTCOME]
    if measured and isinstance(lesson, Label):
        return [word.rater for word in measured if word.rater]
    return [rater for word in words if (rater := word.rater or episode.subject)]


def _weighed(desk: Desk, lesson: Label | Pair, place: Place, raters: Sequence[str], measured: bool) -> poison.Verdict:
    """What the guard makes of a lesson, whose share is all that it weighs; what it holds is kept for a person."""
    verdict = desk.guard.weigh(_in_all(lesson), raters, place.call, place.time, lambda: desk.agrees(lesson))
    if verdict.rule:
        desk.guard.hold(lesson, verdict, place, raters, measured)
    return _each(lesson, verdict)


def _in_all(lesson: Label | Pair) -> Label | Pair:
    """With the weight that the heads learn it with."""
    return poison.weighted(lesson, lesson.weight * lesson.rarity) if isinstance(lesson, Label) else lesson


def _each(lesson: Label | Pair, verdict: poison.Verdict) -> poison.Verdict:
    """What :func:`_in_all` put on the weight, taken off again."""
    return verdict._replace(weight=verdict.weight / lesson.rarity) if isinstance(lesson, Label) else verdict


def _teach(
    desk: Desk, lesson: Label | Pair, known: Known, place: Place, raters: Sequence[str], measured: bool
) -> tuple[float, bool]:
    """See :meth:`Desk.learn`; the episode remembers it, and the guard what its raters taught."""
    before = desk.live.updates
    expected, due = desk.learn(lesson, raters)
    known.learned.append(lesson.id)
    trace = desk.live.trace
    if trace is not None:
        known.call(place.call).setdefault("taught", {})[lesson.id] = [*trace]
    if (raters or isinstance(lesson, Pair)) and desk.live.updates > before:
        trace = trace or Trace(1.0, 0.0, 0.0, desk.live.reservoir.count - 1)
        desk.guard.taught.note(Taught(lesson, trace, place, list(raters), measured))
    return expected, due


def _taken_back(state: State, desk: Desk, open_: dict[str, Known] | None = None) -> list[NewRecord]:
    """See :mod:`reward.unlearning`. ``open_``: the episodes that are being taken, which their caller keeps."""
    found: dict[str, Known] = {}

    def known_of(episode: str) -> Known:
        if open_ and episode in open_:
            return open_[episode]
        if episode not in found:
            found[episode] = _known(state, desk, episode)
        return found[episode]

    doomed = desk.guard.to_take_back()
    if not doomed:
        return []
    time = max(taught.place.time for taught, _ in doomed)
    frozen = [] if desk.version else [version_record(desk, time)]  # what scores has a name
    scores = unlearning.take_back(desk, doomed, known_of)
    for episode, known in found.items():
        _keep(state, desk, episode, known)
    return [*frozen, *map(score_record, scores)]


def _let_in(state: State, desk: Desk) -> list[NewRecord]:
    """Learn what was held and a person trusts by now, as far as shares let. Its score stays: the episode is not at
    hand."""
    outputs = []
    for about, lesson in desk.guard.vouched():
        place = Place(about["episode"], about["call"], about["time"])
        verdict = _each(lesson, desk.guard.admit(_in_all(lesson), about["raters"]))
        if verdict.rule:
            desk.guard.hold(lesson, verdict, place, about["raters"], about["measured"])
            continue
        known = _known(state, desk, about["episode"])
        call = known.call(about["call"])
        call.get("held", {}).pop(lesson.id, None)
        desk.guard.drop(lesson.id)
        first = isinstance(lesson, Label) and lesson.watched and "predicted" not in call
        lesson = poison.weighted(lesson, verdict.weight)
        expected, due = _teach(desk, lesson, known, place, about["raters"], about["measured"])
        if first and isinstance(lesson, Label):
            call["predicted"] = expected
            desk.watch.label(lesson.value, lesson.rarity)
        _keep(state, desk, about["episode"], known)
        outputs += [version_record(desk, about["time"])] if due else []
    return outputs


def _take_back(desk: Desk, read: Read, known: Known) -> None:
    """Undo what was revised or withdrawn, so that a word said again later is learned again. A pair of long ago, which
    the guard remembers no more, stays learned."""
    standing = {lesson.id for _, lesson in read.lessons}
    for name in [name for name in known.learned if name not in standing and name in desk.guard.taught.kept]:
        if isinstance((taught := desk.guard.taught.get(name)).lesson, Pair):
            desk.take_back(taught)
            desk.guard.forget(name)
            known.learned.remove(name)
    for turn, example in zip(read.episode.turns, read.examples, strict=True):
        taught = known.call(turn.call.id).get("taught", {})
        for name in [name for name in taught if name not in standing]:
            desk.live.take_back(name, example, Trace(*taught.pop(name)))
            desk.guard.forget(name)
            known.learned.remove(name)
        held = known.call(turn.call.id).get("held", {})
        for name in [name for name in held if name not in standing]:
            desk.guard.forget(name)
            del held[name]


def _score(desk: Desk, read: Read, known: Known) -> list[NewRecord]:
    """Scores of the calls that are new, or of which something else is said than when they were scored last."""
    episode = read.episode
    calls = [known.call(turn.call.id) for turn in episode.turns]
    held = [hearing.held(turn.call.id, call) for turn, call in zip(episode.turns, calls, strict=True)]
    digests = [
        hashlib.blake2b(repr((*both, episode.quarantine)).encode("utf-8", "replace"), digest_size=8).digest()
        for both in zip(evidence.words(episode), held, read.examples, strict=True)
    ]
    fresh = [i for i, call in enumerate(calls) if call.get("scored") != digests[i]]
    estimates = desk.estimate([read.examples[i] for i in fresh])
    new = [i for i in fresh if "scored" not in calls[i]]
    for i, both in zip(new, course.foretold(desk.scoring, episode, read.examples, new), strict=True):
        calls[i].update({} if both is None else {"course": both})
    heard = evidence.said(episode, desk.scoring.reliability)
    said = [one.measured if why else one for one, why in zip(heard, held, strict=True)]
    outputs = []
    for i, estimate in zip(fresh, estimates, strict=True):
        score = score_of(
            episode,
            i,
            estimate,
            said[i],
            quarantined=held[i],
            version=desk.version,
            pessimism=desk.scoring.config.pessimism,
            predicted=calls[i].get("predicted"),
            ends_well=calls[i].get("course"),
        )
        if "scored" not in calls[i] and teaches(episode):
            desk.live.saw(read.examples[i])
            if score.mask:
                desk.watch.rewards.add(score.reward)
        calls[i]["scored"] = digests[i]
        outputs.append(score_record(score))
    return outputs


def score_of(
    episode: Episode,
    turn: int,
    estimate: Estimate,
    said: Said,
    *,
    version: str,
    pessimism: float,
    predicted: float | None,
    quarantined: str | None = None,
    ends_well: Sequence[float] | None = None,
) -> Score:
    """The score of one turn: the strongest source decides; a failed call or a quarantined episode is masked."""
    final, source = evidence.decide(estimate, said, pessimism)
    call = episode.turns[turn].call
    return Score(
        tenant=episode.tenant,
        policy=episode.policy,
        episode=episode.id,
        version=episode.version,
        call=call.id,
        reward_version=version,
        value=final.value,
        spread=final.spread,
        reward=final.reward,
        mask=final.mask and call.error is None and episode.quarantine is None,
        source=source,
        label=said.label,
        predicted=predicted,
        quarantined=quarantined,
        ends_well_before=ends_well[0] if ends_well else None,
        ends_well_after=ends_well[1] if ends_well else None,
        time=episode.updated,
    )


def score_record(score: Score) -> NewRecord:
    about = f"{score.policy}/{score.episode}/{score.version}/{score.call}/{score.reward_version}"
    return NewRecord(SCORES.name, score.key, wire.encode(score), {"schema": "Score", "id": about}, score.time)


def version_record(desk: Desk, time: float) -> NewRecord:
    """Freeze the live model as a version, and announce it."""
    return announcement(desk.freeze(time))

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

from collections.abc import Callable, Sequence
from typing import Any

from everloop import wire
from everloop.config import Config, RewardConfig
from everloop.episode import Episode
from everloop.errors import ConfigError, ContractError
from everloop.home import Home
from everloop.log.base import NewRecord, Record
from everloop.stream import State
from everloop.topics import EPISODES

from reward import comments, course, declaration, evidence, learning, scoring
from reward.desk import Desk
from reward.features import examples
from reward.known import Read, keep, recall, teaches
from reward.model import Pair, Vectors
from reward.orders import Office, Orders, nobody

Encoders = Callable[[str], Vectors]
"""The encoder of a configured name; the same object for the same name."""


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
                    outputs += learning.let_in(state, desk) + learning.take_back_of_silenced(state, desk)
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
        known = recall(state, desk, episode.id)
        outputs = self.office.obey(desk, self.office.due(desk, read.record))
        if episode.version <= known.version:
            return outputs
        known.version = episode.version
        outputs += [] if desk.version else [learning.version_record(desk, episode.updated)]
        outputs += learning.learn(desk, read, known)
        outputs += learning.take_back_of_silenced(state, desk, {episode.id: known})
        outputs += scoring.score(desk, read, known)
        course.learn(desk.live, episode, read.examples, known.calls, known.end, teaches=teaches(episode))
        keep(state, desk, episode.id, known)
        return outputs

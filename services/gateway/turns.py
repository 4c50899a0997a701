"""The beginning of a call: which episode it is in, who it is about, which policy version answers it."""

from __future__ import annotations

import functools
import os
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from everloop.config import Config, PolicyConfig
from everloop.event import BASE, PROVIDER
from everloop.ids import Ids
from everloop.release import point

from services.gateway.answer import capture_fields
from services.gateway.ask import Ask, explore
from services.gateway.checks import bad
from services.gateway.conversations import Conversation, Conversations
from services.gateway.door import header
from services.gateway.keys import Key
from services.gateway.provider import Providers
from services.gateway.refusals import Refused
from services.gateway.routes import Assignment, Routes
from services.gateway.tries import Aside, aside

LATEST = 2**53
DIGITS = len(str(LATEST))


@dataclass(slots=True)
class Turn:
    """One request on its way: who, where in which episode, and who answers it.

    ``call`` is the id of its first answer; ``served`` the version that answered, which differs from the assigned
    one where that was not loaded. ``started`` is in seconds since 1970, ``began`` the same on the monotonic clock.
    ``conversation`` is None where nothing is recorded: then episode and call are empty. ``aside`` is what the
    policy's provider would be asked; None: it has none.
    """

    tenant: str
    policy: str
    base: str
    assignment: Assignment
    served: str
    pinned: bool
    response: str
    episode: str = ""
    call: str = ""
    subject: str | None = None
    seq: int | None = None
    request: str = ""
    conversation: Conversation | None = None
    started: float = 0.0
    began: float = 0.0
    size: int = 0
    stored: bool = False
    aside: Aside | None = None

    @property
    def model(self) -> str:
        """The name of the model that answered, its adapter apart."""
        return self.aside.provider.config.model if self.aside is not None and self.served == PROVIDER else self.base

    @property
    def instead_of(self) -> str | None:
        """The version that was to answer, where another one did."""
        return self.assignment.version if self.served != self.assignment.version else None

    @property
    def recorded(self) -> bool:
        return self.conversation is not None

    @property
    def headers(self) -> dict[str, str]:
        """The response id is there as clients name it: some of them show no other."""
        if not self.recorded:
            return {"X-Request-Id": self.response, "X-Everloop-Policy-Version": self.served}
        return {
            "X-Request-Id": self.response,
            "X-Everloop-Episode": self.episode,
            "X-Everloop-Call": self.call,
            "X-Everloop-Policy-Version": self.served,
            "X-Everloop-Arm": self.assignment.arm,
        }


class Turns:
    """Begins calls. Used by the event loop alone."""

    def __init__(
        self, config: Config, ids: Ids, routes: Routes, conversations: Conversations, providers: Providers
    ) -> None:
        self._config = config
        self._providers = providers
        self._ids = ids
        self._routes = routes
        self._conversations = conversations
        self._unique = random.Random(os.urandom(32))  # call ids must differ, not be secret: no system call each

    def begin(self, request: web.Request, key: Key, ask: Ask, mark: str, size: int) -> Turn:
        """A call that will be recorded. ``mark`` names the request for its retries; ``size`` is its body's bytes."""
        config = self._config.policy(key.tenant, ask.policy)
        began, started = time.monotonic(), time.time()
        named = header(request, "X-Everloop-Subject") or ask.user
        subject = self._ids.pseudonym(key.tenant, "subject", named) if named else None
        conversation = Conversation(key.tenant, ask.policy, subject, ask.messages)
        episode = self._episode(request, key, conversation, config, began)
        assignment = self._assignment(key, ask, episode, subject, config, began)
        unique = self._unique.randbytes(8)
        call = self._ids.call(unique)
        beside = self._aside(key, ask, assignment.version)
        own = ask.pin is None and assignment.version != PROVIDER
        if config.explore and own and point("explore", call) < config.explore:
            explore(ask)
        capture_fields(ask.route, ask.body)
        return Turn(
            tenant=key.tenant,
            policy=ask.policy,
            base=config.base,
            assignment=assignment,
            served=assignment.version,
            pinned=ask.pin is not None,
            response=self._ids.response(key.tenant, episode, unique, ask.prefix),
            episode=episode,
            call=call,
            subject=subject,
            seq=_seq(request),
            request=mark,
            conversation=conversation,
            started=started,
            began=began,
            size=size,
            aside=beside,
        )

    def begin_unrecorded(self, key: Key, ask: Ask) -> Turn:
        """A call that leaves nothing behind: it takes no part in a canary, and nobody can rate its response id."""
        version = self._pinned(key, ask) if ask.pin else self._live(key.tenant, ask.policy)
        return Turn(
            tenant=key.tenant,
            policy=ask.policy,
            base=self._config.policy(key.tenant, ask.policy).base,
            assignment=Assignment(version),
            served=version,
            pinned=ask.pin is not None,
            response=f"{ask.prefix}unrecorded-{secrets.token_hex(12)}",
            began=time.monotonic(),
            aside=self._aside(key, ask, version),
        )

    def trained(self, key: Key) -> Callable[[str], str | None]:
        """Whose checkpoint a name means, for ``ask.read``."""
        return functools.partial(self._routes.names.policy_of, key.tenant)

    def versions(self, turn: Turn) -> list[str]:
        """Who may answer, in order: the assigned version; where an engine lacks it, the live one, then the base.

        An incumbent provider stands where the base would; any provider stands last, for where no engine answers. A
        pinned adapter stands alone, and once more after it was loaded.
        """
        version = turn.assignment.version
        if turn.pinned:
            return [version] * (1 if version in (BASE, PROVIDER) else 2)
        live, base = self._live(turn.tenant, turn.policy), self._who(turn.tenant, turn.policy, BASE)
        order = dict.fromkeys((version, live, base))
        if turn.aside is not None:
            order[PROVIDER] = None
            if turn.aside.unfit is not None:
                del order[PROVIDER]
        return list(order)

    def answered(self, turn: Turn, message: dict[str, object]) -> None:
        """Remember where this conversation stands: a request that goes on from here is the same episode."""
        if turn.conversation is not None:
            idle = self._config.policy(turn.tenant, turn.policy).idle
            digest = turn.conversation.after(message)
            self._conversations.answered(digest, turn.episode, idle, time.monotonic())

    def _episode(
        self, request: web.Request, key: Key, conversation: Conversation, config: PolicyConfig, now: float
    ) -> str:
        name = header(request, "X-Everloop-Episode")
        if name is None:
            held = self._conversations.continues(conversation, config.idle, now)
            return held or self._ids.new_episode(key.tenant)
        return named_episode(self._ids, key.tenant, name)

    def _assignment(
        self, key: Key, ask: Ask, episode: str, subject: str | None, config: PolicyConfig, now: float
    ) -> Assignment:
        """An episode stays on its version for as long as that may answer; a new one falls by hash of its unit."""
        if ask.pin is not None:
            return Assignment(self._pinned(key, ask))
        known = self._conversations.known(episode, config.idle, now)
        if (
            known is not None
            and known.policy == ask.policy
            and self._routes.resident(key.tenant, ask.policy, known.assignment.version)
        ):
            assignment = known.assignment
        else:
            drawn = self._routes.assign(key.tenant, ask.policy, subject or episode)
            assignment = drawn._replace(version=self._who(key.tenant, ask.policy, drawn.version))
        self._conversations.assigned(episode, ask.policy, assignment, now)
        return assignment

    def _who(self, tenant: str, policy: str, version: str) -> str:
        """Whom a route means: by 'base' the provider, where that is the incumbent."""
        provider = self._providers.of(tenant, policy) if version == BASE else None
        return PROVIDER if provider is not None and provider.incumbent else version

    def _live(self, tenant: str, policy: str) -> str:
        return self._who(tenant, policy, self._routes.live(tenant, policy))

    def _aside(self, key: Key, ask: Ask, version: str) -> Aside | None:
        """What the provider would be asked. Raises Refused (400) where it is to answer this and cannot.

        While a canary runs against it, also for the canary's people: both arms take the same requests.
        """
        made = aside(self._providers.of(key.tenant, ask.policy), ask)
        asked = version == PROVIDER or (ask.pin is None and self._live(key.tenant, ask.policy) == PROVIDER)
        if made is not None and made.unfit is not None and asked:
            raise bad(made.unfit, code="unsupported_parameter")
        return made

    def _pinned(self, key: Key, ask: Ask) -> str:
        """The one version that a pin or a checkpoint's name means: base, provider, or an adapter of this policy."""
        if not key.may("pin"):
            raise Refused(
                403,
                f"a key of scope '{key.scope}' may not choose a version; use model {ask.policy!r}, or a key of scope "
                "'research'",
                "insufficient_scope",
                "model",
            )
        pin = ask.pin or BASE
        if pin == BASE or (pin == PROVIDER and self._providers.of(key.tenant, ask.policy) is not None):
            return pin
        return self._routes.names.find(key.tenant, ask.policy, pin)


def named_episode(ids: Ids, tenant: str, name: str) -> str:
    """The id of the episode that a tenant calls ``name``. Raises Refused (404) for what is nobody's or another's."""
    try:
        return ids.episode_named(tenant, name)
    except (ValueError, UnicodeEncodeError):
        raise Refused(
            404,
            "there is no such episode of yours: send a name of your own, or an id that you were given",
            "episode_not_found",
            "episode",
        ) from None


def _seq(request: web.Request) -> int | None:
    given = request.headers.get("X-Everloop-Seq")
    if not given:
        return None
    if not given.isascii() or not given.isdecimal() or len(given) > DIGITS or int(given) > LATEST:
        raise Refused(400, "header X-Everloop-Seq must be a whole number from 0 up", "bad_header")
    return int(given)

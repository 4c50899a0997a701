"""Makes kafka-python's clients, all in one way, and turns its errors into ours: cause and mend in one line.

What bites in kafka-python 3.0.12, and is dealt with here or by those who use this:

- A client that cannot reach a broker says only that it timed out: ``diagnosis.py`` looks for the cause.
- One whose password is refused says the same, or that the connection ended: see :class:`Connections`. It never tries
  the password again, so a client that was refused is thrown away.
- ``KafkaProducer.close(timeout=0)`` raises before it closes while anything is under way: see :func:`abandon`.
- A batch that outlives ``delivery_timeout_ms`` wedges an idempotent producer for good: so there is no such limit,
  and the whole producer is thrown away instead.
- After one refused batch an idempotent producer fails the next ones with the same error: see ``appender.py``.
- A consumer that is paused in the middle of what it fetched does not go on when it is resumed: see ``member.py``.
- Polls of no length never end a rebalance: see ``member.py``.
- ``commit_transaction`` and its like wait without end: see ``fenced.py``.
- A transactional producer forgets a request of its transaction where the coordinator cannot be reached, and waits
  for it for good; one that timed out it takes for the end of the transaction: see :class:`PatientClient`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.future import Future
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from everloop.errors import LogError, LogRefused, RecordTooLarge
from everloop.log.kafka.diagnosis import why_silent
from everloop.log.kafka.settings import Access, Address

CONNECT_SECONDS = 8.0
REQUEST_SECONDS = 10.0
LONGEST_BACKOFF = 1.0  # seconds between two tries to connect: a broker that came back is found within it
METADATA_SECONDS = 30.0  # after which a partition that was added is used
RECORD_OVERHEAD = 65_536  # bytes a batch may have beyond the record in it
FOR_EVER = 2**31 - 1
AWAY_SECONDS = 0.05
CUTS = 3
REFUSALS = (
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
NO_ANSWER = (
    kafka_errors.NodeNotReadyError,
    kafka_errors.RequestTimedOutError,
    kafka_errors.KafkaTimeoutError,
    kafka_errors.Cancelled,
)

logging.getLogger("kafka").addHandler(logging.NullHandler())  # its complaints reach a log that is set up, not a screen


class Fenced(LogError):
    """Another process has taken the place of this writer. Permanent: end the process."""


class Unreachable(LogError):
    """No broker answered; the message says why. Transient."""


class Connections(KafkaConnectionManager):  # type: ignore[misc]  # kafka-python has no types
    """Says at once that a password was refused, where kafka-python would try it until the time is over.

    A broker that refuses one does not always say so: it may close the connection first. After CUTS times in a row, at
    the password each time, that is taken for the answer; one that goes away takes no further connection.
    """

    _refusal: Exception | None = None
    _cuts = 0

    def get_connection(self, node_id: Any, **options: Any) -> Any:
        if self._refusal is not None:
            raise self._refusal
        connection = super().get_connection(node_id, **options)
        connection.init_future.add_errback(self._remember)
        if not isinstance(connection._sasl_authenticate, partial):
            connection._sasl_authenticate = partial(self._authenticate, connection._sasl_authenticate)
        return connection

    async def _authenticate(self, ask: Callable[..., Awaitable[None]], *timeout: Any, **named: Any) -> None:
        try:
            await ask(*timeout, **named)
        except kafka_errors.KafkaConnectionError:
            self._cuts += 1
            if self._cuts >= CUTS:
                self._refusal = kafka_errors.SaslAuthenticationFailedError("the connection ends at the password")
            raise
        self._cuts = 0

    def _remember(self, error: Exception) -> None:
        if isinstance(error, REFUSALS):
            self._refusal = error


class Client(KafkaNetClient):  # type: ignore[misc]
    """What our producers, consumers and admins send through."""

    def __init__(self, **options: Any) -> None:
        net = NetworkSelector(**options)
        super().__init__(net, Connections(net, **options))


class PatientClient(Client):
    """What a transactional producer sends through: a broker that is away for a while is asked again, and again."""

    def await_ready(self, node_id: Any, timeout_ms: float = 30_000) -> bool:
        """False where kafka-python would raise: then the request is kept for the next try."""
        try:
            return bool(super().await_ready(node_id, timeout_ms=timeout_ms))
        except kafka_errors.KafkaError:
            time.sleep(AWAY_SECONDS)
            return False

    def send(self, node_id: Any, request: Any, **options: Any) -> Future:
        """The answer; whatever says that none came is told as a lost connection, which is tried again."""
        answer = Future()

        def failed(error: BaseException) -> None:
            lost = isinstance(error, NO_ANSWER)
            answer.failure(kafka_errors.KafkaConnectionError(str(error)) if lost else error)

        super().send(node_id, request, **options).add_callback(answer.success).add_errback(failed)
        return answer


class Clients:
    """See the module. ``max_record_bytes``: of the largest record that is written or read."""

    def __init__(self, address: Address, access: Access, max_record_bytes: int) -> None:
        self.address = address
        self.access = access
        self._largest = max_record_bytes + RECORD_OVERHEAD

    def producer(self, transaction: str | None = None, timeout: float = 60.0) -> KafkaProducer:
        """Idempotent, acknowledged by all in-sync replicas. With ``transaction`` transactional under that id."""
        more: dict[str, Any] = {}
        if transaction:
            more = {"transactional_id": transaction, "transaction_timeout_ms": int(timeout * 1000)}
        more["kafka_client"] = PatientClient if transaction else Client
        return self._made(
            KafkaProducer,
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=FOR_EVER,
            max_block_ms=int(REQUEST_SECONDS * 1000),
            max_request_size=self._largest,
            batch_size=131_072,
            allow_auto_create_topics=False,
            metadata_max_age_ms=int(METADATA_SECONDS * 1000),
            metrics_enabled=False,
            **more,
        )

    def consumer(self, **more: Any) -> KafkaConsumer:
        """Reads what is committed; commits and creates nothing by itself."""
        return self._made(
            KafkaConsumer,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            metadata_max_age_ms=int(METADATA_SECONDS * 1000),
            max_partition_fetch_bytes=max(1_048_576, self._largest),
            fetch_max_bytes=16 * 1_048_576,
            metrics_enabled=False,
            kafka_client=Client,
            **more,
        )

    def admin(self) -> KafkaAdminClient:
        return self._made(KafkaAdminClient, kafka_client=Client)

    def _made(self, kind: Any, **options: Any) -> Any:
        with self.explained(f"connecting to {self.address}"):
            return kind(
                bootstrap_servers=list(self.address.servers),
                client_id="everloop",
                bootstrap_timeout_ms=int(CONNECT_SECONDS * 1000),
                request_timeout_ms=int(REQUEST_SECONDS * 1000),
                reconnect_backoff_max_ms=int(LONGEST_BACKOFF * 1000),
                **self._security(),
                **options,
            )

    def _security(self) -> dict[str, Any]:
        access = self.access
        if access.security == "plaintext":
            return {}
        found: dict[str, Any] = {"security_protocol": "SSL", "ssl_context": access.context()}
        if access.security == "sasl":
            found |= {
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "SCRAM-SHA-512",
                "sasl_plain_username": access.username,
                "sasl_plain_password": access.password,
            }
        return found

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Errors of kafka-python inside become LogErrors that say what was being done."""
        try:
            yield
        except kafka_errors.KafkaError as error:
            raise self.explain(error, what) from error

    def explain(self, error: BaseException, what: str) -> LogError:
        """An error of kafka-python as one of ours."""
        who = f"the user {self.access.username!r}" if self.access.username else "this client"
        match error:
            case LogError():
                return error
            case kafka_errors.KafkaError(args=(_, kafka_errors.KafkaError() as first)):
                return self.explain(first, what)  # a transaction that cannot go on says what stopped it
            case kafka_errors.MessageSizeTooLargeError() | kafka_errors.RecordListTooLargeError():
                return RecordTooLarge(
                    f"{what}: the broker takes no record of this size: put the body in the blob store, or raise the "
                    "topic's max.message.bytes ('everloop topics apply' sets it from log.max_record_bytes)"
                )
            case kafka_errors.UnsupportedSaslMechanismError() | kafka_errors.IllegalSaslStateError():
                return LogRefused(f"{self.address} does not take log.security = 'sasl' (SCRAM-SHA-512) there: {error}")
            case kafka_errors.SaslAuthenticationFailedError():
                return LogRefused(
                    f"{self.address} refuses {who}: name or password is wrong. Mend log.username and log.password_file "
                    "(or log.password)"
                )
            case kafka_errors.AuthorizationError():
                return LogRefused(
                    f"{what}: {who} has no permission for it ({_name(error)}). 'everloop topics apply', run as an "
                    "administrator of the cluster, grants what each service needs"
                )
            case kafka_errors.UnknownTopicOrPartitionError():
                return LogRefused(f"{what}: the topic is not there. 'everloop topics apply' makes it")
            case (
                kafka_errors.ProducerFencedError()
                | kafka_errors.InvalidProducerEpochError()
                | kafka_errors.FencedInstanceIdError()
            ):
                return Fenced(f"{what}: another process has taken the place of this one, so nothing was written")
            case kafka_errors.KafkaTimeoutError() | kafka_errors.KafkaConnectionError():
                return Unreachable(f"{what}: {why_silent(self.address, self.access)}")
        return LogError(f"{what}: {_name(error)}: {error}")


def _name(error: BaseException) -> str:
    return type(error).__name__.removesuffix("Error")


def abandon(producer: KafkaProducer) -> None:
    """Throw a producer away: what it has not sent is not sent any more, and its futures fail soon after."""
    with suppress(Exception):  # its close() raises first while anything is under way, and then has closed nothing
        producer.close(timeout=0)
    producer._sender.force_close()
    producer._closed = True  # or it would try, and complain, once more when it is collected

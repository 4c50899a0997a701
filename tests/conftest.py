"""What every test may use: a condition with a deadline, an empty home, a broker, a base model that knows nothing."""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from everloop.home import Home

if TYPE_CHECKING:
    from everloop.log.kafka.log import KafkaLog

    from services.broker.process import Broker
    from tests.engines import EngineProcess
    from tests.judge import Judge
    from trainer.policy.base import Policy

T = TypeVar("T")
DESK = [("where is my card", "card_arrival"), ("block my card now", "block_card"), ("how old must I be", "age_limit")]


def until(condition: Callable[[], T], deadline: float = 30.0, every: float = 0.02) -> T:
    """Wait for ``condition`` to be true and return what it gave; fails after ``deadline`` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"not true within {deadline:g} s: {condition}")
        time.sleep(every)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A command run inside a test leaves its options in the environment, as for its services: not for other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., object]:
    return until


class Letters:
    """An encoder without weights, whose near texts have the same letters."""

    name, size, version = "letters", 26, "1"

    def encode(self, texts: Sequence[str]) -> Any:
        import numpy as np

        counts = np.asarray([[text.count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
        return counts.reshape(-1, 26) / np.linalg.norm(counts, axis=-1, keepdims=True).clip(1e-6)


@pytest.fixture
def letters() -> Letters:
    return Letters()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of so many MB: ``@pytest.mark.parametrize("small_disk", [6], indirect=True)``."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("mounting a small file system needs root; the logs' own caps are tested without it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def judge() -> Iterator[Judge]:
    """A judge over HTTP; see :mod:`tests.judge`."""
    from tests.judge import Judge

    made = Judge()
    yield made
    made.close()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One real Kafka broker for all tests that leave it as it is; each takes a prefix of its own in ``log.url``."""
    from services.broker.process import Broker

    made = Broker(tmp_path_factory.mktemp("broker"), tied=True)
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker that tests may hurt; each leaves it running. Started by this thread alone, with which it would end."""
    from services.broker.process import Broker

    made = Broker(tmp_path_factory.mktemp("own"), tied=True)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def url(broker: Broker) -> str:
    """Of a log on the broker that nobody else uses."""
    return f"kafka://{broker.address}/{secrets.token_hex(6)}"


@pytest.fixture
def log(url: str) -> Iterator[KafkaLog]:
    from everloop.log import connect
    from everloop.log.kafka.log import KafkaLog

    made = connect(url)
    assert isinstance(made, KafkaLog)
    yield made
    made.close()


def _certificate(name: str, signer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A certificate and its key; without ``signer`` an authority that signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    return builder.sign(signer[1] if signer else key, hashes.SHA256()), key


def _pem(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """Files of an authority's certificate, and of a certificate that it signed with its key."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    folder.mkdir()
    authority = _certificate(f"{name} authority")
    certificate, key = _certificate(name, authority)
    found = (folder / "ca.pem", folder / "certificate.pem", folder / "key.pem")
    found[0].write_bytes(authority[0].public_bytes(Encoding.PEM))
    found[1].write_bytes(certificate.public_bytes(Encoding.PEM))
    found[2].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return found


@pytest.fixture(scope="session")
def pem() -> Callable[[Path, str], tuple[Path, Path, Path]]:
    """Makes an authority and what it signed: ``pem(folder, name)``, its certificate, a certificate and its key."""
    return _pem


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return _pem(tmp_path_factory.mktemp("pki") / "good", "broker")


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory, authority: tuple[Path, Path, Path]) -> Iterator[Broker]:
    """A broker that asks for TLS, a password and permission. Topics and grants of the prefix ``team`` are applied; the
    password of each service's user is ``password-of-<user>``."""
    from everloop.log import Access, connect
    from everloop.log.kafka.grants import SERVICES, user_of
    from everloop.log.kafka.log import KafkaLog
    from everloop.log.kafka.plan import carry_out
    from everloop.log.kafka.settings import Address

    from services.broker.process import Broker
    from services.broker.settings import ADMIN, Secured

    ca, certificate, key = authority
    users = [ADMIN, *(user_of(service, Address((), "team")) for service in SERVICES)]
    passwords = {user: f"password-of-{user}" for user in users}
    broker = Broker(tmp_path_factory.mktemp("secured"), secured=Secured(certificate, key, ca, passwords), tied=True)
    broker.start()
    try:
        log = connect(f"kafka://{broker.address}/team", access=Access("sasl", ca, ADMIN, passwords[ADMIN]))
        assert isinstance(log, KafkaLog)
        plan = log.plan()
        assert not plan.notes
        carry_out(plan.changes)
        log.close()
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny-k2 after one step of training: made in a second, and as good as random."""
    from trainer.policy import tiny_k2

    folder = tmp_path_factory.mktemp("bases") / "untrained"
    tiny_k2.build(folder, DESK, settings=tiny_k2.Settings(hidden=64, heads=2, context=256, steps=(1, 1)))
    return folder


@pytest.fixture(scope="session")
def policy(untrained: Path) -> Policy:
    """It as a policy. Its weights are shared by all tests: no test changes them."""
    from trainer.policy import base

    return base.load(str(untrained), untrained.parent)


@pytest.fixture(scope="session")
def adapter(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, named by its hash, of an adapter that changes every weight that can carry LoRA."""
    import torch

    from trainer.policy import lora

    model = lora.attach(policy, 4, 8, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("adapters")
    return folder / lora.save(model, folder)


@pytest.fixture(scope="session")
def on_attention(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two adapters on attention alone, which every engine can serve; they change what is answered."""
    folder = tmp_path_factory.mktemp("on-attention")
    return [random_adapter(policy, folder, ("attention",), seed) for seed in (1, 2)]


def random_adapter(policy: Policy, folder: Path, groups: Sequence[str], seed: int, size: float = 0.5) -> Path:
    """The folder of an adapter whose B matrices are random numbers of this size."""
    import torch

    from trainer.policy import lora

    model = lora.attach(policy, 8, 16, groups, seed=seed)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size, generator=chance)
    return folder / lora.save(model, folder)


@pytest.fixture(scope="session")
def vllm_engine(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """One real vLLM for all tests, which leave no adapter behind: its start takes a minute or more."""
    from tests.engines import EngineProcess, running

    with running(EngineProcess(tmp_path_factory.mktemp("vllm"), untrained, "vllm"), deadline=600) as engine:
        yield engine

"""Why no broker answers: looked at by hand, since kafka-python says only that it took too long. No kafka import."""

from __future__ import annotations

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

from everloop.log.kafka.settings import Access, Address

SECONDS = 2.0


def why_silent(address: Address, access: Access) -> str:
    """One sentence with cause and mend, from looking at two servers at once; takes up to 4 s."""
    with ThreadPoolExecutor() as pool:
        return "; ".join(dict.fromkeys(pool.map(lambda server: _look(server, access), address.servers[:2])))


def _look(server: str, access: Access) -> str:
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    try:
        plain = socket.create_connection((host, int(port)), SECONDS)
    except socket.gaierror:
        return f"there is no host {host!r}: mend log.url"
    except ConnectionRefusedError:
        return f"nothing listens at {server}: start the broker ('make kafka' here), or mend log.url"
    except OSError as error:
        return f"{server} cannot be reached ({error.strerror or 'no answer'}): mend log.url, or the network on the way"
    with plain:
        return _look_at_tls(plain, host, server, access) or _silent(server, access)


def _look_at_tls(plain: socket.socket, host: str, server: str, access: Access) -> str | None:
    """What is wrong with TLS; None where it is fine or not asked for."""
    if access.security == "plaintext":
        return None
    try:
        with access.context().wrap_socket(plain, server_hostname=host):
            return None
    except ssl.SSLCertVerificationError as error:
        return f"the certificate of {server} is refused ({error.verify_message}): mend log.ca_file or log.url"
    except OSError:
        return f"{server} does not speak TLS: is it a listener for log.security = {access.security!r}? Mend log.url"


def _silent(server: str, access: Access) -> str:
    return (
        f"{server} takes connections and does not answer: it is frozen or still starting, it is no Kafka broker, or "
        f"its listener is not for log.security = {access.security!r}"
    )

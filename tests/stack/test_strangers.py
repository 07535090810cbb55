"""What another user of the machine, who has none of the secrets, can do to the servers: nothing."""

import hashlib
import http.client
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
from redis import AuthenticationError, Redis

from farm.settings import Settings
from farm.stack import Servers
from farm.stack.ports import LOOPBACK
from farm.storage import Store
from tests.stack.watching import listening


def test_everything_listens_on_loopback_only(servers: Servers) -> None:
    for service in servers.services:
        assert service.pid is not None
        addresses = {address for address, _ in listening([psutil.Process(service.pid)])}
        assert addresses == {LOOPBACK}


def test_postgres_wants_the_password(settings: Settings) -> None:
    url = urlsplit(settings.database_url.get_secret_value())
    for password in ("", "farm", "postgres"):
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(host=url.hostname, port=url.port, user=url.username, password=password, dbname="postgres")


def test_valkey_wants_the_password(settings: Settings) -> None:
    url = urlsplit(settings.redis_url.get_secret_value())
    with Redis(host=str(url.hostname), port=url.port or 0) as client, pytest.raises(AuthenticationError):
        client.keys()


def ports_of_s3(servers: Servers) -> Mapping[str, int]:
    return servers._numbers


def ask(port: int, method: str, path: str) -> int:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


def test_s3_and_its_filer_want_keys(servers: Servers, store: Store) -> None:
    ports = ports_of_s3(servers)
    store.put("wall", b"crack", "text/plain", hashlib.sha256(b"crack").hexdigest())
    assert ask(ports["s3"], "GET", f"/{store.bucket}/wall") == http.HTTPStatus.FORBIDDEN
    assert ask(ports["s3"], "DELETE", f"/{store.bucket}/wall") == http.HTTPStatus.FORBIDDEN
    path = f"/buckets/{store.bucket}/wall"
    assert ask(ports["filer"], "GET", path) == http.HTTPStatus.UNAUTHORIZED
    assert ask(ports["filer"], "DELETE", path) == http.HTTPStatus.UNAUTHORIZED
    assert ask(ports["filer"], "PUT", path) == http.HTTPStatus.UNAUTHORIZED
    assert store.get("wall") == b"crack"


def serves_http2(connection: socket.socket) -> bool:
    """Whether the peer takes our greeting and answers with an HTTP/2 SETTINGS frame (type 4)."""
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        return connection.recv(9)[3:4] == b"\x04"
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.mark.parametrize("part", ["master.grpc", "volume.grpc", "filer.grpc", "s3.grpc"])
def test_inner_ports_want_the_certificate(servers: Servers, part: str) -> None:
    port = ports_of_s3(servers)[part]
    with socket.create_connection((LOOPBACK, port), timeout=5) as plain:
        assert not serves_http2(plain)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((LOOPBACK, port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=LOOPBACK) as encrypted,
    ):
        assert not serves_http2(encrypted)

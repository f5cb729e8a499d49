"""Which Redis servers and which URLs the Redis engine accepts, and how it explains a rejection."""

from __future__ import annotations

import contextlib
import itertools
import re
import socketserver
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from structlog.testing import capture_logs

from resumed_server.config.types import redact_password
from resumed_server.storage.engine import (
    EngineUnavailable,
)
from resumed_server.storage.redis.topology import PERMISSIONS
from resumed_server.storage.redis.url import RedisUrl
from resumed_server.storage.registry import open_engine, verify_url
from resumed_server.storage.testing.fixtures import read_removals
from support.redis import redis_server, valkey_server
from support.redis_engine import PATIENT, catch_failure, engine_at
from support.tls import CA, CERTIFICATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.redis import RedisServer


def refusal(url: str) -> str:
    """Return the single line with which `resumed serve` rejects a URL (exit status 2)."""
    if PATIENT not in url:
        url += f"{'&' if '?' in url else '?'}{PATIENT}"
    with pytest.raises((ValueError, EngineUnavailable)) as caught:
        open_engine(url, capacity=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://store", {"topology": "server", "tls": False, "hosts": (("store", 6379),), "database": 0}),
        ("redis://[::1]:7000/3", {"hosts": (("::1", 7000),), "database": 3}),
        ("rediss://u:p%40%2F@store?ca=/ca", {"tls": True, "user": "u", "password": "p@/", "ca": Path("/ca")}),
        ("redis://:p@store?prefix=tls:&timeout_ms=100", {"user": None, "prefix": "tls:", "timeout": 0.1}),
        ("redis://u@store?password_file=/run/p", {"user": "u", "password": None, "password_file": Path("/run/p")}),
        ("redis+cluster://a:1,b:2", {"topology": "cluster", "hosts": (("a", 1), ("b", 2))}),
        ("redis+sentinel://a,b:1/main/2?wait_replicas=1", {"hosts": (("a", 26379), ("b", 1)), "wait_replicas": 1}),
        ("rediss+sentinel://a/main", {"topology": "sentinel", "tls": True, "sentinel_name": "main", "database": 0}),
    ],
)
def test_a_url_says_where_redis_is(url: str, expected: dict[str, object]) -> None:
    parsed = RedisUrl.parse(url)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://", "needs hosts"),
        ("redis://store:0", "needs hosts"),
        ("redis://store:65536", "needs hosts"),
        ("redis://a,b", "accepts one host"),
        ("redis://user:sec/ret@store", "%2F"),
        ("redis://store/one", "number of the database"),
        ("redis://store/1/2", "number of the database"),
        ("redis://store#1", "not escaped.*%23"),
        ("redis://store?frob=1", "'frob' is not an option .* timeout_ms"),
        ("redis://store?prefix=a&prefix=b", "prefix is set twice"),
        ("redis://store?prefix={a}", "without spaces and braces"),
        ("redis://store?timeout_ms=0", "timeout_ms must be a whole number from 1 to"),
        ("redis://store?wait_replicas=x", "wait_replicas must be a whole number"),
        ("redis://store?ca=/ca", "'ca' is not an option"),
        ("rediss://store?cert=/c", "both cert and key"),
        ("rediss://store?ca=", "must not be empty"),
        ("redis://:secret@store?password_file=/p", "not in both"),
        ("redis+cluster://store/1", "only one database"),
        ("redis+sentinel://store", "name of the primary in the Sentinels"),
        ("redis+ssl://store", "unknown storage engine 'redis[+]ssl': use lmdb:.*redis://"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        verify_url(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@store:1/2?prefix=x:", "redis://user:***@store:1/2?prefix=x:"),
        ("rediss://:se:c@ret@store", "rediss://:***@store"),
        ("redis+sentinel://user:secret@a,b/main", "redis+sentinel://user:***@a,b/main"),
        ("redis://store", "redis://store"),
        ("lmdb:///var/lib/a:b@c", "lmdb:///var/lib/a:b@c"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redact_password(url) == shown
    if url.startswith("redis"):
        assert "secret" not in repr(RedisUrl.parse(url.replace("se:c@ret", "secret")))


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_a_wrong_password_is_refused(server: RedisServer, scheme: str) -> None:
    server.client.config_set("requirepass", "right")
    for credentials in ("", ":secret@", "somebody:secret@"):
        message = refusal(f"{scheme}://{credentials}127.0.0.1:{server.port}")
        assert re.search("rejects the user or the password", message), message
        assert "secret" not in message
    server.client.auth("right")
    server.client.config_set("requirepass", "")


def test_a_user_without_permissions_is_refused(server: RedisServer) -> None:
    server.client.execute_command("ACL SETUSER humble on >pass ~* +ping")
    assert "+eval +evalsha +script|load +get" in refusal(f"redis://humble:pass@127.0.0.1:{server.port}")


def test_the_documented_permissions_are_sufficient(server: RedisServer) -> None:
    """The error message for missing permissions lists exactly these."""
    server.client.execute_command(f"ACL SETUSER modest on >pass ~resumed:* {PERMISSIONS}")
    with engine_at(f"redis://modest:pass@127.0.0.1:{server.port}", PATIENT) as engine:
        engine.put("shop", b"k", b"value", 60.0)
        assert engine.get("shop", b"k")
        assert engine.take("shop", b"k")
        position = engine.position()
        assert not engine.remove("shop", b"other")
        assert not engine.remove("shop", b"lasting", ttl=60.0)
        assert engine.remove("shop", b"lasting", ttl=90.0) is None
        assert read_removals(engine, "shop").keys() == {b"lasting"}
        assert engine.last_purge("shop") is None
        engine.sweep(10)
        assert engine.changes(position, engine.position(), 2)
        engine.probe()
        server.client.script_flush()
        assert engine.usage("shop")["shop"].tombstones == 3


@pytest.mark.parametrize("running", [redis_server, valkey_server])
def test_missing_permissions_are_named_to_a_user_of_an_older_version(
    running: Callable[[], contextlib.AbstractContextManager[RedisServer]],
) -> None:
    """When they are needed: without lasting removals the older ones are enough."""
    older = PERMISSIONS.partition(" +zadd")[0]
    with running() as server:
        server.client.execute_command(f"ACL SETUSER modest on >pass ~resumed:* {older}")
        with engine_at(f"redis://modest:pass@127.0.0.1:{server.port}", PATIENT) as engine:
            assert engine.remove("shop", b"k") is False
            for call in (lambda: engine.remove("shop", b"k", ttl=600.0), lambda: read_removals(engine, "shop")):
                assert PERMISSIONS in str(catch_failure(call))


def test_a_read_only_replica_is_refused(server: RedisServer) -> None:
    """A replica would serve lookups and reject all writes."""
    server.client.replicaof("127.0.0.1", 1)
    assert "replica, which is read-only; use its primary" in refusal(server.url)


def test_a_redis_too_old_is_refused() -> None:
    """Its scripts cannot declare that they may run when the memory is full."""
    with serve_info(b"redis_version:6.2.14\r\nrole:master\r\n") as port:
        assert "too old (6.2.14); use Redis 7, Valkey 8" in refusal(f"redis://127.0.0.1:{port}")


def test_the_wrong_topology_is_refused(server: RedisServer, tmp_path: Path) -> None:
    assert "not a cluster; use redis://" in refusal(f"redis+cluster://127.0.0.1:{server.port}")
    assert "not a Sentinel" in refusal(f"redis+sentinel://127.0.0.1:{server.port}/main")
    with valkey_server("--cluster-enabled", "yes") as node:
        assert "node of a cluster; use redis+cluster://" in refusal(node.url)
    (tmp_path / "sentinel.conf").touch()
    with valkey_server(f"{tmp_path}/sentinel.conf", "--sentinel") as sentinel:
        assert "is a Sentinel; use redis+sentinel://" in refusal(sentinel.url)


def test_tls_is_verified_and_a_failure_is_explained(tmp_path: Path) -> None:
    for name, blob in (
        ("ca", CA.cert_pem),
        ("other", trustme.CA().cert_pem),
        ("cert", CERTIFICATE.cert_chain_pems[0]),
        ("key", CERTIFICATE.private_key_pem),
    ):
        blob.write_to_path(tmp_path / name)
    options = [f"--tls-{of}-file" if of != "ca" else "--tls-ca-cert-file" for of in ("ca", "cert", "key")]
    files = itertools.chain(*zip(options, (f"{tmp_path}/{of}" for of in ("ca", "cert", "key")), strict=True))
    with redis_server("--tls-port", "{tls_port}", *files) as server:
        url = f"rediss://localhost:{server.tls_port}"
        identity = f"cert={tmp_path}/cert&key={tmp_path}/key&{PATIENT}"
        with engine_at(url, f"ca={tmp_path}/ca&{identity}") as engine:
            engine.put("shop", b"k", b"value", 60.0)
            assert engine.get("shop", b"k")
        assert "self-signed certificate" in refusal(f"{url}?ca={tmp_path}/other&{identity}")
        assert "cannot read" in refusal(f"{url}?ca={tmp_path}/missing")
        # In TLS 1.3 the server's alert comes after the handshake, and is lost if the connection is reset first.
        with capture_logs() as logs:
            try:
                open_engine(f"{url}?ca={tmp_path}/ca", capacity=0).close()
                complaint = logs[0]["cause"]
            except EngineUnavailable as error:
                complaint = str(error)
        assert "certificate required" in complaint or "if it requires a client certificate" in complaint
        for wrong, hint in (
            (f"rediss://localhost:{server.port}?ca={tmp_path}/ca", "if it does not use TLS, use redis:"),
            (f"redis://localhost:{server.tls_port}", "if it uses TLS, use rediss:"),
        ):
            with capture_logs() as logs, contextlib.closing(open_engine(wrong, capacity=0)) as engine:
                assert hint in logs[0]["cause"]
                with pytest.raises(EngineUnavailable):
                    engine.probe()


def test_a_password_file_is_read_for_every_connection(server: RedisServer, tmp_path: Path) -> None:
    """The password can then change while the server runs."""
    password = tmp_path / "password"
    password.write_text("one\n")
    server.client.config_set("requirepass", "one")
    with engine_at(server.url, f"password_file={password}&{PATIENT}") as engine:
        engine.put("shop", b"k", b"value", 60.0)
        password.write_text("two\n")
        server.client.auth("one")
        server.client.config_set("requirepass", "two")
        server.client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        assert engine.get("shop", b"k")
        server.client.auth("two")
        server.client.config_set("requirepass", "")


@contextlib.contextmanager
def serve_info(info: bytes) -> Iterator[int]:
    """Run a server that answers every command with `info`, since no old Redis is available; yield its port."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True  # or one answer would wait until the one before is acknowledged

        def handle(self) -> None:
            for line in self.rfile:
                if line.strip() in {b"INFO", b"SETINFO"}:  # the last word of a command without arguments, or near it
                    self.wfile.write(b"$%d\r\n%b\r\n" % (len(info), info))
                elif line.startswith(b"#!lua"):  # as before version 7
                    self.wfile.write(b"-ERR Error compiling script (new function): unexpected symbol near '#'\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_address[1]
        listening.shutdown()

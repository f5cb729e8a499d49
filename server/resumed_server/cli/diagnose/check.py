"""`resumed check`: a round trip of every call against a running store, and what to do where one fails."""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

import resumed
from resumed.v1 import session_store_pb2 as pb
from resumed.v1 import session_store_pb2_grpc as pb_grpc
from resumed_server.cli.diagnose.checks import Failure, show, taken, well
from resumed_server.cli.tls_options import Tls
from resumed_server.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

TTL = 10.0
"""Seconds that what is stored here lives at most; what is removed leaves a tombstone until then."""
HANDSHAKE_PATIENCE = 0.05
"""Seconds that a frontend's handshake waits for a look-up, unless install() was told otherwise."""

_SERVICE = pb.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
_NAMESPACE = re.compile(r"[a-z0-9.-]{1,63}")
_LONGEST_DEADLINE = 3600
_PLAINTEXT = Tls()

_FORGOTTEN = (
    "what was stored a moment ago did not come back",
    "see the store's log: it may be full; or several stores that share no storage answer at this target",
)


def check(
    target: str, *, namespace: str, keyring: str | None, deadline: float, as_json: bool, tls: Tls = _PLAINTEXT
) -> bool:
    """Try every call of a store, print how it went, and return whether all is well.

    Args:
        target: Where the store is, as a gRPC name.
        namespace: The namespace to use; nothing is left in it.
        keyring: The fleet's keyring file; None for a throw-away key.
        deadline: Seconds that each call may take.
        as_json: Print JSON instead of a table.
        tls: The files for TLS.

    Raises:
        UserError: An argument is outside its range.
    """
    verify(target, namespace, deadline)
    try:
        round_trip = RoundTrip(target, namespace, keyring, deadline, tls)
    except resumed.CredentialsError as error:
        raise UserError(str(error)) from None
    with contextlib.closing(round_trip):
        steps = taken({"keyring": round_trip.load_keyring, **round_trip.calls()})
    if as_json:
        report = {"target": target, "namespace": namespace, "ok": well(steps), "steps": [vars(step) for step in steps]}
        Console(soft_wrap=True).print_json(data=report)
    else:
        show(f"the store at {target}", steps)
    return well(steps)


def verify(target: str, namespace: str, deadline: float) -> None:
    """Raise UserError for an argument outside its range."""
    if not target:
        raise UserError("TARGET is empty; say where the store is, as in 127.0.0.1:7400")
    if not _NAMESPACE.fullmatch(namespace):
        raise UserError(f"--namespace: {namespace!r} is not 1 to 63 characters of [a-z0-9.-]")
    if not 0 < deadline <= _LONGEST_DEADLINE:
        raise UserError(f"--deadline: {deadline:g} is not above 0 and at most {_LONGEST_DEADLINE} seconds")
    try:
        resumed.SessionStore(target, namespace=namespace, deadline=deadline).close()  # connects to nobody
    except ValueError as error:
        raise UserError(str(error)) from None


class RoundTrip:
    """The steps: what each tries and what it expects.

    Attributes:
        store: The store.
        keyring: The fleet's keys, once load_keyring() was called.
    """

    def __init__(
        self, target: str, namespace: str, keyring: str | None, deadline: float, tls: Tls = _PLAINTEXT
    ) -> None:
        self._namespace, self._keyring_file, self._deadline = namespace, keyring, deadline
        self._channel = tls.channel(target)
        self.store = resumed.SessionStore(target, namespace=namespace, deadline=deadline, credentials=tls.credentials())
        self.keyring = resumed.Keyring.from_keys([os.urandom(32)])
        self._key = self._value = b""
        self._left: set[bytes] = set()

    def calls(self) -> dict[str, Callable[[], str]]:
        """Return the steps that the store has a part in."""
        return {
            "connect": self._connect,
            "health": self._health,
            "seal and Put": self._put,
            "Get and open": self._get,
            "Put again": self._put_again,
            "Put another value": self._put_another,
            "Take": self._take,
            "Take again": self._take_again,
            "Put after Take": self._put_another,
            "Remove": self._remove,
            "Batch": self._batch,
            "Watch": self._watch,
        }

    def close(self) -> None:
        """Remove what a failed step left behind, and disconnect."""
        with contextlib.suppress(resumed.StoreError):
            for key in self._left:
                self.store.remove(key)
        self.store.close()
        self._channel.close()

    def load_keyring(self) -> str:
        """Read the fleet's keys."""
        if self._keyring_file is None:
            return "a throw-away key (--keyring checks the fleet's)"
        self.keyring = resumed.Keyring.load(self._keyring_file)
        return f"key ids {', '.join(self.keyring.key_ids)}"

    def _connect(self) -> str:
        try:
            self._ask_health()
        except grpc.RpcError as error:
            # With any other status somebody answered: what they said is the next step's matter.
            if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                raise
        return ""

    def _health(self) -> str:
        status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(self._ask_health().status)
        if status != "SERVING":
            raise Failure(f"the store says {status}", "wait if it is starting or being stopped; else see its log")
        return status

    def _ask_health(self) -> Any:
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        return health_pb2_grpc.HealthStub(self._channel).Check(request, timeout=self._deadline)

    def _put(self) -> str:
        now = time.time()
        self._key = resumed.StoreKeys(self._namespace).key(self.keyring.issue_id(self._namespace, now))
        self._value = self.keyring.seal(self._key, os.urandom(200), int(now + TTL) + 1)
        return self._stored(self._key)

    def _put_again(self) -> str:
        return self._stored(self._key)

    def _get(self) -> str:
        started = time.perf_counter()
        found = self._found(self.store.get(self._key))
        seconds = time.perf_counter() - started
        self.keyring.open(self._key, found.value, time.time())
        if seconds > HANDSHAKE_PATIENCE:
            return f"slower than the {HANDSHAKE_PATIENCE * 1000:.0f} ms that a handshake waits unless told otherwise"
        return f"{len(found.value)} bytes, {found.ttl:.1f} s left"

    def _put_another(self) -> str:
        try:
            self.store.put(self._key, b"another value", TTL)
        except resumed.AlreadyExists:
            return "refused, as it must be"
        raise Failure("the store let an id be written twice", "do not use this store, and report it")

    def _take(self) -> str:
        self._found(self.store.take(self._key))
        self._left.discard(self._key)
        return "handed out"

    def _take_again(self) -> str:
        if self.store.take(self._key):
            raise Failure("the store handed a session out twice", "do not use this store, and report it")
        return "missed, as it must"

    def _remove(self) -> str:
        key = os.urandom(32)
        self._stored(key)
        if not self.store.remove(key) or self.store.get(key):
            raise Failure(*_FORGOTTEN)
        self._left.discard(key)
        return "stored, removed, gone"

    def _batch(self) -> str:
        key = os.urandom(32)
        self._left.add(key)
        put = resumed.Put(key, self._value, TTL)
        results = self.store.batch([put, resumed.Get(key), resumed.Remove(key), resumed.Take(key)])
        for result in results:
            if isinstance(result, resumed.StoreError):
                raise result
        _, found, removed, missed = results
        if not found or not removed or missed:
            raise Failure(*_FORGOTTEN)
        self._left.discard(key)
        return "Put, Get, Remove and Take in one call"

    def _watch(self) -> str:
        request = pb.WatchRequest(namespace=self._namespace)
        stream = pb_grpc.SessionStoreServiceStub(self._channel).Watch(request, timeout=self._deadline)
        try:
            next(stream)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            return "not served by this store: frontends look every session up"
        stream.cancel()
        return "live"

    def _stored(self, key: bytes) -> str:
        self._left.add(key)
        return f"kept for {self.store.put(key, self._value, TTL):.1f} s"

    def _found(self, session: resumed.StoredSession | None) -> resumed.StoredSession:
        if session is None or session.value != self._value:
            raise Failure(*_FORGOTTEN)
        return session

"""`resumed check`: a round trip of every method of a running store, with advice for each failure."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

import resumed
from resumed.v1 import session_store_pb2 as pb
from resumed.v1 import session_store_pb2_grpc as pb_grpc
from resumed_server.cli.diagnose.checks import exit_status, run_checks, show
from resumed_server.cli.diagnosis import Failure, explain
from resumed_server.cli.options import AsJson, Deadline, Keyring, Target
from resumed_server.cli.tls_options import TlsOptions, takes_tls
from resumed_server.config.patterns import is_namespace
from resumed_server.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from resumed_server.cli.diagnosis import Explanation

TTL = 10.0
"""Lifetime in seconds of the sessions and tombstones that the check leaves behind if it is interrupted."""
HANDSHAKE_PATIENCE = 0.05
"""Seconds: the default deadline of a frontend's look-up."""

_SERVICE = pb.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
_LONGEST_DEADLINE = 3600

_FORGOTTEN = (
    "the store does not return a session that it has just stored",
    "see the store's log: it may be full; or several stores without common storage listen at this target",
)


@takes_tls
def check(
    target: Target,
    *,
    namespace: Annotated[
        str, typer.Option(metavar="NAME", help="Namespace to use; the check removes what it stores there.")
    ] = "resumed-check",
    keyring: Keyring = None,
    deadline: Deadline = 2.0,
    as_json: AsJson = False,
    tls: TlsOptions,
) -> None:
    """Call every method of a running store, and print what to do if one fails.

    The exit status is that of the check that failed.
    """
    verify(target, namespace, deadline)
    try:
        round_trip = RoundTrip(target, namespace, keyring, deadline, tls)
    except resumed.CredentialsError as error:
        raise UserError(str(error)) from None
    with contextlib.closing(round_trip):
        checks = run_checks({"keyring": round_trip.load_keyring, **round_trip.calls()}, round_trip.explain)
    status = exit_status(checks)
    if as_json:
        report = {"target": target, "namespace": namespace, "ok": not status, "checks": [vars(each) for each in checks]}
        Console(soft_wrap=True).print_json(data=report)
    else:
        show(f"the store at {target}", checks)
    if status:
        raise typer.Exit(status)


def verify(target: str, namespace: str, deadline: float) -> None:
    """Check the range of the arguments.

    Raises:
        UserError: An argument is outside its range.
    """
    if not target:
        raise UserError("TARGET is empty; give the address of the store, such as 127.0.0.1:7400")
    if not is_namespace(namespace):
        raise UserError(f"--namespace: {namespace!r} is not 1 to 63 characters of [a-z0-9.-]")
    if not 0 < deadline <= _LONGEST_DEADLINE:
        raise UserError(f"--deadline: {deadline:g} is not above 0 and at most {_LONGEST_DEADLINE} seconds")
    try:
        resumed.StoreClient(target, namespace=namespace, deadline=deadline).close()  # does not connect
    except ValueError as error:
        raise UserError(str(error)) from None


class RoundTrip:
    """The checks of a store, in the order in which they run.

    Attributes:
        store: The store.
        keyring: The keys of the fleet after load_keyring(), a temporary key before.
    """

    def __init__(self, target: str, namespace: str, keyring: str | None, deadline: float, tls: TlsOptions) -> None:
        self._namespace, self._keyring_file, self._deadline = namespace, keyring, deadline
        self._target, self._tls = target, tls
        self._channel = tls.channel(target)
        self.store = resumed.StoreClient(target, namespace=namespace, deadline=deadline, credentials=tls.credentials())
        self.keyring = resumed.Keyring.from_keys([os.urandom(32)])
        self._key = self._value = b""
        self._leftovers: set[bytes] = set()

    def calls(self) -> dict[str, Callable[[], str]]:
        """Return the checks that call the store."""
        return {
            "connect": self._connect,
            "health": self._health,
            "seal and Put": self._put,
            "Get and open": self._get,
            "Put again": lambda: self._store_session(self._key),
            "Put another value": self._put_another,
            "Take": self._take,
            "Take again": self._take_again,
            "Put after Take": self._put_another,
            "Remove": self._remove,
            "Batch": self._batch,
            "Watch": self._watch,
            "removals of tickets": self._removals,
        }

    def explain(self, error: Exception) -> Explanation:
        """Explain the failure of a check."""
        return explain(error, self._target, self._tls)

    def close(self) -> None:
        """Remove the sessions that a failed check left behind, and disconnect."""
        with contextlib.suppress(resumed.StoreError):
            for key in self._leftovers:
                self.store.remove(key)
        self.store.close()
        self._channel.close()

    def load_keyring(self) -> str:
        """Read the keyring file."""
        if self._keyring_file is None:
            return "a temporary key (--keyring checks the fleet's)"
        self.keyring = resumed.Keyring.load(self._keyring_file)
        return f"key ids {', '.join(self.keyring.key_ids)}"

    def namespaces(self) -> list[str]:
        """Return the namespaces in the store; none if this client has no grant for its statistics."""
        with resumed.Admin(self._target, deadline=self._deadline, credentials=self._tls.credentials()) as admin:
            try:
                return list(admin.stats())
            except resumed.StoreError:
                return []

    def _connect(self) -> str:
        try:
            self._request_health()
        except grpc.RpcError as error:
            # Any other status is a response, which the next check examines.
            if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                raise
        return ""

    def _health(self) -> str:
        status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(self._request_health().status)
        if status != "SERVING":
            raise Failure(
                f"the store reports {status}",
                "wait if it is starting or stopping; otherwise see its log",
                ExitStatus.RETRY,
            )
        return status

    def _request_health(self) -> Any:
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        return health_pb2_grpc.HealthStub(self._channel).Check(request, timeout=self._deadline)

    def _put(self) -> str:
        now = time.time()
        self._key = resumed.StoreKeys(self._namespace).key(self.keyring.issue_id(self._namespace, now))
        self._value = self.keyring.seal(self._key, os.urandom(200), int(now + TTL) + 1)
        return self._store_session(self._key)

    def _get(self) -> str:
        started = time.perf_counter()
        found = self._require_session(self.store.get(self._key))
        seconds = time.perf_counter() - started
        self.keyring.open(self._key, found.value, time.time())
        if seconds > HANDSHAKE_PATIENCE:
            return f"slower than the {HANDSHAKE_PATIENCE * 1000:.0f} ms that a handshake waits by default"
        return f"{len(found.value)} bytes, {found.ttl:.1f} s left"

    def _put_another(self) -> str:
        try:
            self.store.put(self._key, b"another value", TTL)
        except resumed.AlreadyExists:
            return "rejected, as required"
        raise Failure("the store accepted an id twice", "do not use this store, and report the bug")

    def _take(self) -> str:
        self._require_session(self.store.take(self._key))
        self._leftovers.discard(self._key)
        return "returned"

    def _take_again(self) -> str:
        if self.store.take(self._key):
            raise Failure("the store returned a session twice", "do not use this store, and report the bug")
        return "not found, as required"

    def _remove(self) -> str:
        key = os.urandom(32)
        self._store_session(key)
        if not self.store.remove(key) or self.store.get(key):
            raise Failure(*_FORGOTTEN)
        self._leftovers.discard(key)
        return "stored, removed, not found"

    def _batch(self) -> str:
        key = os.urandom(32)
        self._leftovers.add(key)
        put = resumed.Put(key, self._value, TTL)
        results = self.store.batch([put, resumed.Get(key), resumed.Remove(key), resumed.Take(key)])
        for result in results:
            if isinstance(result, resumed.StoreError):
                raise result
        _, found, removed, missed = results
        if not found or not removed or missed:
            raise Failure(*_FORGOTTEN)
        self._leftovers.discard(key)
        return "Put, Get, Remove and Take in one call"

    def _watch(self) -> str:
        request = pb.WatchRequest(namespace=self._namespace)
        stream = pb_grpc.SessionStoreServiceStub(self._channel).Watch(request, timeout=self._deadline)
        try:
            next(stream)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            return "not available on this store: frontends look up every session"
        stream.cancel()
        return "live"

    def _removals(self) -> str:
        key = os.urandom(32)
        self.store.remove(key, ttl=TTL)
        try:
            with self.store.watch(removals_only=True) as watch:
                if not watch.removals_only:
                    return "not available on this store: frontends need stored sessions"
                for batch in watch:
                    if any(change.key == key for change in batch.changes):
                        return "a new stream begins with those in force"
                    if batch.live:
                        break
        except resumed.StoreError as error:
            if error.code != grpc.StatusCode.UNIMPLEMENTED.name:
                raise
            return "not available on this store: frontends need stored sessions"
        raise Failure(
            "a stream of removals begins without one that is in force",
            "do not use tickets with this store, and report the bug",
        )

    def _store_session(self, key: bytes) -> str:
        self._leftovers.add(key)
        return f"stored for {self.store.put(key, self._value, TTL):.1f} s"

    def _require_session(self, session: resumed.StoredSession | None) -> resumed.StoredSession:
        if session is None or session.value != self._value:
            raise Failure(*_FORGOTTEN)
        return session

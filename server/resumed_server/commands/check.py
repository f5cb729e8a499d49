"""`resumed check`: a round trip of every call against a running store, and what to do where one fails."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

import resumed
from resumed.v1 import session_store_pb2 as pb
from resumed.v1 import session_store_pb2_grpc as pb_grpc
from resumed_server.config import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

TTL = 10.0
"""Seconds that what is stored here lives at most; what is removed leaves a tombstone until then."""
HANDSHAKE_PATIENCE = 0.05
"""Seconds that a frontend's handshake waits for a look-up, unless install() was told otherwise."""

_SERVICE = pb.DESCRIPTOR.services_by_name["SessionStoreService"].full_name
_NAMESPACE = re.compile(r"[a-z0-9.-]{1,63}")
_LONGEST_DEADLINE = 3600

# What gRPC's texts mean to an operator, and what helps; the first that matches. A text begins with the status code.
_MEANINGS = [
    (
        r"DNS|errors resolving|name resolution",
        "the name does not resolve",
        "check its spelling, and that the DNS of this machine knows it",
    ),
    (r"Connection refused", "nothing listens there", "start the store (`resumed serve`), or correct address and port"),
    (r"No such file", "there is no such socket", "start the store with --listen unix:PATH, or correct the path"),
    (r"Permission denied", "this user may not use the socket", "run this as the user that runs the store"),
    (r"unreachable|No route", "there is no way to that address", "check address, routes and firewall"),
    (
        r"^DEADLINE_EXCEEDED|[Tt]imed? ?out|FD Shutdown",
        "no answer in time",
        "check address and firewall, and that the store is not overloaded; --deadline gives it more time",
    ),
    (
        r"http2 header with status",
        "a web server or proxy answers, not the store",
        "correct the target; where http_proxy or grpc_proxy is set, add the store to no_proxy",
    ),
    (
        r"^(UNIMPLEMENTED|NOT_FOUND)",
        "a gRPC server answers, but it is no resumed store",
        "correct the port; `resumed serve` listens on 7400 unless told otherwise",
    ),
    (r"^UNAUTHENTICATED", "the store does not know this client", "use a certificate that the store trusts"),
    (
        r"^PERMISSION_DENIED",
        "this client may not use the namespace",
        "grant it on the store, or try one that is granted with --namespace",
    ),
    (r"^RESOURCE_EXHAUSTED", "the store is full, or overloaded", "give it more --capacity or --workers; see its log"),
    (r"^UNAVAILABLE.*storage", "the store's storage does not answer", "see the store's log"),
    (
        r"^(UNAVAILABLE|UNKNOWN|CANCELLED)",
        "what listens there does not speak gRPC without TLS, or is just being stopped",
        "correct the port; the target must be the store itself, or a proxy that passes HTTP/2 on",
    ),
]
_FORGOTTEN = (
    "what was stored a moment ago did not come back",
    "see the store's log: it may be full; or several stores that share no storage answer at this target",
)


def check(target: str, *, namespace: str, keyring: str | None, deadline: float, as_json: bool) -> bool:
    """Try every call of a store, print how it went, and return whether all is well.

    Args:
        target: Where the store is, as a gRPC name.
        namespace: The namespace to use; nothing is left in it.
        keyring: The fleet's keyring file; None for a throw-away key.
        deadline: Seconds that each call may take.
        as_json: Print JSON instead of a table.

    Raises:
        UserError: An argument is outside its range.
    """
    if not target:
        raise UserError("TARGET is empty; say where the store is, as in 127.0.0.1:7400")
    if not _NAMESPACE.fullmatch(namespace):
        raise UserError(f"--namespace: {namespace!r} is not 1 to 63 characters of [a-z0-9.-]")
    if not 0 < deadline <= _LONGEST_DEADLINE:
        raise UserError(f"--deadline: {deadline:g} is not above 0 and at most {_LONGEST_DEADLINE} seconds")
    with contextlib.closing(_RoundTrip(target, namespace, keyring, deadline)) as round_trip:
        steps = _taken(round_trip.steps())
    well = all(step.outcome == "ok" for step in steps)
    if as_json:
        report = {"target": target, "namespace": namespace, "ok": well, "steps": [vars(step) for step in steps]}
        Console(soft_wrap=True).print_json(data=report)
    else:
        _show(target, steps)
    return well


@dataclass
class Step:
    """What became of one step.

    Attributes:
        name: What was tried.
        outcome: `ok`, `failed`, or `not tried` because one before it failed.
        milliseconds: The time it took.
        note: What was found.
        advice: What to do, where it failed.
    """

    name: str
    outcome: str = "not tried"
    milliseconds: float | None = None
    note: str = ""
    advice: str = ""


class _Failure(Exception):
    """The store answered what it must not: what, and what to do."""


def _taken(actions: dict[str, Callable[[], str]]) -> list[Step]:
    """Take the steps in their order, until one fails."""
    steps = [Step(name) for name in actions]
    for step in steps:
        started = time.perf_counter()
        try:
            step.note = actions[step.name]()
            step.outcome = "ok"
        except (_Failure, grpc.RpcError, resumed.ResumedError) as error:
            step.outcome = "failed"
            step.note, step.advice = _explained(error)
        step.milliseconds = round(1000 * (time.perf_counter() - started), 2)
        if step.outcome == "failed":
            break
    return steps


def _explained(error: Exception) -> tuple[str, str]:
    """Return what is wrong and what to do about it."""
    if isinstance(error, _Failure):
        problem, advice = error.args
        return problem, advice
    if isinstance(error, resumed.KeyringError):
        problem, _, advice = str(error).partition("; ")
        return problem, advice or "copy the keyring from another frontend again, or make one with `resumed keygen`"
    text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)
    for pattern, meaning, advice in _MEANINGS:
        if re.search(pattern, text):
            return f"{meaning} ({text})", advice
    return text, "see the store's log"


class _RoundTrip:
    """The steps: what each tries and what it expects."""

    def __init__(self, target: str, namespace: str, keyring: str | None, deadline: float) -> None:
        self._namespace, self._keyring_file, self._deadline = namespace, keyring, deadline
        self._channel = grpc.insecure_channel(target)
        self._store = resumed.SessionStore(target, namespace=namespace, deadline=deadline)
        self._keyring = resumed.Keyring.from_keys([os.urandom(32)])
        self._key = self._value = b""
        self._left: set[bytes] = set()

    def steps(self) -> dict[str, Callable[[], str]]:
        return {
            "keyring": self._load,
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
                self._store.remove(key)
        self._store.close()
        self._channel.close()

    def _load(self) -> str:
        if self._keyring_file is None:
            return "a throw-away key (--keyring checks the fleet's)"
        self._keyring = resumed.Keyring.load(self._keyring_file)
        return f"key ids {', '.join(self._keyring.key_ids)}"

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
            raise _Failure(f"the store says {status}", "wait if it is starting or being stopped; else see its log")
        return status

    def _ask_health(self) -> Any:
        request = health_pb2.HealthCheckRequest(service=_SERVICE)
        return health_pb2_grpc.HealthStub(self._channel).Check(request, timeout=self._deadline)

    def _put(self) -> str:
        now = time.time()
        self._key = resumed.StoreKeys(self._namespace).key(self._keyring.issue_id(self._namespace, now))
        self._value = self._keyring.seal(self._key, os.urandom(200), int(now + TTL) + 1)
        return self._stored(self._key)

    def _put_again(self) -> str:
        return self._stored(self._key)

    def _get(self) -> str:
        started = time.perf_counter()
        found = self._found(self._store.get(self._key))
        seconds = time.perf_counter() - started
        self._keyring.open(self._key, found.value, time.time())
        if seconds > HANDSHAKE_PATIENCE:
            return f"slower than the {HANDSHAKE_PATIENCE * 1000:.0f} ms that a handshake waits unless told otherwise"
        return f"{len(found.value)} bytes, {found.ttl:.1f} s left"

    def _put_another(self) -> str:
        try:
            self._store.put(self._key, b"another value", TTL)
        except resumed.AlreadyExists:
            return "refused, as it must be"
        raise _Failure("the store let an id be written twice", "do not use this store, and report it")

    def _take(self) -> str:
        self._found(self._store.take(self._key))
        self._left.discard(self._key)
        return "handed out"

    def _take_again(self) -> str:
        if self._store.take(self._key):
            raise _Failure("the store handed a session out twice", "do not use this store, and report it")
        return "missed, as it must"

    def _remove(self) -> str:
        key = os.urandom(32)
        self._stored(key)
        if not self._store.remove(key) or self._store.get(key):
            raise _Failure(*_FORGOTTEN)
        self._left.discard(key)
        return "stored, removed, gone"

    def _batch(self) -> str:
        key = os.urandom(32)
        self._left.add(key)
        put = resumed.Put(key, self._value, TTL)
        results = self._store.batch([put, resumed.Get(key), resumed.Remove(key), resumed.Take(key)])
        for result in results:
            if isinstance(result, resumed.StoreError):
                raise result
        _, found, removed, missed = results
        if not found or not removed or missed:
            raise _Failure(*_FORGOTTEN)
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
        return f"kept for {self._store.put(key, self._value, TTL):.1f} s"

    def _found(self, session: resumed.StoredSession | None) -> resumed.StoredSession:
        if session is None or session.value != self._value:
            raise _Failure(*_FORGOTTEN)
        return session


def _show(target: str, steps: list[Step]) -> None:
    styles = {"ok": "green", "failed": "bold red", "not tried": "dim"}
    table = Table(title=f"the store at {target}", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("note", overflow="fold")
    for step in steps:
        took = "" if step.milliseconds is None else f"{step.milliseconds:.1f} ms"
        table.add_row(step.name, took, Text(step.outcome, styles[step.outcome]), Text(step.note))
    console = Console()
    console.print(table)
    for step in steps:
        if step.advice:
            console.print(Text(f"What to do: {step.advice}."), soft_wrap=True)

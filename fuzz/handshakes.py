"""Targets with a real SSL_CTX of each TLS stack: first messages of clients, and values in the store.

OpenSSL, the shim and its callbacks are real; the store is a table in memory, the clock stands still.
"""

from __future__ import annotations

import base64
import json
import ssl
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from OpenSSL import SSL

from fuzz.parsers import KEYRING, NOW
from fuzz.target import Check, Pieces, Target
from resumed._client.store import StoredSession
from resumed._crypto.envelope import Envelope
from resumed._crypto.sealed_value import seal
from resumed._crypto.store_key import StoreKeys
from resumed._openssl import CallbackBinding
from resumed._policy.fingerprint import NO_CLIENT_AUTHENTICATION, names_of, server_identity
from resumed._policy.session_policy import SessionPolicy
from support.tls import CERTIFICATE, HOSTS, STACKS, VERSIONS, Stack, client_context, server_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

RECORDED = Path(__file__).parent / "recorded.json"
"""Of a handshake with each stack in each version: its last session, and the ClientHello that offers it."""
_CIPHERS = b"\x13\x01\x13\x02\x13\x03\xc0\x2b\xc0\x2f\x00\x2f"
_LARGEST_RECORD = 16_384
FINGERPRINT = (
    server_identity(names_of(ssl.PEM_cert_to_DER_cert(CERTIFICATE.cert_chain_pems[0].bytes().decode())))
    + NO_CLIENT_AUTHENTICATION
)
"""The fingerprint of all frontends here."""


class Memory:
    """Stands in for the StoreClient of a shim."""

    target, namespace, deadline = "memory", "shop", 5.0

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def get(self, key: bytes, *, deadline: float = 0.0) -> StoredSession | None:
        """Look up."""
        value = self.values.get(key)
        return None if value is None else StoredSession(value, 60.0)

    def close(self) -> None:
        """Do nothing."""


class _Later:
    """Stands in for the threads that look up while a handshake rests: does so between its steps."""

    def __init__(self) -> None:
        self.due: deque[Callable[[], object]] = deque()

    def submit(self, call: Callable[..., object], *arguments: object) -> Future[object]:
        """Do it later."""
        self.due.append(lambda: call(*arguments))
        return Future()

    def shutdown(self, **_: object) -> None:
        """Do nothing."""


class _Sink:
    """Stands in for the WriteQueue: keeps what would be sent."""

    def __init__(self) -> None:
        self.last: Any = None

    def submit(self, write: Any, *, urgent: bool = False, more: bool = False) -> int:
        """Keep it."""
        self.last = write
        return 0

    answered = True

    def is_removed(self, _key: bytes) -> bool:
        """Tell that nothing was removed."""
        return False

    def close(self, _timeout: float) -> None:
        """Do nothing."""


class Frontend:
    """A server's context with the shim."""

    def __init__(self, stack: Stack) -> None:
        self.stack: Stack = stack
        self.store = Memory()
        self.context = server_context(stack)
        self.shim = SessionPolicy(self.store, KEYRING, clock=lambda: NOW)  # type: ignore[arg-type]
        self.shim._write_queue = self.sink = _Sink()  # type: ignore[assignment]
        self.shim._lookups._threads = self.later = _Later()  # type: ignore[assignment]
        self.binding = CallbackBinding(self.context, self.shim, ignore_id_context=True)

    def keep(self, session_id: bytes, value: bytes) -> None:
        """Have the store answer with `value`."""
        self.store.values = {self.store_key(session_id): value}

    def store_key(self, session_id: bytes) -> bytes:
        """Return where a session is stored."""
        return StoreKeys("shop").key(session_id)

    def seal(self, session_id: bytes, session: bytes) -> bytes:
        """Return the value that an honest frontend would have stored."""
        return self.seal_envelope(session_id, Envelope(FINGERPRINT, NOW, session).encode())

    def seal_envelope(self, session_id: bytes, envelope: bytes) -> bytes:
        """Return the value of a frontend that seals any bytes as an envelope."""
        return seal(KEYRING._keys, self.store_key(session_id), envelope, NOW + 60, bytes(12))

    def accept(self) -> _Server:
        """Return a server's end."""
        return _OfSsl(self) if self.stack == "ssl" else _OfPyOpenSSL(self)


class _Server:
    """A server's end of a connection in memory."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    def step(self, data: bytes) -> bytes:
        """Process the client's bytes, None for their end, and return the response."""
        raise NotImplementedError


class _OfSsl(_Server):
    """Over `ssl`, with a handshake that is suspended during the lookup."""

    def __init__(self, frontend: Frontend) -> None:
        super().__init__(frontend)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = frontend.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._handshake = frontend.binding.begin(lambda: lambda: None)
        self.done = False

    def step(self, data: bytes) -> bytes:
        self._incoming.write(data)
        later = self.frontend.later
        while not self.done:
            try:
                self.frontend.binding.run_step(self._handshake, self._tls.do_handshake)
                self.done = True
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError:
                if not self._handshake.suspended:
                    self.done = True
                    break
                later.due.popleft()()
        later.due.clear()
        return self._outgoing.read()


class _OfPyOpenSSL(_Server):
    """Over pyOpenSSL."""

    def __init__(self, frontend: Frontend) -> None:
        super().__init__(frontend)
        self._tls = SSL.Connection(frontend.context)
        self._tls.set_accept_state()
        self.done = False

    def step(self, data: bytes) -> bytes:
        if data:
            self._tls.bio_write(data)
        try:
            self._tls.do_handshake()
            self.done = True
        except SSL.WantReadError:
            pass
        except SSL.Error:
            self.done = True
        try:
            return self._tls.bio_read(65_536)
        except SSL.WantReadError:
            return b""


class Recorded(NamedTuple):
    """A session, and the ClientHello that offers it."""

    session_id: bytes
    session: bytes
    hello: bytes


def recorded() -> dict[str, Recorded]:
    """Return what record() kept, by stack and version."""
    kept = json.loads(RECORDED.read_text())
    return {name: Recorded(*map(base64.b64decode, parts)) for name, parts in kept.items()}


def record() -> None:
    """Shake hands with each stack in each version, and keep what can be offered then."""
    kept = {}
    for stack in STACKS:
        for version in VERSIONS:
            frontend, client = Frontend(stack), client_context(version)
            seen: list[tuple[bytes, Envelope]] = []
            frontend.shim.on_new_session = lambda *told, seen=seen, **_: seen.append(told[:2])  # type: ignore[method-assign]
            session = _shake(frontend.accept(), client, None)
            hello = _Client(client, session).step(b"")
            session_id, envelope = seen[-1]
            assert envelope.fingerprint == FINGERPRINT
            parts = (session_id, envelope.session, hello)
            kept[f"{stack} {version.name}"] = [base64.b64encode(part).decode() for part in parts]
    RECORDED.write_text(json.dumps(kept, indent=2) + "\n")


class _Client:
    """A client's end."""

    def __init__(self, context: ssl.SSLContext, session: ssl.SSLSession | None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=HOSTS[0], session=session)

    def step(self, data: bytes) -> bytes:
        """Process the server's bytes, and return the response."""
        self._incoming.write(data)
        try:
            self.tls.do_handshake()
            self.tls.read(1)  # tickets
        except ssl.SSLError:
            pass
        return self._outgoing.read()


def _shake(server: _Server, context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    client = _Client(context, session)
    data = client.step(b"")
    while data:
        data = client.step(server.step(data))
    return client.tls.session


class _Stage:
    """Both stacks, with recorded sessions, and checks for internal errors."""

    def __init__(self) -> None:
        self.frontends = [Frontend(stack) for stack in STACKS]
        self.recorded = list(recorded().values())

    def healthy(self) -> None:
        """Raise if a callback caught a defect."""
        for frontend in self.frontends:
            assert not frontend.shim.stats.misses["internal-error"], frontend.stack


def client_hellos() -> Check:
    """Any first message of a client gets a response; no exception crosses OpenSSL, and no callback fails."""
    stage = _Stage()
    for frontend in stage.frontends:
        for each in stage.recorded:
            frontend.store.values[frontend.store_key(each.session_id)] = frontend.seal(each.session_id, each.session)

    def check(data: bytes) -> None:
        mode, data = data[:1], data[1:]
        number = int.from_bytes(mode, "big")
        if number & 6:
            data = _records(_message(data) if number & 2 else _built(data))
        stage.frontends[number & 1].accept().step(data)
        stage.healthy()

    return check


def _records(message: bytes) -> bytes:
    parts = (message[at : at + _LARGEST_RECORD] for at in range(0, len(message), _LARGEST_RECORD))
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)


def _message(body: bytes) -> bytes:
    return b"\x01" + len(body).to_bytes(3, "big") + body


def _built(data: bytes) -> bytes:
    """Return a ClientHello that is well-formed on the outside: an id, and extensions."""
    pieces = Pieces(data)
    session_id = pieces.take(pieces.number() % 34)
    extensions = b""
    while pieces:
        kind, size = pieces.number() % 64, pieces.number(2)
        content = pieces.take(size)
        extensions += kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content
    body = b"\3\3" + bytes(32) + bytes((len(session_id),)) + session_id
    body += len(_CIPHERS).to_bytes(2, "big") + _CIPHERS + b"\1\0"
    return _message(body + len(extensions).to_bytes(2, "big") + extensions)


def _client_hello_seeds() -> Iterable[bytes]:
    for number, each in enumerate(recorded().values()):
        stack = bytes((number // len(VERSIONS),))
        yield stack + each.hello
        body = each.hello[9:]
        yield bytes((stack[0] | 2,)) + body
        at = 34
        session_id = body[at + 1 : at + 1 + body[at]]
        at += 1 + len(session_id)
        at += 2 + int.from_bytes(body[at : at + 2], "big")
        extensions = Pieces(body[at + 1 + body[at] + 2 :])
        built = bytes((len(session_id),)) + session_id
        while extensions:
            kind, size = extensions.number(2), extensions.number(2)
            content = extensions.take(size)
            if kind < 64:
                built += bytes((kind,)) + size.to_bytes(2, "big") + content
        yield bytes((stack[0] | 4,)) + built


def stored_sessions() -> Check:
    """A client gets a response for any stored value, sealed by the fleet or not."""
    stage = _Stage()

    def check(data: bytes) -> None:
        number, data = int.from_bytes(data[:1], "big"), data[1:]
        frontend = stage.frontends[number & 1]
        offered = stage.recorded[(number >> 1) % len(stage.recorded)]
        if number & 8:
            value = data
        else:
            value = (frontend.seal_envelope if number & 16 else frontend.seal)(offered.session_id, data)
        frontend.keep(offered.session_id, value)
        frontend.accept().step(offered.hello)
        stage.healthy()

    return check


def _stored_session_seeds() -> Iterable[bytes]:
    for number, each in enumerate(recorded().values()):
        for stack in range(len(STACKS)):
            yield bytes((number << 1 | stack,)) + each.session
        envelope = Envelope(FINGERPRINT, NOW, each.session).encode()
        yield bytes((number << 1 | 16,)) + envelope
        sealed = seal(KEYRING._keys, StoreKeys("shop").key(each.session_id), envelope, NOW + 60, bytes(12))
        yield bytes((number << 1 | 8,)) + sealed


def whole_handshakes() -> Check:
    """The same to the end of the handshake, with a client that has the session: tickets are issued, and kept."""
    stage = _Stage()
    offers = []
    for frontend in stage.frontends:
        for version in VERSIONS:
            client = client_context(version)
            seen: list[bytes] = []
            frontend.shim.on_new_session = lambda *told, seen=seen, **_: seen.append(told[0])  # type: ignore[method-assign]
            session = _shake(frontend.accept(), client, None)
            del frontend.shim.on_new_session
            offers.append((frontend, client, session, seen[-1]))

    def check(data: bytes) -> None:
        frontend, client, session, session_id = offers[int.from_bytes(data[:1], "big") % len(offers)]
        # Sessions in the inputs are from another run: make lookups of this one's id return them.
        frontend.keep(session_id, frontend.seal(session_id, data[1:].replace(_ID, session_id)))
        _shake(frontend.accept(), client, session)
        stage.healthy()

    return check


_ID = b"the id of a session, of 32 bytes"


def _whole_handshake_seeds() -> Iterable[bytes]:
    for number, each in enumerate(recorded().values()):
        yield bytes((number,)) + each.session.replace(each.session_id, _ID)


_SHIM = (
    *("resumed/_policy/session_policy.py", "resumed/_crypto/envelope.py", "resumed/_async/suspendable_handshake.py"),
    *("resumed/_openssl/callbacks.py", "resumed/_openssl/contexts.py", "resumed/_openssl/client_hello.py"),
    "resumed/_openssl/session_codec.py",
)
HANDSHAKES = (
    Target("client_hellos", client_hellos, _client_hello_seeds, _SHIM, 20_000),
    Target("stored_sessions", stored_sessions, _stored_session_seeds, _SHIM, 4_096),
    Target("whole_handshakes", whole_handshakes, _whole_handshake_seeds, _SHIM, 4_096),
)

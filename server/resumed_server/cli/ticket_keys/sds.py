"""Envoy's secret discovery service (SDS) on a unix socket, for ticket keys only.

Streams have two forms, "state of the world" and incremental (delta). A client gets the keys when it subscribes, and
again after each change. https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import structlog
from google.protobuf.any_pb2 import Any as PackedMessage

from resumed_server.cli.ticket_keys import sds_pb2 as pb
from resumed_server.cli.ticket_keys.outputs import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from resumed_server.cli.ticket_keys.key_set import KeySet
    from resumed_server.config.types import Address

SERVICE = "envoy.service.secret.v3.SecretDiscoveryService"
TYPE_URL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
FIXED_NAME = "ticket-keys"
"""The name of the secret, beside the namespace's."""
MAX_STREAMS = 64
"""Maximum number of streams; an Envoy has one for each cluster that its secrets come from."""

_LONGEST_REASON = 500

log = structlog.get_logger()


class InvalidSubscription(Exception):
    """A client asks for something that this server does not have; the text names the secrets that exist."""


class Snapshot(NamedTuple):
    """The keys at one time."""

    keys: tuple[bytes, ...]
    version: str
    """Differs if the keys do; the same after a restart."""
    temporary: bool

    @classmethod
    def of(cls, keys: KeySet) -> Snapshot:
        """Return the snapshot of a key set."""
        version = hashlib.sha256(" ".join(keys.names).encode()).hexdigest()[:16]
        return cls(tuple(key.openssl for key in keys.all), version, keys.temporary)

    def pack(self, name: str) -> PackedMessage:
        """Return the secret under a name."""
        keys = pb.TlsSessionTicketKeys(keys=[pb.DataSource(inline_bytes=key) for key in self.keys])
        secret = pb.Secret(name=name, session_ticket_keys=keys)
        return PackedMessage(type_url=TYPE_URL, value=secret.SerializeToString())


class _Subscription:
    """The state that both kinds of stream have. The lock of SecretDiscovery protects it.

    Args:
        names: The names of the secret.
        on_rejection: Called with the reason for which a client rejects a response.
    """

    def __init__(self, names: Sequence[str], on_rejection: Callable[[str], object]) -> None:
        self._names, self._on_rejection = names, on_rejection
        self._wanted: set[str] = set()
        self._responses = 0
        self._sent: str | None = None
        """The version of the last response; None if one is due."""
        self._has_keys = False
        """Whether the client has keys, of this stream or of one before."""

    def _is_due(self, snapshot: Snapshot) -> bool:
        if not self._wanted or snapshot.version == self._sent:
            return False
        # A temporary key does not replace those that a client has from an earlier stream.
        return not (snapshot.temporary and self._has_keys and self._sent is None)

    def _record(self, snapshot: Snapshot) -> str:
        """Record a response, and return its nonce."""
        self._sent, self._has_keys = snapshot.version, True
        self._responses += 1
        return str(self._responses)

    def _verify(self, type_url: str, names: Sequence[str]) -> None:
        if type_url not in {"", TYPE_URL}:
            raise InvalidSubscription(f"this server has only secrets ({TYPE_URL}), and nothing of the type {type_url}")
        for name in names:
            if name not in self._names:
                known = " or ".join(map(repr, self._names))
                raise InvalidSubscription(f"there is no secret {name!r}: the ticket keys have the name {known}")

    def _note_rejection(self, request: pb.DiscoveryRequest | pb.DeltaDiscoveryRequest) -> None:
        if request.HasField("error_detail"):
            self._on_rejection(request.error_detail.message[:_LONGEST_REASON])


class Subscription(_Subscription):
    """A stream in the form "state of the world"."""

    def receive(self, request: pb.DiscoveryRequest) -> None:
        """Take a request.

        Raises:
            InvalidSubscription: It asks for something else than ticket keys.
        """
        self._verify(request.type_url, request.resource_names)
        if request.response_nonce and request.response_nonce != str(self._responses):
            return  # about a response before the last one
        self._note_rejection(request)
        self._has_keys = self._has_keys or bool(request.version_info)
        if set(request.resource_names) != self._wanted:
            self._wanted, self._sent = set(request.resource_names), None

    def respond(self, snapshot: Snapshot | None) -> pb.DiscoveryResponse | None:
        """Return the response that is due; None if none is."""
        if snapshot is None or not self._is_due(snapshot):
            return None
        return pb.DiscoveryResponse(
            version_info=snapshot.version,
            resources=[snapshot.pack(name) for name in sorted(self._wanted)],
            type_url=TYPE_URL,
            nonce=self._record(snapshot),
        )


class DeltaSubscription(_Subscription):
    """An incremental stream."""

    def receive(self, request: pb.DeltaDiscoveryRequest) -> None:
        """Take a request.

        Raises:
            InvalidSubscription: It asks for something else than ticket keys.
        """
        self._verify(request.type_url, request.resource_names_subscribe)
        self._note_rejection(request)
        self._has_keys = self._has_keys or bool(request.initial_resource_versions)
        self._wanted -= set(request.resource_names_unsubscribe)
        if request.resource_names_subscribe:
            self._wanted |= set(request.resource_names_subscribe)
            self._sent = None

    def respond(self, snapshot: Snapshot | None) -> pb.DeltaDiscoveryResponse | None:
        """Return the response that is due; None if none is."""
        if snapshot is None or not self._is_due(snapshot):
            return None
        return pb.DeltaDiscoveryResponse(
            system_version_info=snapshot.version,
            resources=[
                pb.Resource(name=name, version=snapshot.version, resource=snapshot.pack(name))
                for name in sorted(self._wanted)
            ],
            type_url=TYPE_URL,
            nonce=self._record(snapshot),
        )


class SecretDiscovery(Output):
    """Serves the keys of the last publish() to any number of Envoys.

    Args:
        address: The unix socket to listen at.
        namespace: The namespace of the keys.

    Attributes:
        streams: Number of open streams.
        rejections: Number of responses that clients have rejected.
    """

    name = "sds"
    needs_reload = False

    def __init__(self, address: Address, namespace: str) -> None:
        self._names = tuple(dict.fromkeys((namespace, FIXED_NAME)))
        self._news = threading.Condition()
        self._snapshot: Snapshot | None = None
        self.streams = self.rejections = 0
        self._server = grpc.server(ThreadPoolExecutor(MAX_STREAMS, "sds"), maximum_concurrent_rpcs=MAX_STREAMS)
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "StreamSecrets": grpc.stream_stream_rpc_method_handler(
                lambda requests, context: self._stream(Subscription, requests, context),
                pb.DiscoveryRequest.FromString,
                pb.DiscoveryResponse.SerializeToString,
            ),
            "DeltaSecrets": grpc.stream_stream_rpc_method_handler(
                lambda requests, context: self._stream(DeltaSubscription, requests, context),
                pb.DeltaDiscoveryRequest.FromString,
                pb.DeltaDiscoveryResponse.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._server.add_insecure_port(str(address))
        self._server.start()

    def publish(self, keys: KeySet) -> None:
        """Send keys to all streams, and to later ones."""
        with self._news:
            self._snapshot = Snapshot.of(keys)
            self._news.notify_all()

    def has_keys(self) -> bool:
        """Return False: a subscription shows whether the client has keys."""
        return False

    def close(self) -> None:
        """End all streams; Envoys keep their keys."""
        self._server.stop(None).wait()

    def _stream(
        self,
        kind: type[Subscription | DeltaSubscription],
        requests: Iterator[Any],
        context: grpc.ServicerContext,
    ) -> Iterator[Any]:
        subscription = kind(self._names, self._on_rejection)
        refusal: list[str] = []
        ended = threading.Event()

        def receive() -> None:
            try:
                for request in requests:
                    with self._news:
                        subscription.receive(request)
                        self._news.notify_all()
            except InvalidSubscription as error:
                refusal.append(str(error))
            except grpc.RpcError:
                pass  # the client has gone
            finally:
                with self._news:
                    ended.set()
                    self._news.notify_all()

        def take_response() -> Any:
            """Wait for a response that is due; None at the end of the stream."""
            with self._news:
                while not ended.is_set():
                    response = subscription.respond(self._snapshot)
                    if response is not None:
                        return response
                    self._news.wait()
            return None

        with self._news:
            self.streams += 1
        try:
            threading.Thread(target=receive, name="sds-requests", daemon=True).start()
            while (response := take_response()) is not None:
                yield response
        finally:
            with self._news:
                self.streams -= 1
        if refusal:
            log.warning("subscription refused", cause=refusal[0])
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, refusal[0])

    def _on_rejection(self, reason: str) -> None:
        self.rejections += 1
        log.warning("Envoy rejected the keys, and keeps those it has", reason=reason)

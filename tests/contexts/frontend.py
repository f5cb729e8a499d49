"""Frontends of `ssl` or pyOpenSSL whose ports have several hosts; they answer with host and client.

Each line of standard input is a frontend as JSON: `stack`, `port`, `hosts` (see places.py), `library` (the arguments of
resumed.install(), or null) and `log`, the file for its standard error. It is forked, so that it does not have to import
anything, and its process id is a line of the output. With the argument `resumed` all of them have imported that.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto

SSL_MODES = {"": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "require": ssl.CERT_REQUIRED}
MODES = {
    "": SSL.VERIFY_NONE,
    "optional": SSL.VERIFY_PEER,
    "optional_no_ca": SSL.VERIFY_PEER,
    "require": SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
}


def install(context: Any, library: dict[str, Any], host: dict[str, Any]) -> None:
    """Install the client under a context; options that this version of the client lacks are omitted."""
    import resumed

    options = {**library, **({"namespace": host["namespace"]} if host.get("namespace") else {})}
    known = inspect.signature(resumed.install).parameters
    resumed.install(context, **{name: value for name, value in options.items() if name in known})


def common_name(der: bytes | None) -> str:
    """Return how an answer names a client."""
    if not der:
        return "-"
    (name,) = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value)


class Chooser:
    """Which of a port's hosts serves: by the switch file, by ALPN, or by name."""

    def __init__(self, hosts: list[dict[str, Any]], contexts: list[Any]) -> None:
        self._contexts = {host["by"]: context for host, context in zip(hosts, contexts, strict=True)}
        self._hosts = {host["by"]: host for host in hosts}
        self.switch = next((Path(host["file"]) for host in hosts if host["by"] == "switch"), None)
        self.several = bool(set(self._hosts) - {"", "alpn"})

    def host(self, name: str | None) -> tuple[Any, dict[str, Any]]:
        """Return the context and the host for a server name."""
        by = "switch" if self.switch and self.switch.exists() else (name or "").lower()
        by = by if by in self._hosts else ""
        return self._contexts[by], self._hosts[by]


class StandardLibrary:
    """`ssl`: a context for each host, which the servername callback puts in place."""

    def __init__(self, hosts: list[dict[str, Any]], library: dict[str, Any] | None) -> None:
        contexts = [self._context(host) for host in hosts]
        self._chooser, self._first = Chooser(hosts, contexts), contexts[0]
        self._names = {id(context): host["profile"] for context, host in zip(contexts, hosts, strict=True)}
        if self._chooser.several:
            self._first.sni_callback = self._choose
        if library:
            for context, host in zip(contexts, hosts, strict=True):
                install(context, library, host)

    @staticmethod
    def _context(host: dict[str, Any]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for certificate in host["certificates"]:
            context.load_cert_chain(certificate)
        context.verify_mode = SSL_MODES[host["verify"]]
        context.post_handshake_auth = host["location"]
        if host["verify"]:
            context.load_verify_locations(host["ca"])
        if host["crl"]:
            context.load_verify_locations(host["crl"])
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context

    def _choose(self, connection: Any, name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._chooser.host(name)[0]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer under asyncio."""
        tls = writer.get_extra_info("ssl_object")
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                profile = self._names[id(tls.context)]
                writer.write(f"served {profile}, client {common_name(tls.getpeercert(binary_form=True))}\n".encode())
                await writer.drain()
        writer.close()

    async def serve_asyncio(self, port: int) -> None:
        """Serve under asyncio until SIGTERM."""
        server = await asyncio.start_server(self.answer, "127.0.0.1", port, ssl=self._first)
        await server.serve_forever()

    def serve(self, connection: socket.socket) -> None:
        """Shake hands and answer."""
        with self._first.wrap_socket(connection, server_side=True) as tls:
            while received := tls.recv(4096):
                if received.startswith(b"admin") and tls.version() == "TLSv1.3":
                    # The client sends the certificate with its next message.
                    tls.verify_client_post_handshake()
                    tls.sendall(b"more\n")
                    tls.recv(4096)
                profile = self._names[id(tls.context)]
                tls.sendall(f"served {profile}, client {common_name(tls.getpeercert(binary_form=True))}\n".encode())


class PyOpenSSL:
    """pyOpenSSL: the servername callback sets context, verification and, where the host wants it, nothing else."""

    def __init__(self, hosts: list[dict[str, Any]], library: dict[str, Any] | None) -> None:
        # A host with settings for each connection serves on the context of the first host.
        contexts: list[Any] = []
        for host in hosts:
            contexts.append(contexts[0] if host["per_connection"] and contexts else self._context(host))
        self._hosts, self._first = hosts, contexts[0]
        self._chooser = Chooser(hosts, contexts)
        if self._chooser.several:
            self._first.set_tlsext_servername_callback(self._choose)
        if any(host["by"] == "alpn" for host in hosts):
            self._first.set_alpn_select_callback(self._choose_by_protocol)
        if library:
            for number, (context, host) in enumerate(zip(contexts, hosts, strict=True)):
                if context not in contexts[:number]:
                    install(context, library, host)

    @staticmethod
    def _context(host: dict[str, Any]) -> Any:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        for certificate in host["certificates"]:
            context.use_certificate_chain_file(certificate)
            context.use_privatekey_file(certificate)
        if host["verify"]:
            context.load_verify_locations(host["ca"])
        if host["verify"] and not host["per_connection"]:
            context.set_verify(MODES[host["verify"]], PyOpenSSL._callback(host))
        if host["depth"] is not None:
            context.set_verify_depth(host["depth"])
        store = context.get_cert_store()
        assert store
        if host["partial_chain"]:
            store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        if host["crl"]:
            store.add_crl(x509.load_pem_x509_crl(Path(host["crl"]).read_bytes()))
            store.set_flags(crypto.X509StoreFlags.CRL_CHECK)
        # Without one OpenSSL rejects resumption on connections that request a certificate.
        context.set_session_id((host["id_context"] or "contexts").encode())
        return context

    @staticmethod
    def _callback(host: dict[str, Any]) -> Any:
        return lambda _connection, _certificate, _error, _depth, passed: host["verify"] == "optional_no_ca" or passed

    def _enter(self, connection: Any, context: Any, host: dict[str, Any]) -> None:
        connection.set_app_data(host["profile"])
        if context is not connection.get_context():
            connection.set_context(context)
        connection.set_verify(MODES[host["verify"]], self._callback(host))

    def _choose(self, connection: Any) -> None:
        name = connection.get_servername()
        self._enter(connection, *self._chooser.host(name.decode() if name else None))

    def _choose_by_protocol(self, connection: Any, protocols: list[bytes]) -> bytes:
        if b"acme-tls/1" in protocols:
            self._enter(connection, self._chooser._contexts["alpn"], self._chooser._hosts["alpn"])
        return protocols[0]

    def serve(self, connection: socket.socket) -> None:
        """Shake hands and answer."""
        tls = SSL.Connection(self._first, connection)
        first = self._hosts[0]
        tls.set_app_data(first["profile"])
        if first["per_connection"]:
            tls.set_verify(MODES[first["verify"]], self._callback(first))
        tls.set_accept_state()
        tls.do_handshake()
        while tls.recv(4096):
            peer = tls.get_peer_certificate(as_cryptography=True)
            name = common_name(peer.public_bytes(Encoding.DER) if peer else None)
            tls.sendall(f"served {tls.get_app_data()}, client {name}\n".encode())


def serve(description: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="resumed: %(message)s")
    if description["stack"] == "asyncio":
        asyncio.run(StandardLibrary(description["hosts"], description["library"]).serve_asyncio(description["port"]))
    stack = StandardLibrary if description["stack"] == "ssl" else PyOpenSSL
    frontend = stack(description["hosts"], description["library"])
    listener = socket.create_server(("127.0.0.1", description["port"]), backlog=64)

    def shake_hands(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, SSL.Error):
            frontend.serve(connection)

    while True:
        accepted, _ = listener.accept()
        threading.Thread(target=shake_hands, args=(accepted,), daemon=True).start()


def begin(description: dict[str, Any]) -> None:
    """Make this process one of its own, as if it had been started, and serve."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(description["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in (nothing, 0), (log, 1), (log, 2):
        os.dup2(source, target)
    try:
        serve(description)
    except BaseException:  # noqa: BLE001  # the loop of main() is not this process's
        traceback.print_exc()
    finally:
        os._exit(1)


def main() -> None:
    """Fork a frontend for each line, until there are no more."""
    for module in sys.argv[1:]:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # this program does not wait for them
    for line in sys.stdin:
        child = os.fork()
        if not child:
            begin(json.loads(line))
        print(child, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

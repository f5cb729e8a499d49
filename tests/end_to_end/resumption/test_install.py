"""install() takes over a context, restores it, and rejects unsupported contexts."""

from __future__ import annotations

import _ssl
import ctypes
import gc
import os
import ssl
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.bindings.openssl.binding import Binding

import resumed
from resumed._openssl.library import context_of
from support.tls import PATIENCE, STACKS, VERSIONS, Client, Frontend, client_context, server_context
from support.waiting import until

if TYPE_CHECKING:
    from support.server import RunningServer
    from support.tls import Stack

KEYRING = resumed.Keyring.from_keys([os.urandom(32)])
ARGUMENTS: dict[str, Any] = {"target": "127.0.0.1:1", "namespace": "shop", "keyring": KEYRING}


def settings(context: Any, installation: resumed.Installation) -> tuple[object, ...]:
    """Return the session settings of a context."""
    library, pointer = installation._binding.library, installation._binding._pointer
    return (
        library.SSL_CTX_ctrl(pointer, 45, 0, None),
        library.SSL_CTX_get_options(pointer),
        library.SSL_CTX_get_timeout(pointer),
    )


def test_the_callbacks_can_be_read_back(stack: Stack) -> None:
    context = server_context(stack)
    shim = resumed.install(context, **ARGUMENTS)
    assert shim.new_callback
    assert shim.get_callback
    assert shim.remove_callback
    shim.uninstall()
    assert (shim.new_callback, shim.get_callback, shim.remove_callback) == (None, None, None)


def test_an_installation_outlives_its_context_harmlessly(stack: Stack) -> None:
    shim = resumed.install(server_context(stack), **ARGUMENTS)
    gc.collect()
    assert shim.get_callback is None
    shim.uninstall()


def test_uninstall_gives_the_context_back_as_it_was(store: RunningServer, stack: Stack, client: Client) -> None:
    context = server_context(stack)
    untouched = settings(context, probe := resumed.install(context, **ARGUMENTS))
    probe.uninstall()
    before = settings(context, probe)
    assert before != untouched
    frontend = Frontend(stack, store.target, KEYRING)
    during = client.visit(frontend).session
    frontend.shim.uninstall()
    assert settings(frontend.context, frontend.shim) == before
    assert not client.visit(frontend, during).reused
    own = client.visit(frontend).session
    assert client.visit(frontend, own).reused, "the stack's own resumption works again"


def test_a_context_with_callbacks_is_refused_without_replace(stack: Stack) -> None:
    context = server_context(stack)
    first = resumed.install(context, **ARGUMENTS)
    with pytest.raises(resumed.UnsupportedContext, match="replace=True"):
        resumed.install(context, **ARGUMENTS)
    address = first._binding._current()
    second = resumed.install(context, **ARGUMENTS, replace=True)
    assert second._binding._current() != address
    second.uninstall()
    assert second._binding._current() == address


@pytest.mark.parametrize("order", [(1, 0), (0, 1), (2, 1, 0), (0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_installations_that_replace_each_other_end_in_any_order(
    store: RunningServer, stack: Stack, client: Client, order: tuple[int, ...]
) -> None:
    frontend = Frontend(stack, None)
    context = frontend.context
    probe = resumed.install(context, **ARGUMENTS)
    probe.uninstall()
    before = settings(context, probe)
    left = {
        number: resumed.install(
            context,
            target=store.target,
            keyring=KEYRING,
            deadline=PATIENCE,
            namespace=f"n{number}",
            replace=bool(number),
            ignore_id_context=True,
        )
        for number in range(len(order))
    }
    for number in order:
        serving = left[max(left)]
        session = client.visit(frontend).session
        assert serving.flush(PATIENCE)
        assert client.visit(frontend, session).reused
        assert serving.stats.hits.total() > 0
        assert not any(each.stats.misses for each in left.values())
        left.pop(number).uninstall()
    assert settings(context, probe) == before
    assert not client.visit(frontend, session).reused
    if stack == "ssl":
        assert context.sslobject_class is ssl.SSLObject
        assert context.sslsocket_class is ssl.SSLSocket


@pytest.mark.parametrize(
    ("context", "complaint"),
    [
        (object(), "need an ssl.SSLContext"),
        (None, "need an ssl.SSLContext"),
        (client_context(VERSIONS[0]), "for clients"),
    ],
)
def test_only_server_contexts_are_accepted(context: object, complaint: str) -> None:
    with pytest.raises(resumed.UnsupportedContext, match=complaint):
        resumed.install(context, **ARGUMENTS)


def test_a_context_that_accepts_early_data_is_refused(stack: Stack) -> None:
    """Early data could be replayed at every frontend of the fleet (RFC 8446 section 8)."""
    context = server_context(stack)
    library = ctypes.CDLL(_ssl.__file__) if stack == "ssl" else Binding().lib
    pointer = ctypes.c_void_p(context_of(context).pointer) if stack == "ssl" else context._context
    assert library.SSL_CTX_set_max_early_data(pointer, 1)
    with pytest.raises(resumed.UnsupportedContext, match="early data"):
        resumed.install(context, **ARGUMENTS)


@pytest.mark.parametrize("namespace", ["", "Shop", "a b", "x" * 64, "a/b", "\n"])
def test_a_malformed_namespace_is_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="1 to 63 characters"):
        resumed.install(server_context("ssl"), **{**ARGUMENTS, "namespace": namespace})


def test_a_keyring_that_is_missing_is_refused(tmp_path: Path) -> None:
    context = server_context("ssl")
    with pytest.raises(resumed.KeyringError):
        resumed.install(context, **{**ARGUMENTS, "keyring": tmp_path / "nowhere"})
    resumed.install(context, **ARGUMENTS)


def test_a_context_that_goes_takes_everything_with_it(stack: Stack) -> None:
    gc.collect()
    threads, descriptors = threading.active_count(), descriptors_open()
    references: list[weakref.ref[Any]] = []
    for _ in range(5):
        context = server_context(stack)
        installation = resumed.install(context, **ARGUMENTS)
        installation._policy._breaker.closed = False
        installation._policy._prober.start()
        installation.remove(bytes(32))  # starts the sender's thread
        references.append(weakref.ref(installation._binding))
        references.append(weakref.ref(installation._policy))
        running = [installation._policy._write_queue._thread, installation._policy._prober._thread]
        del context, installation
        gc.collect()
        for thread in running:
            assert thread is not None
            thread.join(10)
            assert not thread.is_alive()
    gc.collect()
    assert not [reference for reference in references if reference()]
    until(lambda: threading.active_count() <= threads)  # a thread closes the last connection
    assert descriptors_open() <= descriptors


def descriptors_open() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_installation_need_not_be_kept(store: RunningServer, stack: Stack, client: Client) -> None:
    """The context keeps the objects alive that C code points to."""
    frontend = Frontend(stack, store.target, KEYRING)
    frontend.shim = None
    gc.collect()
    assert client.visit(frontend, client.visit(frontend).session).reused


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_number_of_tickets_stays_the_users(store: RunningServer, count: int) -> None:
    frontend = Frontend("ssl", store.target, KEYRING)
    frontend.context.num_tickets = count
    client = Client(ssl.TLSVersion.TLSv1_3)
    client.visit(frontend)
    assert frontend.shim.flush()
    assert frontend.shim.stats.puts["stored"] == count


def test_client_certificates_travel_with_the_session(store: RunningServer, stack: Stack, client: Client) -> None:
    from support.tls import CA

    frontends = [Frontend(each, store.target, KEYRING, namespace="mutual") for each in (stack, "ssl")]
    for frontend in frontends:
        if frontend.stack == "ssl":
            frontend.context.verify_mode = ssl.CERT_REQUIRED
        else:
            from OpenSSL import SSL

            frontend.context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
        CA.configure_trust(frontend.context)
    CA.issue_cert("client.example").configure_cert(client.context)
    session = client.visit(frontends[0]).session
    assert client.visit(frontends[1], session).reused


def test_a_context_that_forwards_to_another_one_is_refused() -> None:
    """A context of truststore makes connections with another SSL_CTX, where the callbacks would never run."""

    class Forwarding(ssl.SSLContext):
        inner = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def __getattribute__(self, name: str) -> Any:
            return Forwarding.inner.options if name == "options" else super().__getattribute__(name)

    with pytest.raises(resumed.UnsupportedContext, match="forwards to another context"):
        resumed.install(Forwarding(ssl.PROTOCOL_TLS_SERVER), target="127.0.0.1:1", namespace="shop", keyring=KEYRING)


def test_without_pyelftools_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['elftools'] = None; sys.modules['elftools.elf.elffile'] = None\n"
        "import resumed; from OpenSSL import SSL\n"
        "try: resumed.install(SSL.Context(SSL.TLS_SERVER_METHOD), target='x:1', namespace='x', "
        "keyring=resumed.Keyring.plaintext())\n"
        "except resumed.UnsupportedContext as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'resumed[pyopenssl]'" in result.stdout


def test_on_a_32_bit_system_the_message_says_so() -> None:
    code = (
        "import ctypes; ctypes.sizeof = lambda _: 4\n"
        "import resumed; from OpenSSL import SSL\n"
        "try: resumed.install(SSL.Context(SSL.TLS_SERVER_METHOD), target='x:1', namespace='x', "
        "keyring=resumed.Keyring.plaintext())\n"
        "except resumed.UnsupportedContext as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "64-bit systems only" in result.stdout


def test_the_stacks_do_not_share_a_libssl() -> None:
    """Otherwise the tests between stacks would prove nothing."""
    installations = [resumed.install(server_context(stack), **ARGUMENTS) for stack in STACKS]
    versions = [each._binding.library.OpenSSL_version_num() for each in installations]
    assert versions[0] == ssl.OPENSSL_VERSION_NUMBER
